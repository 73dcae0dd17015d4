"""`rediffuse evaluate`: figures of images, told and kept with how they came about.

    <run>/evaluation/<checkpoint>-<weights>-<solver>-<steps>-<n>-<key>.json

The key is the digest of everything that the figures depend on. What was evaluated before is read
and told again, so that whoever asks twice waits once.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rediffuse import tables
from rediffuse.config.schema import Config, Sampling
from rediffuse.drawing import Job
from rediffuse.errors import ConfigError, RediffuseError, RunError
from rediffuse.evaluation.card import Card
from rediffuse.evaluation.digests import UNVERIFIED, add_digest, read_report
from rediffuse.evaluation.figures import Figure, short, shown
from rediffuse.evaluation.measures import INCEPTION
from rediffuse.gallery import Options, check_equal, opened, settled
from rediffuse.given import pair
from rediffuse.images import of_run
from rediffuse.judging import Cost, Study, drawn, samples
from rediffuse.likelihoods import bits, card_of
from rediffuse.models import Model, find
from rediffuse.processes import alone
from rediffuse.progress import Progress
from rediffuse.references import joined, looked_at, networks, real_parts
from rediffuse.runs import Run, locked, runs_root
from rediffuse.session import send_what_is_missing
from rediffuse.tracking.jsonl import EVALUATION, append_metrics, read_metrics, write_atomically
from rediffuse.training.devices import Devices, choose
from rediffuse.words import did_you_mean, json_text, say, tell


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and through what; empty is what needs no weights from elsewhere."""

    features: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    against: str = "train"
    allow_small_n: bool = False
    accuracy_score: bool = False
    likelihood: int | None = None
    again: bool = False
    as_json: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Evaluation:
    """Figures of one set of images and their cost; `key` identifies them in the run's folder.

    `verified` is False if they were read from a file that has no digest of its values.
    """

    key: str
    figures: tuple[Figure, ...]
    cost: Cost | None  # of drawing, where images were drawn
    facts: dict[str, Any]
    verified: bool = True

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        figures = [figure.as_json() for figure in self.figures]
        cost = self.cost and self.cost._asdict()
        return {"key": self.key, **self.facts, "cost": cost, "figures": figures}

    @classmethod
    def from_json(cls, told: dict[str, Any], *, verified: bool = True) -> "Evaluation":
        """Undo `as_json`.

        Raises:
            ValueError: for what is not the JSON of an evaluation.
        """
        try:
            rest = dict(told)
            key, figures, cost = (rest.pop(name) for name in ("key", "figures", "cost"))
            spent = cost and Cost(*(float(cost[name]) for name in Cost._fields))
            for name, kind in (("way", str), ("seconds", float), ("images_seen", int)):
                if not isinstance(rest[name], kind):
                    raise TypeError(name)
            return cls(str(key), tuple(map(Figure.from_json, figures)), spent, rest, verified)
        except (KeyError, TypeError) as wrong:
            raise ValueError(f"it is not an evaluation ({wrong})") from None

    def metrics(self) -> dict[str, float]:
        """The figures as metrics of the run, whose names say how the images were drawn."""
        way = self.facts["way"]
        return {f"{EVALUATION}{f.full_name}/{way}": f.value for f in self.figures}

    def told(self, metrics: Sequence[str]) -> "Evaluation":
        """Only the figures of these metrics, or all where none is named."""
        kept = tuple(
            figure
            for figure in self.figures
            if not metrics or any(f"{figure.name}_".startswith(f"{word}_") for word in metrics)
        )
        return replace(self, figures=kept)


