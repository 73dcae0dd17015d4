"""Figures that come with their protocol, from a run or from folders, without a network around."""

import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import TINY
from PIL import Image

from rediffuse import (
    cli,
    drawing,
    drift,
    gallery,
    launch,
    likelihoods,
    overview,
    references,
    runs,
    session,
)
from rediffuse import evaluate as door
from rediffuse.config.compose import compose
from rediffuse.drawing import Job, share
from rediffuse.errors import ConfigError, DataError, RunError
from rediffuse.evaluate import Asked, Evaluation
from rediffuse.evaluation.card import Card
from rediffuse.evaluation.digests import add_digest, check_digest, read_report
from rediffuse.evaluation.features import Seen
from rediffuse.evaluation.figures import Figure, Floor, with_n
from rediffuse.evaluation.measures import MEASURE
from rediffuse.gallery import Options
from rediffuse.images import of_run
from rediffuse.judging import Study, in_chunks, rows_of_classes
from rediffuse.models import load
from rediffuse.randomness import Stream, normal
from rediffuse.references import Real
from rediffuse.report.evaluations import evaluations
from rediffuse.tracking.jsonl import append_metrics, read_metrics
from rediffuse.training import committed
from rediffuse.words import json_text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    assert launch.train(compose([*TINY, "training.images=480"]), root=root) == 0
    (run,) = runs.list_runs(root)
    return root, run.id


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody may connect to anything, nor try to."""
    tried = []

    def refuse(*where: Any) -> None:
        tried.append(where)
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried


@pytest.fixture(autouse=True)
def little_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "CLASSIFIER_IMAGES", 640)
    monkeypatch.setitem(MEASURE, "kernel_subsets", 3)


def evaluated(trained: tuple[Path, str], **how: Any) -> Evaluation:
    """What `rediffuse evaluate` keeps."""
    root, run = trained
    asked = Asked(allow_small_n=True, again=how.pop("again", False))
    options = Options(root, **{"count": 40, "steps": 2, **how})
    before = set((root / run / "evaluation").glob("*.json"))
    assert door.evaluate(run, options, asked) == 0
    files = set((root / run / "evaluation").glob("*.json"))
    new = (files - before) or files
    return door.read_evaluation(max(new, key=lambda f: f.stat().st_mtime_ns))


CARD = Card(
    10_000,
    {"told": "drawn", "sampling": {"solver": {"name": "heun"}, "steps": 18}, "seed": 0},
    {"told": "train", "fingerprint": "ab", "images": 57_000},
    {"classifier": {"digest": "cd", "resize": "none"}},
    {"jackknife_groups": 20},
    {"torch": "2"},
)
FIGURE = Figure(
    "fd_classifier",
    3.25,
    CARD,
    standard_error=0.25,
    floor=Floor(1.5, 10_000, "test against train", 0.125),
)


def leaves(facts: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(facts, dict):
        return [path]
    return [leaf for key, value in facts.items() for leaf in leaves(value, (*path, key))]


def test_a_change_of_any_field_of_a_card_changes_its_digest() -> None:
    digests = {CARD.digest}
    paths = leaves(CARD.as_json())
    for path in paths:
        told = json.loads(json.dumps(CARD.as_json()))
        place = told
        for key in path[:-1]:
            place = place[key]
        was = place[path[-1]]
        place[path[-1]] = was + 1 if isinstance(was, int) else "another"
        digests.add(Card(**told).digest)
    assert len(digests) == len(paths) + 1


def test_a_card_has_one_digest_whatever_the_order_of_its_keys() -> None:
    turned = replace(CARD, samples=dict(reversed(CARD.samples.items())))
    assert turned.digest == CARD.digest


def test_a_card_with_integer_keys_has_the_same_digest_after_json() -> None:
    card = replace(CARD, samples={"per_class": {2: 5, 10: 5}})
    assert Card(**json.loads(json.dumps(card.as_json()))).digest == card.digest


def test_the_card_of_a_figure_with_maskable_facts_is_read_as_it_was_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this environment and in any later one."""
    monkeypatch.setenv("DB_PASSWORD", "training")
    samples = {"told": "training", "classes": ["token=abc", "cat"], "api_key": "x"}
    card = replace(CARD, samples=samples).masked()
    figure = replace(FIGURE, card=card)
    kept = json.loads(json_text(add_digest({"figures": [figure.as_json()]})))
    assert kept["figures"][0]["card"]["samples"] == {
        "told": "***", "classes": ["token=***", "cat"], "api_key": "***",
    }  # fmt: skip
    for later in ("training", "classifier"):
        monkeypatch.setenv("DB_PASSWORD", later)
        assert check_digest(kept)
        assert Figure.from_json(kept["figures"][0]) == figure


