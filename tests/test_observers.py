"""What only observes training cannot end it: it is told, and left out."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli import TINY

from rediffuse import drawing, launch
from rediffuse.config.compose import compose
from rediffuse.judging import Proxy
from rediffuse.runs import Run
from rediffuse.tracking.jsonl import read_metrics
from rediffuse.training import committed, hooks

EVERY = (
    "training.images=144",
    "training.log_every_images=48",
    "training.validate_every_images=48",
    "training.preview_every_images=48",
    "training.proxy_every_images=48",
    "training.checkpoint_every_images=48",
    "training.early_stopping_checks=1",
    "training.validation_images=8",
    "sampling.steps=2",
    "data.workers=0",
)


def train(root: Path, *words: str) -> Run:
    run, code = launch.trained(compose([*TINY, *EVERY, *words]), root=root)
    assert code == 0
    return run


def end(run: Run) -> dict[str, bytes]:
    """The weights, average and moments that a run ended with."""
    newest = committed.checkpoints(run.checkpoints)[-1]
    return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}


def metrics(run: Run) -> set[str]:
    return {name for row in read_metrics(run.metrics) for name in row}


def diverge(*_: object) -> Iterator[torch.Tensor]:
    yield torch.full((8, 1, 8, 8), torch.nan)


def fail(*_: object) -> float:
    raise RuntimeError("out of memory\nand more lines")


def test_previews_proxies_and_validations_that_fail_are_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Proxy, "__call__", lambda *_: {"proxy/fd_turns_500": 1.0})
    sound = train(tmp_path / "sound", "training.early_stopping_checks=null")
    assert {"proxy/fd_turns_500", "validation/loss"} < metrics(sound)
    monkeypatch.setattr(Proxy, "__call__", lambda *_: {"proxy/fd_turns_500": torch.nan})
    monkeypatch.setattr(hooks, "validation_loss", fail)
    monkeypatch.setattr(drawing, "states", diverge)
    run = train(tmp_path / "ill", "training.stop_after_images=96")
    told = capfd.readouterr().out
    for images in (48, 96):
        assert re.search(rf"no preview after {images} images: .* pixel values are NaN", told)
        assert f"no proxy after {images} images: ArithmeticError: the distance is not fin" in told
        assert f"no validation loss after {images} images: RuntimeError: out of memory\n" in told
    assert not run.samples.exists()
    run.samples.write_text("a file where the folder should be")
    monkeypatch.undo()
    monkeypatch.setattr(Proxy, "__call__", fail)
    assert launch.resume(run.id, root=tmp_path / "ill") == 0
    told = capfd.readouterr().out
    assert "no preview after 96 images: FileExistsError" in told  # the one that was owed
    assert told.count("no preview after 144 images: FileExistsError") == 1
    assert "no proxy after 144 images: RuntimeError: out of memory\n" in told
    assert run.read().status == "FINISHED"
    assert end(run) == end(sound)


def test_a_best_checkpoint_is_not_chosen_by_what_could_not_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.5])
    monkeypatch.setattr(hooks, "validation_loss", lambda *_: next(found))
    more = ("training.keep_checkpoints=9", "training.proxy_every_images=null")
    run = train(tmp_path, "training.previews=false", *more)
    kept = committed.checkpoints(run.checkpoints)
    measured = ["validation/loss" in committed.facts(c)["metrics"] for c in kept]
    assert measured == [True, False, False]
    assert committed.best(run.checkpoints) == kept[0]


def test_a_look_that_fails_is_told_and_not_called_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def look(images_seen: int, values: object) -> None:
        seen.append(images_seen)
        raise ValueError("no such axis")

    words = ("training.previews=false", "training.proxy_every_images=null")
    config = compose([*TINY, *EVERY, *words])
    run, code = launch.trained(config, root=tmp_path, look=look)
    assert (code, run.read().status, seen) == (0, "FINISHED", [48])
    told = "look failed after 48 images: ValueError: no such axis; not called again\n"
    assert told in capfd.readouterr().out