def evaluate(word: str, options: Options, asked: Asked) -> int:
    """Judge a run's images, tell the figures and keep them in the run; return the exit code.

    Raises:
        RediffuseError: if the run, its images or what is asked for cannot be used.
    """
    check_metrics(asked)
    devices = choose(options.device)
    with devices.main_talks():
        run = find(word, options.root)
        model = opened(run, options)
        check_equal(model, devices)
        settled(model, options)  # refused before anything is looked at
        study = study_of(run, model, asked)
        count = options.count or (None if options.seeds else study.usual_n)
        how, job = settled(model, replace(options, count=count))
        check_job(job, study, asked)
        found = [judged(run, model, how, job, study, devices, again=asked.again)]
        if not devices.is_main:
            return 0
        if asked.likelihood:
            found.append(likelihood(run, model, study, asked.likelihood, again=asked.again))
        show(found, asked)
        record(run, model.config, found)
    return 0


def evaluate_given(
    images: str, reference: str, size: int | None, root: Path | None, asked: Asked
) -> int:
    """Judge given images against given ones, and tell the figures; return the exit code.

    Raises:
        RediffuseError: if the images or what is asked for cannot be used.
    """
    check_metrics(asked)
    alone("evaluate --images")
    began, place = time.perf_counter(), runs_root(root)
    sample, parts = pair(place, images, reference, size, note)
    against = next(iter(parts))
    device = choose(asked.device).device
    looking = networks(place, parts[against], through(asked), device, note)
    study = Study(place, parts, against, looking, note)
    if not asked.allow_small_n:
        study.check(len(sample))
    card = study.card(len(sample), sample.facts)
    seen = {f.name: joined(looked_at(sample.chunks(), f)) for f in looking}
    classes = study.classes_of(sample)
    figures = tuple(study.figures(seen, card, classes))
    facts: dict[str, Any] = {"seconds": time.perf_counter() - began}
    if (why := study.no_floor(len(sample), classes)) is not None:
        facts["no_floor"] = why
    show([Evaluation(card.digest, figures, None, facts)], asked)
    return 0


def check_job(job: Job, study: Study, asked: Asked) -> None:
    """Refuse what would be found out only when all is drawn.

    Raises:
        ConfigError: saying what is missing.
    """
    if not asked.allow_small_n:
        study.check(len(job.images))
    if asked.accuracy_score:
        study.check_accuracy_score(job.classes is not None)
    if asked.likelihood:
        study.unseen()


def check_metrics(asked: Asked) -> None:
    """Refuse names that no figure has, or none of those that are asked for.

    Raises:
        ConfigError: naming those that there are, or what else is needed.
    """
    known = (*_INCEPTIONS_OWN, *_METRICS)
    for name in asked.metrics:
        if name not in known:
            raise ConfigError(
                f"--metric {name}: there is none{did_you_mean(name, known)}; there are "
                f"{', '.join(known)}"
            )
    for name, given in (("cas", asked.accuracy_score), ("bits", asked.likelihood)):
        if name in asked.metrics and not given:
            option = {"cas": "--cas", "bits": "--likelihood N"}[name]
            raise ConfigError(f"--metric {name} needs {option}, too: it takes longer than the rest")
    others = [name for name in asked.features if name != INCEPTION]
    for name in {*asked.metrics} & {"fd", "kd"}:
        if asked.features and not others:
            raise ConfigError(
                f"--metric {name} is never Inception's, whose figures are fid and kid; name "
                "another network with --features"
            )
    if "agreement" in asked.metrics and asked.features and "classifier" not in asked.features:
        raise ConfigError("--metric agreement is the classifier's; add --features classifier")


def through(asked: Asked) -> tuple[str, ...]:
    """The networks that are asked for by name, or by a metric that is one network's own."""
    found = list(asked.features)
    if {*asked.metrics} & {*_INCEPTIONS_OWN} and INCEPTION not in found:
        found.append(INCEPTION)
    if {*asked.metrics} & {"fd", "kd", "agreement"} and not asked.features:
        found.insert(0, "classifier")
    return tuple(found)


_INCEPTIONS_OWN = ("fid", "kid", "is", "sfid", "mifid")
_METRICS = (
    *("fd", "kd", "precision", "recall", "density", "coverage", "agreement", "cas", "bits"),
    *("grey", "red", "green", "blue", "alpha"),
)