def test_an_evaluation_whose_card_holds_a_secret_is_read_as_it_was_kept(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each card names the run; here a password is the same word."""
    root, run = trained
    monkeypatch.setenv("DB_PASSWORD", run)
    asked = Asked(allow_small_n=True, likelihood=2)
    before = set((root / run / "evaluation").glob("*.json"))
    monkeypatch.setattr(likelihoods, "BOUND_STEPS", 2)
    monkeypatch.setattr(likelihoods, "ODE_STEPS", 2)
    assert door.evaluate(run, Options(root, count=40, steps=2, seed=17), asked) == 0
    files = set((root / run / "evaluation").glob("*.json")) - before
    assert len(files) == 2
    for file in files:
        assert run not in file.read_text()
        assert door.read_evaluation(file).verified


def test_a_figure_is_neither_printed_nor_kept_without_its_card() -> None:
    with pytest.raises(TypeError):
        Figure("fid", 3.0)  # type: ignore[call-arg]
    for printed in (str(FIGURE), repr(FIGURE), f"{FIGURE}"):
        assert "drawn" in printed
        assert "train" in printed
    assert CARD.digest in str(FIGURE)
    told = FIGURE.as_json()
    assert Card(**{k: v for k, v in told["card"].items() if k != "digest"}) == CARD


def test_a_figure_is_read_as_it_was_kept_and_never_with_another_card() -> None:
    told = json.loads(json.dumps(FIGURE.as_json()))
    assert Figure.from_json(told) == FIGURE
    told["card"]["samples"]["seed"] = 1
    with pytest.raises(ValueError, match="not the one it was made with"):
        Figure.from_json(told)


def test_n_is_in_every_name() -> None:
    assert [with_n("fid", n) for n in (50_000, 2048, 500)] == ["fid_50k", "fid_2048", "fid_500"]


def test_chunks_are_the_same_whatever_the_batches() -> None:
    images = np.arange(23, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    for sizes in (1, 5, 8, 23):
        batches = [images[k : k + sizes] for k in range(0, 23, sizes)]
        chunks = list(in_chunks(batches, 8))
        assert [len(chunk) for chunk in chunks] == [8, 8, 7]
        assert np.array_equal(np.concatenate(chunks), images)


@pytest.mark.parametrize("count", [1, 64, 130, 512])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_whole_chunks_in_order(count: int, ranks: int) -> None:
    job = Job(tuple(range(5, 5 + count)), tuple(j % 10 for j in range(count)))
    parts = [share(job, rank, ranks, 64) for rank in range(ranks)]
    assert sum((part.images for part in parts), ()) == job.images
    assert sum((part.classes or () for part in parts), ()) == job.classes
    assert all(len(part.images) % 64 == 0 for part in parts[:-1])
    assert max(len(part.images) for part in parts) - min(len(part.images) for part in parts) <= 64


def test_a_floor_takes_the_first_real_images_with_as_many_of_each_class() -> None:
    labels, classes = torch.tensor([0, 0, 1, 2, 1, 2, 0, 1, 2, 2]), torch.tensor([2, 1, 2, 0])
    rows = rows_of_classes(labels, classes)
    assert rows is not None
    assert rows.tolist() == [0, 2, 3, 5]
    assert rows_of_classes(labels, torch.tensor([0, 0, 0, 0])) is None  # there are but three
    assert rows_of_classes(None, classes) is rows_of_classes(labels, None) is None


class Projections:
    """Six fixed projections of the pixels: features that need no training."""

    name, digest = "projections", "0"
    facts: dict[str, Any] = {}  # noqa: RUF012  # as the protocol has it

    def __call__(self, pixels: torch.Tensor) -> Seen:
        x = pixels.flatten(1).float() / 255
        directions = normal(0, Stream.EVALUATION, torch.arange(6), (x.shape[1],))
        return Seen(x @ directions.T)


def digits_study(trained: tuple[Path, str], sizes: dict[str, int]) -> tuple[Study, list[Real]]:
    """A study of digits against `train`, and the digits in parts of these sizes."""
    root, run = trained
    found = runs.find_run(root, run)
    packed = of_run(found, load(run, root=root).config.data, ()).packed
    every, parts, start = references.whole(packed, "train"), [], 0
    for name, size in sizes.items():
        parts.append(every.some(slice(start, start + size), name))
        start += size
    known = {part.what: part for part in parts if part.what != "fresh"}
    return Study(root, known, "train", [Projections()], lambda line: None), parts


def test_a_floor_is_of_as_many_images_against_as_many_or_there_is_none(
    trained: tuple[Path, str],
) -> None:
    """Also where halves of what is held against would be large enough: they are other sizes."""
    study, _ = digits_study(trained, {"train": 900, "held-out": 250, "test": 150})
    for n, what in ((250, "held-out"), (400, "held-out and test")):
        floors = study._floors_at(study.networks[0], n, None)
        assert floors["fd_projections"].n == n
        assert floors["fd_projections"].what == f"{what} images against 900 train ones"
        assert study.no_floor(n, None) is None
    for n, classes in ((401, None), (60, torch.zeros(60, dtype=torch.long))):
        assert study._floors_at(study.networks[0], n, classes) == {}
        assert f"it takes {n} real images" in str(study.no_floor(n, classes))
        assert "there are 250 held-out, 150 test" in str(study.no_floor(n, classes))


def test_a_perfect_model_is_at_its_floor(trained: tuple[Path, str]) -> None:
    """Real images that nobody has seen score what the floor says, within the standard errors."""
    study, parts = digits_study(trained, {"train": 900, "held-out": 400, "fresh": 400})
    fresh = Projections()(torch.from_numpy(parts[-1].part.images[parts[-1].rows]))
    figures = study.figures({"projections": fresh}, study.card(400, {"told": "fresh"}))
    assert {figure.name for figure in figures} >= {"fd_projections", "kd_projections"}
    for figure in figures:
        assert figure.floor
        assert figure.standard_error
        assert figure.floor.standard_error
        apart = abs(figure.value - figure.floor.value)
        assert apart < 3.5 * math.hypot(figure.standard_error, figure.floor.standard_error)


def test_an_evaluation_without_a_floor_says_why(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(trained, seed=11, class_name="3", count=400)
    told = " ".join(capsys.readouterr().out.split())
    assert not any(figure.floor for figure in found.figures)
    assert "floor none: it takes 400 real images, as many of each class" in told
    assert "± standard error over samples of the same model, at this n" in told


def test_an_evaluation_tells_the_same_whatever_the_batch_size(trained: tuple[Path, str]) -> None:
    found = [evaluated(trained, batch_size=size, again=True) for size in (40, 7)]
    assert found[0].figures == found[1].figures
    assert found[0].key == found[1].key


def test_floors_are_of_the_classes_that_are_drawn(trained: tuple[Path, str]) -> None:
    found = evaluated(trained, count=40)
    told = {figure.floor.what for figure in found.figures if figure.floor}
    assert told == {"held-out images against 216 train ones, as many of each class"}


def test_evaluations_count_what_the_network_was_asked(trained: tuple[Path, str]) -> None:
    """Heun asks twice at every step but the last; guidance asks about each image twice."""
    for solver, guidance, asked in (("ddim", "1", 3), ("heun", "2", 2 * 5)):
        cost = evaluated(trained, solver=solver, steps=3, guidance=guidance).cost
        assert cost
        assert cost.evaluations == asked


def test_evaluations_are_those_of_batches_that_were_filled_up(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_fixed_rows", lambda model: None)  # as if compiled on a GPU
    monkeypatch.setattr(drawing, "_whole", lambda model: True)
    cost = evaluated(trained, solver="ddim", steps=3, batch_size=32, guidance="1", seed=7).cost
    assert cost
    assert cost.evaluations == 3


def test_a_weaker_guide_is_counted_too(trained: tuple[Path, str]) -> None:
    cost = evaluated(trained, solver="ddim", steps=3, guidance="2", guide_by="latest").cost
    assert cost
    assert cost.evaluations == 2 * 3


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (Asked(metrics=("cas",)), "needs --cas"),
        (Asked(metrics=("bits",)), "needs --likelihood N"),
        (Asked(metrics=("fd",), features=("inception",)), "never Inception's"),
        (Asked(metrics=("agreement",), features=("inception",)), "the classifier's"),
    ],
)
def test_metrics_that_nothing_would_find_are_refused(asked: Asked, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        door.check_metrics(asked)


def test_what_was_found_before_is_told_and_not_drawn_again(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluated(trained, seed=3)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(door, "drawn", refuse)
    assert evaluated(trained, seed=3) == first
    told = capsys.readouterr().out
    assert "fd_classifier_40" in told
    assert first.figures[0].card.digest in told
    with pytest.raises(AssertionError, match="drawn again"):
        evaluated(trained, seed=4)
    with pytest.raises(AssertionError, match="drawn again"):
        evaluated(trained, seed=3, steps=3)


def test_figures_are_metrics_of_the_run_and_shown_with_it(trained: tuple[Path, str]) -> None:
    root, run = trained
    found = evaluated(trained, seed=5)
    rows = [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]
    name = "evaluation/fd_classifier_40/dpmpp_2m-2-g1-seed5-average"
    assert rows[-1][name] == found.figures[0].value
    assert rows[-1]["images"] == 480
    facts = overview.full(runs.find_run(root, run))
    assert any("fd_classifier_40" in line for line in facts["evaluations"])


def test_an_evaluation_of_a_killed_run_outlives_a_torn_line_and_the_resumption(
    tmp_path: Path,
) -> None:
    words = [*TINY, "training.images=480", "training.log_every_images=48"]
    config = compose([*words, "training.stop_after_images=240"])
    assert launch.train(config, root=tmp_path) == 0
    (run,) = runs.list_runs(tmp_path)
    append_metrics(run.metrics, {"loss": 0.5}, 288)  # trained after the newest checkpoint
    with run.metrics.open("ab") as file:
        file.write(b'{"images": 336, "ti')
    found = Evaluation("ab", (FIGURE,), None, {"way": "heun-18-g1-average", "images_seen": 240})
    door.record(run, config, [found])
    assert overview.brief(run)["status"] == "FINISHED"
    assert launch.resume(run.id, root=tmp_path) == 0
    rows = read_metrics(run.metrics)
    assert [row["images"] for row in rows if found.metrics().items() <= row.items()] == [240]
    assert [row["images"] for row in rows if "loss" in row] == [*range(48, 481, 48)]


class Tracker:
    """A tracker in memory, which refuses everything while it is away."""

    name = "wandb"
    away = False

    def __init__(self, *place: Any) -> None:
        self.rows: list[tuple[float, set[str]]] = []

    def open(self, params: dict[str, Any]) -> str:
        if self.away:
            raise ConnectionError("no route to host")
        return "everything"

    def metrics(self, rows: list[dict[str, float]]) -> None:
        self.rows += [(row["images"], row.keys() - {"images", "time"}) for row in rows]

    def artifact(self, *file: Any) -> None:
        """Take it."""

    def close(self, status: str) -> None:
        """End the run."""


def test_an_evaluation_that_a_tracker_missed_is_sent_by_any_later_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(session._TRACKERS, "wandb", lambda *place: tracker)
    words = [word for word in TINY if word != "tracking=none"]
    words += ["tracking.trackers=[wandb]", "training.images=96", "training.previews=false"]
    config = compose(words)
    assert launch.train(config, root=tmp_path) == 0
    (run,) = runs.list_runs(tmp_path)
    drawn = ["sample", run.id, "--n", "1", "--root", str(tmp_path)]
    again: list[Callable[[Evaluation], Any]] = [
        lambda found: launch.resume(run.id, root=tmp_path),
        lambda found: door.record(run, config, [found]),
        lambda found: cli.rediffuse.main(drawn, standalone_mode=False),
    ]
    for number, send in enumerate(again):
        facts = {"way": f"way-{number}", "images_seen": 48}
        found = Evaluation("ab", (FIGURE,), None, facts)
        tracker.away, tracker.rows = True, []
        door.record(run, config, [found])
        assert tracker.rows == []
        assert "sends the rest" in capfd.readouterr().err
        tracker.away = False
        for _ in range(2):
            send(found)
        assert tracker.rows == [(48, {*found.metrics()})]


def newest(trained: tuple[Path, str]) -> Path:
    root, run = trained
    return max((root / run / "evaluation").glob("*.json"), key=lambda f: f.stat().st_mtime_ns)


@pytest.mark.parametrize("name", ["value", "seconds"])
def test_a_changed_digit_of_an_evaluation_is_noticed_by_every_reader(
    trained: tuple[Path, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluated(trained, seed=8, again=True)
    file = newest(trained)

    def another(found: re.Match[str]) -> str:
        return found[1] + ("2" if found[2] == "1" else "1")

    changed, count = re.subn(rf'("{name}": -?)([0-9])', another, file.read_text())
    assert count
    file.write_text(changed)
    with pytest.raises(ValueError, match="changed after it was written"):
        door.read_evaluation(file)
    (line,) = (line for line in overview.evaluations(run_of(trained)) if file.stem in line)
    assert "damaged (it was changed after it was written" in line
    figures, notes = evaluations(file.parent)
    assert not [figure for figure in figures if figure.file == file.name]
    assert any(file.name in note and "changed after" in note for note in notes)
    assert evaluated(trained, seed=8).figures == first.figures
    assert f"{file.name} is damaged" in capsys.readouterr().err


def test_an_evaluation_without_a_digest_is_read_and_called_unverified(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As versions before the digest wrote them."""
    first = evaluated(trained, seed=9)
    file = newest(trained)
    facts = json.loads(file.read_text())
    del facts["sha256"]
    file.write_text(json.dumps(facts))
    found = evaluated(trained, seed=9)
    assert found.figures == first.figures
    assert "values  unverified" in capsys.readouterr().out
    assert not door.read_evaluation(file).verified
    (line,) = (line for line in overview.evaluations(run_of(trained)) if file.stem in line)
    assert "fd_classifier_40" in line
    assert "unverified" in line
    assert any(file.name in note and "unverified" in note for note in evaluations(file.parent)[1])


def run_of(trained: tuple[Path, str]) -> runs.Run:
    return runs.find_run(*trained)


def test_the_digest_is_over_every_value_and_any_order_of_keys() -> None:
    facts = {"a": [1, {"b": 0.1}], "c": None, "d": math.inf}
    kept = json.loads(json.dumps(add_digest(facts)))
    assert check_digest(dict(reversed(kept.items())))
    assert not check_digest({"a": 1})
    for changed in ({"a": [1, {"b": 0.2}]}, {"c": 0}, {"e": 1}, {"sha256": "0" * 64}):
        with pytest.raises(ValueError, match="changed after"):
            check_digest({**kept, **changed})


def test_a_report_with_integer_keys_fits_its_digest_after_it_was_read(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json_text(add_digest({"counts": {2: 1, 10: 1}, "folder": tmp_path})))
    found, verified = read_report(file)
    assert verified
    assert found == {"counts": {"2": 1, "10": 1}, "folder": str(tmp_path)}


def test_damaged_references_and_evaluations_are_made_anew(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    first = evaluated(trained, seed=6)
    for file in (root / "evaluation").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    for file in (root / run / "evaluation").glob("*.json"):
        file.write_text(file.read_text()[:-9])
    again = evaluated(trained, seed=6)
    assert again.figures == first.figures
    said = capsys.readouterr().err
    assert "is damaged (its SHA-256 differs); made anew" in said
    assert "evaluated anew" in said


@pytest.mark.parametrize(
    ("options", "asked", "error", "says"),
    [
        ({"count": 40}, Asked(), ConfigError, "too few to be judged through classifier"),
        ({"class_name": "cat"}, Asked(), ConfigError, "class 'cat': there is none"),
        ({}, Asked(metrics=("fdi",)), ConfigError, "--metric fdi: there is none; did you mean fd"),
        ({}, Asked(features=("/no/such",)), ConfigError, "/no/such|transformers"),
        ({}, Asked(against="tset"), ConfigError, "--against tset: there are train"),
        ({"solver": "hoin"}, Asked(), ConfigError, "there is no solver 'hoin'"),
        ({"guide_by": "9"}, Asked(), ConfigError, "--guide-by needs --guidance"),
    ],
)
def test_what_cannot_be_judged_is_refused_and_leaves_nothing(
    trained: tuple[Path, str],
    options: dict[str, Any],
    asked: Asked,
    error: type[Exception],
    says: str,
) -> None:
    root, run = trained
    before = sorted((root / run).rglob("*"))
    with pytest.raises(error, match=says):
        door.evaluate(run, Options(root, **options), asked)
    assert sorted((root / run).rglob("*")) == before


def test_without_its_weights_fid_is_refused_with_what_to_do(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = trained
    offline = partial(references.find_weights, download=False)
    monkeypatch.setattr(references, "find_weights", offline)
    for asked in (Asked(metrics=("fid",)), Asked(features=("inception",))):
        with pytest.raises(ConfigError, match=r"put it at .*/evaluation/inception/pt_inception"):
            door.evaluate(run, Options(root), asked)


# Given images


def squares(folder: Path, count: int, size: int = 8, suffix: str = "png", seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed).integers(0, 256, (count, size, size), np.uint8)
    for k, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{k:03d}.{suffix}")
    return folder


def given(images: object, reference: object, root: Path, size: int | None = None) -> int:
    asked = Asked(allow_small_n=True)
    return door.evaluate_given(str(images), str(reference), size, root, asked)


def test_equal_folders_are_no_distance_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("a", "b"):
        for name in ("ones", "twos"):
            squares(tmp_path / side / name, 30, seed=len(name))
    assert given(tmp_path / "a", tmp_path / "b", tmp_path / "root") == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert float(rows["fd_classifier_60"]) < 1e-6
    assert float(rows["grey_distance_60"]) == 0
    assert float(rows["precision_classifier_60"]) == 1


def test_a_sampling_job_is_judged_with_its_classes_and_without_its_grid(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    gallery.sample(run, Options(root, count=24, steps=2, output_dir=tmp_path / "job"))
    (packed,) = (root / "packed").glob("digits-*")
    assert given(tmp_path / "job", f"{packed}:train", root) == 0
    told = capsys.readouterr().out
    assert "agreement_classifier_24" in told


def test_jpeg_files_are_named_on_the_card_and_in_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = squares(tmp_path / "a", 24, suffix="jpg"), squares(tmp_path / "b", 24)
    assert given(a, b, tmp_path / "root") == 0
    out, err = capsys.readouterr()
    assert "JPEG files; what compression did to them is in every figure" in err
    assert "JPEG files among them" in out


def test_a_jpeg_file_with_a_second_picture_is_told_as_jpeg(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = squares(tmp_path / "a", 24), squares(tmp_path / "b", 24)
    grey = Image.new("RGB", (8, 8))
    grey.save(a / "000.png", "MPO", save_all=True, append_images=[grey])
    assert given(a, b, tmp_path / "root") == 0
    assert "JPEG files; what compression did to them is in every figure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda place: place / "none", "there is no such folder"),
        (lambda place: squares(place / "empty", 0), "holds no PNG, JPEG, .* files"),
        (lambda place: squares(place / "large", 4, size=9), "has 9x9.*--size N brings all to N"),
        (lambda place: f"{place / 'b'}:test", "only a packed data set has parts"),
        (lambda place: "~nobody-of-this-name/a", "there is no such folder"),
        (lambda place: "a\0b", "there is no such folder"),
    ],
)
def test_given_images_that_cannot_be_compared_are_refused(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    b = squares(tmp_path / "b", 24)
    with pytest.raises(DataError, match=says):
        given(make(tmp_path), b, tmp_path / "root")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda file: file.write_bytes(b"nothing"),
        lambda file: os.mkfifo(file),
        lambda file: file.symlink_to(file.name),
        lambda file: file.symlink_to("/dev/zero"),
    ],
)
def test_a_file_that_is_no_image_is_named_and_never_waited_for(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    a, b = squares(tmp_path / "a", 24), squares(tmp_path / "b", 24)
    (a / "003.png").unlink()
    make(a / "003.png")
    with pytest.raises(DataError, match=r"a/003\.png cannot be used"):
        given(a, b, tmp_path / "root")


def test_images_of_another_size_are_compared_where_a_size_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = squares(tmp_path / "a", 24, size=16), squares(tmp_path / "b", 24)
    assert given(a, b, tmp_path / "root", size=8) == 0
    assert "grey_distance_24" in capsys.readouterr().out


def test_a_run_whose_images_have_changed_is_not_judged_by_others(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = drift.began

    def changed(run: Any) -> dict[str, Any]:
        facts = began(run)
        return {**facts, "data": {**facts["data"], "fingerprint": "other"}}

    monkeypatch.setattr(drift, "began", changed)
    with pytest.raises(RunError, match="not those that run"):
        evaluated(trained)


def test_what_is_kept_depends_on_all_of_its_facts(tmp_path: Path) -> None:
    def keep(facts: dict[str, Any], value: float) -> float:
        made = {"x": torch.tensor([value])}
        found = references.kept_or_made(tmp_path / "file", facts, lambda: made, lambda line: None)
        return float(found["x"])

    assert keep({"a": 1}, 1.0) == 1.0
    assert keep({"a": 1}, 2.0) == 1.0
    assert keep({"a": 2}, 3.0) == 3.0


def test_a_proxy_changes_no_weight_and_can_choose_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, "training.images=192", "training.checkpoint_every_images=48"]
    proxy = [
        "training.proxy_every_images=96",
        "training.proxy_images=24",
        "training.proxy_steps=2",
        "training.best_metric=proxy/fd_classifier_24",
    ]
    found = []
    for name, more in (("without", []), ("with", proxy)):
        place = tmp_path / name
        assert launch.train(compose([*words, *more]), root=place) == 0
        (run,) = runs.list_runs(place)
        (weights,) = run.checkpoints.glob("step-00000004/average.safetensors")
        found.append(weights.read_bytes())
    assert found[0] == found[1]
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    measured = {r["images"]: r["proxy/fd_classifier_24"] for r in rows if "proxy" in str(r)}
    assert sorted(measured) == [96, 192]
    best = committed.best(run.checkpoints, "proxy/fd_classifier_24")
    assert best
    assert committed.facts(best)["metrics"]["proxy/fd_classifier_24"] == min(measured.values())
