"""How a run ends: the rest of what it records, and as what."""

import json
import math
from pathlib import Path

import pytest
import torch
from cli import TINY
from torch import Tensor

from rediffuse import launch
from rediffuse.config.compose import compose
from rediffuse.errors import TrainingError
from rediffuse.runs import Run
from rediffuse.tracking.jsonl import read_metrics
from rediffuse.training import committed, step
from rediffuse.training.state import Sums

QUIET = ("training.previews=false", "data.workers=0", "rate=constant")


def trained(root: Path, *words: str) -> Run:
    return launch.trained(compose([*TINY, *QUIET, *words]), root=root)[0]


def rows(run: Run, name: str) -> dict[int, float]:
    """A metric by the images seen."""
    return {int(row["images"]): row[name] for row in read_metrics(run.metrics) if name in row}


def test_a_run_shorter_than_an_epoch_records_its_loss(tmp_path: Path) -> None:
    run = trained(tmp_path, "training.images=96")
    losses = rows(run, "loss")
    assert list(losses) == [96]
    assert rows(run, "epoch/loss") == losses
    assert rows(run, "learning_rate").keys() == {96}
    part = {"epoch": 96 / 216, "images": 96, "loss": losses[96]}
    assert json.loads(run.epochs.read_text()) == [part]
    newest = committed.facts(committed.checkpoints(run.checkpoints)[-1])
    assert newest["metrics"]["loss"] == losses[96]


def test_a_run_made_longer_goes_on_as_planned_but_for_the_rest_of_its_first_end(
    tmp_path: Path,
) -> None:
    every = ("training.log_every_images=144",)
    golden = trained(tmp_path / "golden", "training.images=336", *every)
    run = trained(tmp_path, "training.images=192", *every)
    assert launch.resume(run.id, ["training.images=336"], root=tmp_path) == 0
    expected, found = rows(golden, "loss"), rows(run, "loss")
    assert list(expected) == [144, 288, 336]
    assert found.pop(192) != expected[144]
    assert found == expected
    assert [epoch["epoch"] for epoch in json.loads(golden.epochs.read_text())] == [1, 336 / 216]
    ends = [committed.checkpoints(one.checkpoints)[-1] for one in (golden, run)]
    for file in ends[0].glob("*.safetensors"):
        assert file.read_bytes() == (ends[1] / file.name).read_bytes()


def test_what_a_process_leaves_for_the_next_one_is_not_recorded_twice(tmp_path: Path) -> None:
    run = trained(tmp_path, "training.images=192", "training.stop_after_images=96")
    assert rows(run, "loss") == {}
    assert launch.resume(run.id, [], root=tmp_path) == 0
    assert list(rows(run, "loss")) == [192]


def test_a_run_whose_every_step_was_skipped_has_failed_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = step.batch_losses

    def spoiled(*given: object) -> tuple[Tensor, Tensor]:
        losses, t = sound(*given)  # type: ignore[arg-type]
        return losses + torch.nan, t

    monkeypatch.setattr(step, "batch_losses", spoiled)
    with pytest.raises(TrainingError, match="all 2 steps were skipped"):
        trained(tmp_path, "training.images=96", "training.checkpoint_every_images=48")
    [folder] = (file.parent for file in tmp_path.glob("*/run.json"))
    run = Run(folder)
    assert run.read().status == "FAILED"
    assert math.isnan(rows(run, "loss").get(96, math.nan))
    with pytest.raises(TrainingError, match="all 2 steps were skipped"):
        launch.resume(run.id, [], root=tmp_path)
    assert run.read().status == "FAILED"
    monkeypatch.undo()
    assert launch.resume(run.id, ["training.images=144"], root=tmp_path) == 0
    assert run.read().status == "FINISHED"


def test_a_window_of_skipped_steps_has_no_loss() -> None:
    sums = Sums()
    sums.add(Sums.of(torch.ones(3), torch.zeros(3).double()).where(torch.tensor(False)))
    assert math.isnan(sums.means()["loss"])
