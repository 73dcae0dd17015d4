"""Two processes that train together see what one sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import TINY, rediffuse, run_id


@pytest.mark.slow
def test_two_processes_train_as_one_up_to_rounding(tmp_path: Path) -> None:
    words = ["train", *TINY, "training.images=480", "device=cpu"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    run_id(rediffuse(*words, root=alone))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    subprocess.run(
        [*launch, "-m", "rediffuse", *words],
        env={**os.environ, "REDIFFUSE_ROOT": str(together)},
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)  # sums are in another order


def losses(root: Path) -> list[float]:
    (metrics,) = root.glob("*/metrics.jsonl")
    rows = map(json.loads, metrics.read_text().splitlines())
    return [row[name] for row in rows for name in ("loss", "validation/loss") if name in row]
