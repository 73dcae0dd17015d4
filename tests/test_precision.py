"""`training.precision=auto`, and what becomes of bfloat16 on a processor without units for it."""

import json
from pathlib import Path

import pytest
import torch
from cli import TINY, edit, rediffuse, run_id

from rediffuse import gallery, launch, models
from rediffuse.config.compose import compose
from rediffuse.gallery import Options
from rediffuse.images import prepare
from rediffuse.training import devices
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


def test_a_bfloat16_run_is_sampled_in_float32_where_no_unit_is_for_it_whatever_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the manifest says which it was."""
    monkeypatch.setattr(devices, "_seconds_to_convolve", lambda dtype: pytest.fail("timed"))
    devices.bfloat16_pays.cache_clear()
    words = (*TINY, "training.images=48", "training.previews=false")
    run = tmp_path / run_id(rediffuse("train", *words, root=tmp_path))
    edit(run / "config.yaml", "precision: fp32", "precision: bf16")
    for has, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(models, "has_bfloat16_units", lambda has=has: has)
        out = tmp_path / precision
        gallery.sample(str(run), Options(count=1, device="cpu", output_dir=out))
        manifest = json.loads((out / "manifest.json").read_text())
        assert (manifest["precision"], manifest["threads"]) == (precision, 1)


def test_units_for_bfloat16_are_those_that_the_processor_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for line, has in (
        ("flags\t\t: fpu avx512f avx512_bf16 gfni", True),
        ("flags\t\t: fpu avx2 amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name\t: bf16", False),
    ):
        monkeypatch.setattr(Path, "read_text", lambda file, line=line: f"processor: 0\n{line}\n")
        assert devices.has_bfloat16_units() is has
