"""What only a GPU can show (`-m gpu`). The work is in `on_gpu.py`, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "work",
    [
        "waits_for_nothing",
        "a_trial_serves_training",
        "compiled_is_plain",
        "resumes_bit_for_bit",
        "draws_the_same_by_replaying",
        "chooses_by_values",
        "norms_agree",
    ],
)
def test_on_a_gpu(work: str) -> None:
    program = Path(__file__).with_name("on_gpu.py")
    done = subprocess.run([sys.executable, program, work], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
