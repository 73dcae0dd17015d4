"""N images, the end of the process, and N more are 2N images, bit for bit."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from cli import TINY, content, edit, rediffuse, run_id
from PIL import Image
from safetensors.torch import load_file

from rediffuse import launch
from rediffuse.config.compose import compose
from rediffuse.tracking.journal import is_clocked

# 20 steps of 48 images over an epoch of 216. 432 images are 9 steps, and no log, validation,
# preview or checkpoint of the straight run falls there.
LENGTH, MIDDLE = "training.images=960", "training.stop_after_images=432"
EVERY = (
    "training.log_every_images=144",
    "training.validate_every_images=240",
    "training.preview_every_images=336",
    "training.checkpoint_every_images=400",
    "training.accumulation=3",
    "model.dropout=0.1",
    "data.flip=true",
    "data.crop_padding=1",
)


def straight(root: Path, rate: str) -> str:
    """One process from beginning to end, with previews, a loader thread and a tracker."""
    looks = ("training.previews=true", "data.workers=1", "tracking=tensorboard")
    tiny = [word for word in TINY if word != "tracking=none"]
    return run_id(rediffuse("train", *tiny, *EVERY, *looks, rate, LENGTH, root=root))


def test_stopping_in_mid_epoch_and_resuming_changes_no_bit(tmp_path: Path) -> None:
    golden = straight(tmp_path, "rate=cosine")
    looks = ("training.previews=false", "data.workers=0")
    first = rediffuse("train", *TINY, *EVERY, *looks, "rate=cosine", LENGTH, MIDDLE, root=tmp_path)
    run = run_id(first)
    assert newest(tmp_path, run).name == "step-00000009"
    rediffuse("resume", run[:8], "training.stop_after_images=null", root=tmp_path)
    assert [*(tmp_path / run).rglob("preview-*")] == []  # nor at its end
    assert_same_checkpoint(newest(tmp_path, golden), newest(tmp_path, run))
    assert metrics(tmp_path, golden) == metrics(tmp_path, run)


def test_a_run_made_longer_equals_one_that_was_planned_so(tmp_path: Path) -> None:
    golden = straight(tmp_path, "rate=constant")
    first = rediffuse("train", *TINY, *EVERY, "rate=constant", "training.images=432", root=tmp_path)
    run = run_id(first)
    rediffuse("train", f"resume_from_run_id={run}", LENGTH, root=tmp_path)
    assert_same_checkpoint(newest(tmp_path, golden), newest(tmp_path, run))
    assert metrics(tmp_path, golden) == metrics(tmp_path, run)


def test_a_run_made_longer_with_its_horizon_typed_equals_one_that_was_planned_so(
    tmp_path: Path,
) -> None:
    words = (*TINY, *EVERY, "training.previews=false", "rate=cosine", "rate.horizon_images=960")
    golden = run_id(rediffuse("train", *words, LENGTH, root=tmp_path))
    run = run_id(rediffuse("train", *words, "training.images=432", root=tmp_path))
    rediffuse("resume", run, LENGTH, root=tmp_path)
    assert_same_checkpoint(newest(tmp_path, golden), newest(tmp_path, run))
    assert metrics(tmp_path, golden) == metrics(tmp_path, run)


def test_a_run_made_longer_goes_on_to_learn_as_its_last_line_says(tmp_path: Path) -> None:
    words = (*TINY, "training.previews=false", "rate=cosine", "training.log_every_images=48")
    done = rediffuse("train", *words, "training.images=240", root=tmp_path)
    run = run_id(done)
    assert re.findall("resume  (.*)", done.stdout)[-1] == (
        f"rediffuse resume {run} training.images=480"
    )
    resumed = rediffuse("resume", run, "training.images=480", root=tmp_path)
    assert "changed rate.horizon_images after 240 images: 240, then 480\n" in resumed.stdout
    logged = [row for row in metrics(tmp_path, run) if "learning_rate" in row]
    rates = [row["learning_rate"] for row in logged if row["images"] > 240]
    # Half a cosine from 96 images of warm-up to 480, at 288, 336, ... 480 images.
    falling = [(1 + math.cos(math.pi * (images - 96) / 384)) / 2 for images in range(288, 481, 48)]
    assert rates == pytest.approx([2e-3 * share for share in falling], rel=1e-6)
    shown = json.loads(rediffuse("show", run, "--json", root=tmp_path).stdout)
    assert shown["because"] == ["rate.horizon_images after 240 images: 240, then 480"]
    assert "PASS" in rediffuse("reproduce", run, root=tmp_path).stdout


def test_resume_of_a_run_that_stopped_early_changes_nothing_but_with_more_patience_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # At this rate no weight moves, and only the first validation is a better one.
    still = ("training.learning_rate=1e-30", "training.previews=false", "data.workers=0")
    checked = ("training.validate_every_images=48", "training.validation_images=8")
    patient = "training.early_stopping_checks"
    words = compose([*TINY, *still, *checked, LENGTH, f"{patient}=2"])
    run = launch.trained(words, root=tmp_path)[0].directory

    def resumed(*words: str) -> str:
        assert launch.resume(run.name, words, root=tmp_path) == 0
        return capfd.readouterr().out

    said = capfd.readouterr().out
    assert "no better validation loss in 2 checks at 144 of 960 images" in said
    assert f"resume  rediffuse resume {run.name} {patient}=4" in said
    before = content(tmp_path)
    said = resumed()
    assert "is finished at 144 images (no better validation loss in 2 checks); nothing to" in said
    assert f"to go on: rediffuse resume {run.name} {patient}=4\n" in said
    assert content(tmp_path) == before
    edit(run / "run.json", "FINISHED", "RUNNING")  # it was killed before it had said so
    before = content(run / "checkpoints"), metrics(tmp_path, run.name)
    assert "2 checks at 144 of" in resumed()
    assert "3 checks at 192 of" in resumed(f"{patient}=3")
    assert before[1] == metrics(tmp_path, run.name)[: len(before[1])]
    before = content(run / "checkpoints"), metrics(tmp_path, run.name)
    said = resumed(f"{patient}=null", "training.stop_after_images=96")
    assert "stopped after 96 images, as asked at 192 of" in said
    assert before == (content(run / "checkpoints"), metrics(tmp_path, run.name))


LEARNING = {
    "times, variance and estimates": (
        "times=loss_aware",
        "times.bins=5",
        "times.history=4",
        "objective=hybrid",
        "training.self_conditioning=0.5",
        "training.time_strata=12",
        "training.offset_noise=0.1",
        "pairing=immiscible",
    ),
    "schedule": ("schedule=learned", "training.input_perturbation=0.1"),
    "weighting": (
        "weighting=uncertainty",
        "schedule=edm",
        "target=edm",
        "times=log_normal",
        "grid=karras",
        "pairing=optimal_transport",
        "pairing.block_images=8",
    ),
}


@pytest.mark.parametrize("what", LEARNING)
def test_whatever_else_learns_goes_on_to_the_last_bit_and_can_be_sampled(
    tmp_path: Path, what: str
) -> None:
    words = (*TINY, *EVERY, *LEARNING[what], "training.previews=false", "training.images=624")
    golden = run_id(rediffuse("train", *words, root=tmp_path))
    run = run_id(rediffuse("train", *words, MIDDLE, root=tmp_path))
    rediffuse("resume", run, "training.stop_after_images=null", root=tmp_path)
    assert_same_checkpoint(newest(tmp_path, golden), newest(tmp_path, run))
    assert metrics(tmp_path, golden) == metrics(tmp_path, run)
    for one in (golden, run):
        rediffuse("sample", one, "--n", "8", "--output-dir", str(tmp_path / one[:6]), root=tmp_path)
    drawn = [np.asarray(Image.open(tmp_path / one[:6] / "grid.png")) for one in (golden, run)]
    assert np.array_equal(*drawn)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rate", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("stop", [48, 432, 624])
def test_it_holds_for_every_rate_precision_and_moment(
    tmp_path: Path, rate: str, precision: str, stop: int
) -> None:
    words = (*TINY, *EVERY, f"rate={rate}", f"training.precision={precision}", LENGTH)
    golden = run_id(rediffuse("train", *words, root=tmp_path))
    run = run_id(rediffuse("train", *words, f"training.stop_after_images={stop}", root=tmp_path))
    rediffuse("resume", run, "training.stop_after_images=null", root=tmp_path)
    assert_same_checkpoint(newest(tmp_path, golden), newest(tmp_path, run))
    assert metrics(tmp_path, golden) == metrics(tmp_path, run)


def newest(root: Path, run: str) -> Path:
    return sorted((root / run / "checkpoints").glob("step-*"))[-1]


def metrics(root: Path, run: str) -> list[dict[str, float]]:
    """What was measured; when, how fast and on how busy a machine is no part of it."""
    rows = map(json.loads, (root / run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k == "images" or not is_clocked(k)} for row in rows]


def assert_same_checkpoint(golden: Path, other: Path) -> None:
    assert golden.name == other.name
    names = sorted(file.name for file in golden.glob("*.safetensors"))
    assert names == sorted(file.name for file in other.glob("*.safetensors"))
    for name in names:
        one, two = (load_file(at / name) for at in (golden, other))
        assert one.keys() == two.keys()
        differing = [key for key in one if not one[key].equal(two[key])]
        assert not differing, f"{name}: {differing}"
    assert json.loads((golden / "state.json").read_text()) == json.loads(
        (other / "state.json").read_text()
    )