def study_of(run: Run, model: Model, asked: Asked) -> Study:
    """What a run's images are held against, seen through the networks that are asked for.

    Raises:
        RediffuseError: if the images are not there, or not those that the run was trained on.
    """
    root = run.directory.parent
    parts = real_parts(of_run(run, model.config.data, model.trusted))
    if asked.against not in parts:
        raise ConfigError(f"--against {asked.against}: there are {', '.join(parts)} images")
    looking = networks(root, parts["train"], through(asked), model.device, note)
    score = asked.accuracy_score
    return Study(root, parts, asked.against, looking, note, with_accuracy_score=score)


def judged(
    run: Run,
    model: Model,
    how: Sampling,
    job: Job,
    study: Study,
    devices: Devices,
    *,
    again: bool = False,
) -> Evaluation:
    """Read what was found before, or draw the images, judge them and keep what was found."""
    assert model.origin
    began, count = time.perf_counter(), len(job.images)
    card = study.card(count, samples(model, how, job))
    checkpoint_name, weights = model.origin["checkpoint"], model.origin["weights"]
    name = f"{checkpoint_name}-{weights}-{how.solver.name}-{how.steps}-{short(count)}"
    file = folder(run) / f"{name}-{card.digest[:12]}.json"
    there = None if again or not devices.is_main else kept(file, card.digest)
    if known := [found for found in devices.everyones(there) if found]:  # all draw, or nobody does
        return known[0]
    classes = None if job.classes is None else torch.tensor(job.classes)
    study.prepare(count, classes)
    score = study.with_accuracy_score
    with Progress(count) as bar:
        done = drawn(model, how, job, study.networks, bar.move, keep_pixels=score, devices=devices)
    scale = how.guidance.arguments.get("scale", 1)
    figures = tuple(study.figures(done.seen, card, classes))
    if done.pixels is not None:
        figures += (study.accuracy_score(done.pixels, card, classes),)
    others = (f"seed{job.seed}" * (job.seed != 0), study.against.what.replace("train", ""))
    way = "-".join(filter(None, (how.solver.name, str(how.steps), f"g{scale:g}", *others)))
    facts = _facts(model, way, began)
    if (why := study.no_floor(count, classes)) is not None:
        facts["no_floor"] = why
    found = Evaluation(card.digest, figures, done.cost, facts)
    if devices.is_main:
        keep(file, found)
    return found


def likelihood(
    run: Run, model: Model, study: Study, count: int, *, again: bool = False
) -> Evaluation:
    """Read or find the bits per dimension of real images that the run was not trained on."""
    assert model.origin
    began, real = time.perf_counter(), study.unseen()
    count = min(count, len(real))
    card = card_of(model, real, count)
    at, weights = model.origin["checkpoint"], model.origin["weights"]
    file = folder(run) / f"{at}-{weights}-bits-{short(count)}-{card.digest[:12]}.json"
    if not again and (found := kept(file, card.digest)):
        return found
    note(f"finding the bits per dimension of {count:,} {real.what} images")
    with Progress(count) as bar:
        figures = bits(model, real, card, bar.move)
    found = Evaluation(card.digest, figures, None, _facts(model, "bits", began))
    keep(file, found)
    return found


def _facts(model: Model, way: str, began: float) -> dict[str, Any]:
    """What is kept beside figures; `way` is what their metrics are called after."""
    assert model.origin
    return {
        **model.origin,
        "images_seen": model.images_seen,
        "way": f"{way}-{model.origin['weights']}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 3),
    }


# Kept in the run


def folder(run: Run) -> Path:
    """Where the evaluations of a run lie."""
    return run.directory / "evaluation"


