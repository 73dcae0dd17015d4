"""Every combination once, with the same noise, whoever kills what."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from cli import TINY, zygote
from PIL import Image

from rediffuse import launch, overview, references, runs
from rediffuse import sweep as door
from rediffuse.config.compose import compose
from rediffuse.errors import ConfigError
from rediffuse.evaluate import Asked, Evaluation
from rediffuse.evaluation.card import Card
from rediffuse.evaluation.figures import Figure
from rediffuse.evaluation.measures import MEASURE
from rediffuse.gallery import Options
from rediffuse.judging import Cost
from rediffuse.runs import Run
from rediffuse.sweep import Axes, Row, front


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    assert launch.train(compose([*TINY, "training.images=480"]), root=root) == 0
    (run,) = runs.list_runs(root)
    return root, run.id


@pytest.fixture(autouse=True)
def little_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "CLASSIFIER_IMAGES", 640)
    monkeypatch.setitem(MEASURE, "kernel_subsets", 3)


def row(evaluations: float, value: float) -> Row:
    evaluations = float(evaluations)
    card = Card(10, {"told": ""}, {"told": ""}, {}, {}, {})
    cost = Cost(evaluations, evaluations / 2, 0.0)
    return Row({}, Evaluation("", (Figure("fd", value, card),), cost, {}))


def test_the_front_holds_what_no_other_combination_beats() -> None:
    rows = [row(10, 5.0), row(20, 3.0), row(20, 4.0), row(40, 3.0), row(80, 1.0), row(5, 5.0)]
    assert front(rows, lambda r: r.evaluations) == [1, 4, 5]


def test_two_equals_are_both_on_the_front() -> None:
    rows = [row(10, 5.0), row(10, 5.0), row(10, 6.0)]
    assert front(rows, lambda r: r.evaluations) == [0, 1]


def test_axes_combine_and_a_solver_may_carry_its_own_steps() -> None:
    axes = Axes(("unipc", "ancestral@50"), (5, 10), ("1", "2"), ("average",))
    found = [(o.solver, o.steps, o.guidance) for o in axes.combinations(Options())]
    assert found == [
        ("unipc", 5, "1"),
        ("unipc", 10, "1"),
        ("unipc", 5, "2"),
        ("unipc", 10, "2"),
        ("ancestral", 50, "1"),
        ("ancestral", 50, "2"),
    ]
    with pytest.raises(ConfigError, match="a number of steps after the @"):
        Axes(("unipc@ten",)).combinations(Options())


def kept(root: Path, run: str) -> dict[str, Any]:
    (file,) = (root / run / "evaluation").glob("sweep-*/sweep.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def figures(sweep: dict[str, Any]) -> list[Any]:
    """Everything but the time that it took."""
    timed = ("seconds_per_1000_images", "fewest_seconds", "cost", "seconds", "created")
    return [{k: v for k, v in cell.items() if k not in timed} for cell in sweep["cells"]]


LITTLE = """
from rediffuse import references
from rediffuse.evaluation import measures
references.CLASSIFIER_IMAGES = 640
measures.MEASURE |= {"kernel_subsets": 3}
"""


def test_a_killed_sweep_draws_only_what_is_missing_and_finds_the_same(
    trained: tuple[Path, str],
) -> None:
    root, run = trained
    words = ("sweep", run, "--solver", "ddim,heun", "--steps", "8,12")
    few = ("--n", "40", "--allow-small-n", "--device", "cpu")
    killed = zygote().start(*words, *few, root=root, before=LITTLE)
    while "1 of 4" not in killed.stderr():
        assert not killed.ends_within(0.02)
    killed.send(signal.SIGKILL)
    killed.wait()
    before = {f: f.stat().st_mtime_ns for f in (root / run / "evaluation").glob("step-*.json")}
    assert 1 <= len(before) < 4
    again = zygote().run(*words, *few, root=root, before=LITTLE, check=0)
    assert all(file.stat().st_mtime_ns == at for file, at in before.items())
    resumed = kept(root, run)
    assert [(c["solver"], c["steps"]) for c in resumed["cells"]] == [
        ("ddim", 8),
        ("ddim", 12),
        ("heun", 8),
        ("heun", 12),
    ]
    assert [cell["evaluations"] for cell in resumed["cells"]] == [8, 12, 15, 23]
    axes = Axes(("ddim", "heun"), (8, 12))
    asked = Asked(allow_small_n=True, again=True)
    assert door.sweep(run, Options(root, count=40, device="cpu"), axes, asked) == 0
    assert figures(kept(root, run)) == figures(resumed)
    (file,) = (root / run / "evaluation").glob("sweep-*/sweep.json")
    assert f"{file.parent.name}: 4 combinations, least" in str(
        overview.evaluations(Run(root / run))
    )
    file.write_text(file.read_text().replace('"evaluations": 8', '"evaluations": 7', 1))
    assert f"{file.parent.name}: damaged" in str(overview.evaluations(Run(root / run)))
    assert "fd_classifier_40" in again.stdout
    with Image.open(next((root / run / "evaluation").glob("sweep-*/sweep.png"))) as picture:
        assert picture.width > 500


def test_what_is_better_when_it_is_more_cannot_rank_a_sweep(trained: tuple[Path, str]) -> None:
    root, run = trained
    with pytest.raises(ConfigError, match="less is better"):
        door.sweep(run, Options(root), Axes(), Asked(metrics=("precision",)))


def test_a_combination_that_cannot_work_is_refused_before_any_is_drawn(
    trained: tuple[Path, str],
) -> None:
    root, run = trained
    before = sorted((root / run).rglob("*"))
    with pytest.raises(ConfigError, match="there is no solver 'hoin'"):
        door.sweep(run, Options(root), Axes(("ddim", "hoin"), (2,)), Asked(allow_small_n=True))
    assert sorted((root / run).rglob("*")) == before
