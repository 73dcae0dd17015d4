"""`training.precision=auto`, and what becomes of bfloat16 on a processor without units for it."""

from pathlib import Path

import pytest
import torch
from cli import TINY, edit, rediffuse, run_id

from rediffuse import launch, models
from rediffuse.config.compose import compose
from rediffuse.images import prepare
from rediffuse.training.devices import Devices

CPU = Devices(torch.device("cpu"))


@pytest.mark.parametrize(("pays", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bfloat16_where_it_pays_and_writes_down_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pays: bool, precision: str
) -> None:
    monkeypatch.setattr(launch, "bfloat16_pays", lambda device: pays)
    config = compose([*TINY, "training.images=480", "training.precision=auto"])
    settled = launch.settled(config, prepare(config.data, tmp_path), CPU)
    assert settled.training.precision == precision


def test_bfloat16_is_kept_where_it_was_chosen_and_is_slow_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "bfloat16_pays", lambda device: False)
    config = compose([*TINY, "training.images=480", "training.precision=bf16"])
    settled = launch.settled(config, prepare(config.data, tmp_path), CPU)
    assert settled.training.precision == "bf16"
    assert "training.precision=auto would take fp32" in capsys.readouterr().err


def test_a_bfloat16_run_is_sampled_in_float32_where_bfloat16_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*TINY, "training.images=48", "training.previews=false")
    run = tmp_path / run_id(rediffuse("train", *words, root=tmp_path))
    edit(run / "config.yaml", "precision: fp32", "precision: bf16")
    for pays, precision in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(models, "bfloat16_pays", lambda device, pays=pays: pays)
        assert models.load(run, device="cpu").precision is precision
