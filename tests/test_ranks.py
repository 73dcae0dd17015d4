"""Two processes that work together see, draw and judge what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import TINY, rediffuse, run_id

LAUNCH = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
    *("-m", "rediffuse"),
)


@pytest.mark.slow
def test_two_processes_train_as_one_up_to_rounding(tmp_path: Path) -> None:
    words = ["train", *TINY, "training.images=480", "device=cpu"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    run_id(rediffuse(*words, root=alone))
    in_two(*words, root=together)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)  # sums are in another order


@pytest.mark.slow
@pytest.mark.parametrize("told", ["0", "1"])
def test_a_signal_that_one_of_two_processes_gets_ends_both_with_a_checkpoint(
    tmp_path: Path, told: str
) -> None:
    words = ["train", *TINY, "training.images=480000", "device=cpu", "training.previews=false"]
    words += ["training.log_every_images=48", "training.compile=false"]
    said = tmp_path / "said"
    with (
        said.open("w") as file,
        subprocess.Popen(
            [*LAUNCH, *words],
            env={**os.environ, "REDIFFUSE_ROOT": str(tmp_path)},
            stdout=file,
            stderr=file,
        ) as launcher,
    ):
        try:
            metrics = until(lambda: next(iter(tmp_path.glob("*/metrics.jsonl")), None), launcher)
            until(lambda: len(metrics.read_text().splitlines()) > 20, launcher)
            os.kill(worker(launcher.pid, told), signal.SIGTERM)
            launcher.wait(120)
        finally:
            launcher.terminate()
    assert "RuntimeError" not in said.read_text()  # as of a rank that waits for one that has left
    run = metrics.parent
    record = json.loads((run / "run.json").read_text())
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    seen = json.loads((checkpoint / "state.json").read_text())["images_seen"]
    assert (record["status"], record["images_seen"]) == ("KILLED", seen)
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["images"] == seen
    longer = f"training.images={seen + 48}"
    rediffuse("resume", run.name, longer, root=tmp_path)


def until(found: Callable[[], Any], launcher: subprocess.Popen[bytes]) -> Any:
    """What is found in the end, as long as somebody is at work."""
    end = time.monotonic() + 300
    while not (it := found()):
        assert launcher.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return it


def worker(launcher: int, rank: str) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (pid,) = (
        pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()
    )
    return int(pid)


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
    return subprocess.run(
        [*LAUNCH, *words],
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
