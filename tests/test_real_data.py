"""The presets on real images; skipped where they are not at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import rediffuse, run_id

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "unpack.py"
SMALL = ("tracking=none", "threads=1", "training.preview_count=4", "sampling.steps=2")
LENGTH = ("training.epochs=null", "training.images=256", "training.batch_size=64")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.exists(), reason="no real data sets in ../shared/data"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(SHARED), str(folder)], check=True, env={**os.environ})
    return folder


def test_mnist_trains_from_its_idx_files(data: Path, tmp_path: Path) -> None:
    words = ("experiment=mnist", f"data.root={data}", *SMALL, *LENGTH)
    run = run_id(rediffuse("train", *words, root=tmp_path))
    assert len(list((tmp_path / run / "checkpoints").glob("step-*"))) == 1


def test_a_folder_of_classes_trains_with_the_preset_for_own_images(
    data: Path, tmp_path: Path
) -> None:
    words = ("data=folder", f"data.path={data / 'cifar10-jpg' / 'test'}", "data.image_size=16")
    small = ("model=unet_small", "model.attention_resolutions=[4]")
    run = run_id(rediffuse("train", *words, *small, *SMALL, *LENGTH, root=tmp_path))
    done = rediffuse("sample", run[:8], "--n", "2", "--class", "frog", root=tmp_path)
    assert "2 images" in done.stdout
