"""Two processes that work together see, draw and judge what one does."""

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
    in_two(*words, root=together)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)  # sums are in another order


@pytest.mark.slow
def test_two_processes_draw_and_judge_as_one(tmp_path: Path) -> None:
    words = [*TINY, "training.images=480", "device=cpu", "threads=1"]
    run = run_id(rediffuse("train", *words, root=tmp_path))
    sample = ["sample", run, "--seeds", "3-26", "--device", "cpu", "--output-dir"]
    judge = ["evaluate", run, "--num-samples", "144", "--allow-small-n", "--json", "--again"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    rediffuse(*sample, str(alone), root=tmp_path)
    in_two(*sample, str(together), root=tmp_path)
    pictures = sorted(file.name for file in alone.glob("*.png"))
    assert len(pictures) == 25
    for name in pictures:
        assert (together / name).read_bytes() == (alone / name).read_bytes(), name
    of_one = json.loads(rediffuse(*judge, root=tmp_path).stdout)
    told = in_two(*judge, root=tmp_path)
    of_two, _ = json.JSONDecoder().raw_decode(told[told.index("{") :])  # Gloo prints there, too
    assert of_two["figures"] == of_one["figures"]
    assert of_two["cost"]["evaluations"] == of_one["cost"]["evaluations"]


def in_two(*words: str, root: Path) -> str:
    """What a command prints that two processes work at."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launch, "-m", "rediffuse", *words],
        env={**os.environ, "REDIFFUSE_ROOT": str(root)},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def losses(root: Path) -> list[float]:
    (metrics,) = root.glob("*/metrics.jsonl")
    rows = map(json.loads, metrics.read_text().splitlines())
    return [row[name] for row in rows for name in ("loss", "validation/loss") if name in row]
