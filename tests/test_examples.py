"""The examples, run as their first lines say, on a run small enough to wait for."""

import re
from pathlib import Path

import numpy as np
import pytest
from cli import TINY, rediffuse, run_id, zygote
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    return root, run_id(rediffuse("train", *TINY, "training.images=480", root=root))


def example(name: str, *words: str, root: Path) -> str:
    file = str(EXAMPLES / f"{name}.py")
    run = f"""
import runpy, sys
sys.argv = {[file, *words]}
runpy.run_path({file!r}, run_name="__main__")
raise SystemExit(0)
"""
    return zygote().run(root=root, before=run, check=0).stdout


@pytest.mark.slow  # what test_toy.py has, in a script
def test_the_toy_learns_its_points(tmp_path: Path) -> None:
    said = example("toy", root=tmp_path)
    assert float(re.search(r"([\d.]+)% of the points", said)[1]) >= 95  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "rows", "columns", "lines"),
    [("sampling", 5, 10, 5), ("guidance", 4, 10, 4), ("inpainting", 4, 8, 0)],
)
def test_an_example_draws_its_picture(
    trained: tuple[Path, str], name: str, rows: int, columns: int, lines: int
) -> None:
    root, run = trained
    said = example(name, run[:6], f"{name}.png", root=root).splitlines()
    assert said[-1] == f"{name}.png"
    assert len(said) == lines + 1
    picture = np.asarray(Image.open(root / f"{name}.png"))
    assert picture.shape == (34 * rows - 2, 34 * columns - 2)


def test_the_likelihood_of_images_that_were_held_out(trained: tuple[Path, str]) -> None:
    root, run = trained
    said = example("likelihood", run, "8", root=root)
    figures = [float(figure) for figure in re.findall(r"-?\d+\.\d+", said)]
    total, prior, chain, decoder, ode = figures
    assert total == pytest.approx(prior + chain + decoder, abs=2e-3)
    assert 0 < ode < 12


def test_every_example_is_tested() -> None:
    tested = {"toy", "sampling", "guidance", "inpainting", "likelihood"}
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tested
