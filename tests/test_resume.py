"""N images, the end of the process, and N more are 2N images, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli import TINY, rediffuse, run_id
from safetensors.torch import load_file

# 20 steps of 48 images over an epoch of 216; 432 images are 9 steps, in the middle of the third epoch's
# second day: no epoch, log, validation or checkpoint of the straight run ends there.
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


@pytest.fixture(scope="module", params=["constant", "cosine"])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp(request.param)
    rate = f"rate={request.param}"
    run = run_id(rediffuse("train", *TINY, *EVERY, rate, LENGTH, root=root))
    return root, rate, run


@pytest.mark.parametrize(
    "looks",
    [("training.previews=true", "data.workers=1"), ("training.previews=false", "data.workers=0")],
)
def test_stopping_in_mid_epoch_and_resuming_changes_no_bit(
    straight: Any, looks: tuple[str, str]
) -> None:
    root, rate, golden = straight
    first = rediffuse("train", *TINY, *EVERY, rate, LENGTH, MIDDLE, *looks, root=root)
    run = run_id(first)
    assert newest(root, run).name == "step-00000009"
    rediffuse("resume", run[:8], "training.stop_after_images=null", root=root)
    assert_same_checkpoint(newest(root, golden), newest(root, run))
    assert metrics(root, golden) == metrics(root, run)


def test_a_run_extended_beyond_its_plan_equals_one_planned_so_at_a_constant_rate(
    straight: Any,
) -> None:
    root, rate, golden = straight
    half = "training.images=480"
    if (
        rate == "rate=cosine"
    ):  # its horizon was the shorter plan; the longer one is declared from the start
        half += " rate.horizon_images=960"
    run = run_id(rediffuse("train", *TINY, *EVERY, rate, *half.split(), root=root))
    rediffuse("train", f"resume_from_run_id={run}", LENGTH, root=root)
    assert_same_checkpoint(newest(root, golden), newest(root, run))


def newest(root: Path, run: str) -> Path:
    return sorted((root / run / "checkpoints").glob("step-*"))[-1]


def metrics(root: Path, run: str) -> list[dict[str, float]]:
    """What was measured; when, and how fast, is no part of it."""
    rows = map(json.loads, (root / run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in {"time", "images_per_s"}} for row in rows]


def assert_same_checkpoint(golden: Path, other: Path) -> None:
    assert golden.name == other.name
    for name in ("model", "average", "optimizer"):
        one, two = (load_file(at / f"{name}.safetensors") for at in (golden, other))
        assert one.keys() == two.keys()
        differing = [key for key in one if not one[key].equal(two[key])]
        assert not differing, f"{name}: {differing}"
    assert json.loads((golden / "state.json").read_text()) == json.loads(
        (other / "state.json").read_text()
    )
