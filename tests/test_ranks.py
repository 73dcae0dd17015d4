"""Two processes that work together see, draw and judge what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    judge = ["evaluate", run, "--allow-small-n", "--json", "--device", "cpu", "--num-samples"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    rediffuse(*sample, str(alone), root=tmp_path)
    in_two(*sample, str(together), root=tmp_path)
    pictures = sorted(file.name for file in alone.glob("*.png"))
    assert len(pictures) == 25
    for name in pictures:
        assert (together / name).read_bytes() == (alone / name).read_bytes(), name
    for count in ("144", "40"):  # the first of two has none of 40, as one looks at 64 at once
        of_one = json.loads(rediffuse(*judge, count, root=tmp_path).stdout)
        kept = first_object(in_two(*judge, count, root=tmp_path))
        again = first_object(in_two(*judge, count, "--again", root=tmp_path))
        assert kept == of_one
        assert again["figures"] == of_one["figures"]
        assert again["created"] != of_one["created"]
        assert again["cost"]["evaluations"] == of_one["cost"]["evaluations"]


def first_object(told: str) -> dict[str, Any]:
    """JSON among what Gloo prints there, too."""
    found: dict[str, Any]
    found, _ = json.JSONDecoder().raw_decode(told[told.index("{") :])
    return found


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
