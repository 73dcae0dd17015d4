"""What `plan` tells is what training then takes."""

import json
from pathlib import Path

import pytest
import torch
from cli import TINY, rediffuse, run_id

from rediffuse import launch
from rediffuse.config.compose import compose
from rediffuse.images import prepare
from rediffuse.plan import forward_flops
from rediffuse.training import memory
from rediffuse.training.devices import Devices


def test_plan_tells_size_speed_length_and_room_and_makes_no_run(tmp_path: Path) -> None:
    words = (*TINY, "training.images=21600", "data.use_labels=false")
    told = json.loads(rediffuse("plan", *words, "--json", root=tmp_path).stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"packed"}
    done = rediffuse("train", *words, "training.stop_after_images=48", root=tmp_path)
    run = tmp_path / run_id(done)
    checkpoint = sum(file.stat().st_size for file in run.glob("checkpoints/step-*/*"))
    assert told["disk_MB"]["checkpoint"] * 1e6 == pytest.approx(checkpoint, rel=0.1)
    assert f"{told['parameters']:,} parameters" in done.stdout
    assert told["length"]["epochs"] == 100
    speed, length = told["speed"]["images_per_s"], told["length"]["hours"]
    assert length == pytest.approx(21600 / speed / 3600)
    assert told["GFLOP_per_image"]["training"] == 3 * told["GFLOP_per_image"]["forward"]


# Forward FLOPs of one image, 2 for a multiplication with its addition; training takes 3 x that.
FLOPS = {
    "digits": 46_071_808,
    "mnist": 554_634_752,
    "fashion_mnist": 554_634_752,
    "cifar10_ddpm": 12_443_713_536,
    "cifar10_edm": 41_095_135_232,
    "flow_cifar10": 12_443_713_536,
    "folder64": 52_508_360_704,
    "imagenet100_64": 52_501_413_888,
}


@pytest.mark.parametrize("experiment", FLOPS)
def test_the_flops_of_a_preset_do_not_drift(experiment: str) -> None:
    words = [f"experiment={experiment}"]
    if experiment == "folder64":
        words.append("data.path=.")
    assert forward_flops(compose(words), num_classes=10) == FLOPS[experiment]


@pytest.mark.parametrize("free", [200e6, 260e6, 10e9])
def test_an_automatic_batch_is_the_largest_power_of_two_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float
) -> None:
    monkeypatch.setattr(launch, "free_bytes", lambda device: int(free))
    config = compose([*TINY, "training.images=480", "training.batch_size=auto"])
    devices = Devices(torch.device("cpu"))
    images = prepare(config.data, tmp_path)
    size = launch.settled(config, images, devices).training.batch_size
    state, recipe = launch.fresh(launch.settled(config, images, devices), images, devices)
    wanted = memory.estimated(state, recipe, launch.few(images, devices, 2))
    assert size & (size - 1) == 0
    assert wanted.total(size) <= 0.8 * free
    assert wanted.total(2 * size) > 0.8 * free or 2 * size > images.per_epoch


def test_where_nothing_fits_an_automatic_batch_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "free_bytes", lambda device: 10**6)
    config = compose([*TINY, "training.images=480", "training.batch_size=auto"])
    images = prepare(config.data, tmp_path)
    with pytest.raises(launch.ConfigError, match="not one image fits"):
        launch.settled(config, images, Devices(torch.device("cpu")))


def test_an_automatic_batch_is_written_down_as_a_number(tmp_path: Path) -> None:
    words = (*TINY, "training.images=256", "training.batch_size=auto", "training.previews=false")
    words = tuple(word for word in words if word != "training.batch_size=48")
    shown = rediffuse("train", *words, "--show-config", root=tmp_path).stdout
    assert "batch_size: auto" in shown
    run = tmp_path / run_id(rediffuse("train", *words, root=tmp_path))
    assert "batch_size: 128" in (run / "config.yaml").read_text()  # an epoch has 216 images
    refused = rediffuse("resume", run.name, "training.batch_size=auto", root=tmp_path, check=2)
    assert "a run that has begun needs a number" in refused.stderr


def test_a_profile_is_written_beside_the_metrics(tmp_path: Path) -> None:
    words = (*TINY, "training.images=480", "training.previews=false", "profile=true")
    done = rediffuse("train", *words, root=tmp_path)
    logs = tmp_path / run_id(done) / "logs"
    assert "first step done" in done.stdout
    assert (logs / "trace.json").read_text().count('"Optimizer.step#AdamW.step"') == 5
    assert "aten::convolution_backward" in (logs / "profile.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [16, 64, 256])
def test_the_memory_that_is_estimated_is_taken_to_20_percent(tmp_path: Path, batch: int) -> None:
    words = ("model=unet_small", "data.image_size=32", "model.attention_resolutions=[16]")
    told = rediffuse("plan", *words, f"training.batch_size={batch}", "--json", root=tmp_path)
    found = json.loads(told.stdout)["memory_MB"]
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.2)