def keep(file: Path, found: Evaluation) -> None:
    """Write an evaluation, complete or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json_text(add_digest(found.as_json())).encode())
    except OSError as failed:
        raise RunError(f"{file} cannot be written ({failed.strerror})") from None


def kept(file: Path, key: str) -> Evaluation | None:
    """Read an earlier evaluation with this key; None, with a message, if its file is damaged."""
    try:
        found = read_evaluation(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as broken:
        note(f"{file.name} is damaged ({broken}); evaluated anew")
        return None
    return found if found.key == key else None


def read_evaluation(file: Path) -> Evaluation:
    """Read an evaluation; `verified` says whether its file has a digest of its values.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not an evaluation, or was changed after it was written.
    """
    facts, verified = read_report(file)
    return Evaluation.from_json(facts, verified=verified)


def record(run: Run, config: Config, found: Sequence[Evaluation]) -> None:
    """Add figures to the run's metrics where they are not among them; send trackers what they miss.

    A run that is being trained has its one writer already: its figures stay in their files until
    they are asked for again.
    """
    try:
        with locked(run):
            known = read_metrics(run.metrics)
            for evaluation in found:
                if not any(evaluation.metrics().items() <= row.items() for row in known):
                    images_seen = evaluation.facts["images_seen"]
                    append_metrics(run.metrics, evaluation.metrics(), images_seen)
            send_what_is_missing(run, config, note)
    except RediffuseError as refused:
        note(f"trackers did not receive these figures: {refused}")


# Told


def show(found: Sequence[Evaluation], asked: Asked) -> None:
    """Print figures with their cards, as tables or as JSON: one object, or a list of several."""
    shown = [each.told(asked.metrics) for each in found]
    if asked.as_json:
        told = [{**each.as_json(), "verified": each.verified} for each in shown]
        say(json_text(told if len(told) > 1 else told[0]))
        return
    for each in shown:
        print_table(("figure", "value", "floor"), map(cells, each.figures))
        for line in lines(each):
            tables.hanging(line, 8)


def cells(figure: Figure) -> tuple[str, str, str]:
    """A figure in a table: name, value and floor, both with their standard errors."""
    return figure.full_name, shown(figure), shown(figure.floor) if figure.floor else ""


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows, names on the left and numbers on the right."""
    tables.table(columns, [*rows], fold=columns[:1])


def lines(found: Evaluation) -> list[str]:
    """What stands below figures: what ± and floor mean, every card, and what it took."""
    cards = {figure.card.digest: figure.card for figure in found.figures}
    samples = {card.samples["told"]: None for card in cards.values()}
    against = {card.reference["told"]: None for card in cards.values()}
    floors = {f"{f.floor.n:,} {f.floor.what}" for f in found.figures if f.floor}
    told = []
    if any(f.standard_error is not None for f in found.figures):
        told = ["±       standard error over samples of the same model, at this n"]
    if why := found.facts.get("no_floor"):
        told += [f"floor   none: {why}"]
    told += [f"floor   what real images have: {what}" for what in sorted(floors)]
    told += [f"images  {line}" for line in samples] + [f"against {line}" for line in against]
    told += [f"card    {digest}{_networks(card)}" for digest, card in cards.items()]
    told += [] if found.verified else [f"values  {UNVERIFIED}; --again measures anew"]
    return [*told, f"took    {_cost(found)}"]


def _networks(card: Card) -> str:
    seen = [f"{name} {facts['digest']}" for name, facts in card.features.items()]
    return f" through {' and '.join(seen)}, {card.n:,} images" if seen else f" of {card.n:,} images"


def _cost(found: Evaluation) -> str:
    cost, seconds = found.cost, found.facts["seconds"]
    if cost is None:
        return f"{seconds:,.0f} s"
    share, each = cost.network_seconds / seconds, cost.evaluations
    return f"{seconds:,.0f} s, {share:.0%} in the network, {each:g} evaluations an image"


def note(line: str) -> None:
    """Tell what is going on, beside the figures."""
    tell(line, sys.stderr)
