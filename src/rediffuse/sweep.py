"""`rediffuse sweep`: every combination of solver, steps, guidance and weights, with the same noise.

    <run>/evaluation/sweep-<key>/sweep.json  sweep.png

Each combination is an evaluation like any other, kept when it is found: a sweep that was killed
evaluates only what is missing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rediffuse import tables
from rediffuse.config.schema import Sampling
from rediffuse.drawing import Job
from rediffuse.errors import ConfigError, RunError
from rediffuse.evaluate import (
    Asked,
    Evaluation,
    check_job,
    check_metrics,
    folder,
    judged,
    lines,
    note,
    print_table,
    record,
    study_of,
)
from rediffuse.evaluation.card import digest_of
from rediffuse.evaluation.digests import add_digest
from rediffuse.evaluation.figures import Figure, shown
from rediffuse.gallery import Options, check_equal, opened, settled
from rediffuse.judging import Study, samples
from rediffuse.models import Model, find
from rediffuse.runs import Run
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.training.devices import Devices, choose
from rediffuse.words import json_text, say


@dataclass(frozen=True)
class Axes:
    """What is combined with what; an empty axis is what the run says itself.

    A solver may carry its own number of steps, as `ancestral@1000`, whatever the others take.
    """

    solvers: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    guidance: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    def combinations(self, options: Options) -> list[Options]:
        """The options of every combination, in order, each once."""
        found = []
        for weights, solver, guidance in product(
            self.weights or (options.weights,),
            self.solvers or (options.solver,),
            self.guidance or (options.guidance,),
        ):
            name, at, own = (solver or "").partition("@")
            if at and not own.isdecimal():
                raise ConfigError(f"--solver {solver}: expected a number of steps after the @")
            for steps in (int(own),) if own else self.steps or (options.steps,):
                found.append(
                    replace(
                        options,
                        weights=weights,
                        solver=name or None,
                        steps=steps,
                        guidance=guidance,
                    )
                )
        return list(dict.fromkeys(found))


class Cell(NamedTuple):
    """One combination: what is drawn, and how."""

    model: Model
    how: Sampling
    job: Job
    solver: str  # as it was asked for

    @property
    def named(self) -> dict[str, Any]:
        """What it is called in a table."""
        assert self.model.origin
        scale = self.how.guidance.arguments.get("scale", 1)
        return {
            "solver": self.solver,
            "steps": self.how.steps,
            "guidance": scale,
            "weights": self.model.origin["weights"],
        }


class Row(NamedTuple):
    """A combination and what was found of it."""

    named: dict[str, Any]
    found: Evaluation

    @property
    def figure(self) -> Figure:
        """The figure by which combinations are compared: the first one."""
        return self.found.figures[0]

    @property
    def evaluations(self) -> float:
        """Passes of the network per image."""
        assert self.found.cost
        return self.found.cost.evaluations

    @property
    def seconds(self) -> float:
        """Of drawing a thousand images."""
        assert self.found.cost
        return 1000 * self.found.cost.seconds / self.figure.card.n


def sweep(word: str, options: Options, axes: Axes, asked: Asked) -> int:
    """Judge every combination, tell a table and keep it with a picture; return the exit code.

    Raises:
        RediffuseError: if the run, its images or a combination cannot be used; before one is drawn.
    """
    check_metrics(asked)
    if more := sorted({*asked.metrics} & _MORE_IS_BETTER):
        raise ConfigError(
            f"--metric {more[0]}: combinations are compared by a distance, of which less is "
            "better; every other figure of each is kept in evaluation/"
        )
    devices, each = choose(options.device), axes.combinations(options)
    with devices.main_talks():
        return _sweep(find(word, options.root), options, each, asked, devices)


_MORE_IS_BETTER = {"is", "precision", "recall", "density", "coverage", "agreement", "cas", "bits"}


def _sweep(
    run: Run, options: Options, each: Sequence[Options], asked: Asked, devices: Devices
) -> int:
    models = {how.weights: opened(run, how) for how in {how.weights: how for how in each}.values()}
    for model in models.values():
        check_equal(model, devices)
    for how in each:  # refused before anything is looked at
        _cell(models[how.weights], how)
    study = study_of(run, models[each[0].weights], asked)
    count = options.count or (None if options.seeds else min(1000, study.usual_n))
    cells = [_cell(models[how.weights], replace(how, count=count)) for how in each]
    keys = [study.card(len(c.job.images), samples(c.model, c.how, c.job)).digest for c in cells]
    cells = list(dict(zip(keys, cells, strict=True)).values())  # 1 and 1.0 are one guidance
    check_job(cells[0].job, study, asked)
    rows = _filled(run, cells, study, devices, asked)
    if not devices.is_main:
        return 0
    facts = summary(run, rows)
    place = folder(run) / f"sweep-{facts['key'][:12]}"
    _keep(place, facts, rows)
    if asked.as_json:
        say(json_text(facts))
    else:
        _show(rows)
        say(f"picture {place / 'sweep.png'}")
    record(run, cells[0].model.config, [row.found for row in rows])
    return 0


def _cell(model: Model, options: Options) -> Cell:
    how, job = settled(model, options)
    return Cell(model, how, job, options.solver or how.solver.name)


def _filled(
    run: Run, cells: Sequence[Cell], study: Study, devices: Devices, asked: Asked
) -> list[Row]:
    """Every cell's figures; those that were found before take no time."""
    rows: list[Row] = []
    began, left = time.perf_counter(), sum(cell.how.steps for cell in cells)
    spent = 0
    for k, cell in enumerate(cells, 1):
        start = time.perf_counter()
        of = cell.named
        name = f"{of['solver']} {of['steps']}, guidance {of['guidance']:g}, {of['weights']}"
        found = judged(run, cell.model, cell.how, cell.job, study, devices, again=asked.again)
        rows.append(Row(cell.named, found.told(asked.metrics)))
        left -= cell.how.steps
        if time.perf_counter() - start > _NOTICED_S:
            spent += cell.how.steps
        seconds = (time.perf_counter() - began) * left / spent if spent else 0
        figure = rows[-1].figure
        note(
            f"{k} of {len(cells)}  {name}: {figure.full_name} {figure.value:.4g}"
            f"  {tqdm.format_interval(seconds)} left"
        )
    return rows


_NOTICED_S = 0.5  # what was kept is read in less


def front(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[int]:
    """Rows that no other one beats: none is as good for less, and none better for as much."""
    points = [(cost(row), row.figure.value) for row in rows]
    return [
        k
        for k, (spent, value) in enumerate(points)
        if not any(s <= spent and v <= value and (s, v) != (spent, value) for s, v in points)
    ]


def summary(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """All that a sweep found, as plain data."""
    by_evaluations, by_seconds = front(rows, _evaluations), front(rows, _seconds)
    return {
        "key": digest_of([row.found.key for row in rows]),
        "run": run.id,
        "cells": [
            {
                **row.named,
                "evaluations": row.evaluations,
                "seconds_per_1000_images": row.seconds,
                "fewest_evaluations": k in by_evaluations,
                "fewest_seconds": k in by_seconds,
                **row.found.as_json(),
            }
            for k, row in enumerate(rows)
        ],
    }


def _evaluations(row: Row) -> float:
    return row.evaluations


def _seconds(row: Row) -> float:
    return row.seconds


def _show(rows: Sequence[Row]) -> None:
    """One line per combination; a front is of those that no other one beats."""
    by_evaluations, by_seconds = front(rows, _evaluations), front(rows, _seconds)
    of = [key for key in rows[0].named if len({row.named[key] for row in rows}) > 1]
    of = list(dict.fromkeys(("solver", "steps", *of)))
    cells = []
    for k, row in enumerate(rows):
        fronts = ("evals" if k in by_evaluations else "", "s" if k in by_seconds else "")
        cells.append(
            (
                *(_short(row.named[key]) for key in of),
                f"{row.evaluations:g}",
                f"{row.seconds:.3g}",
                shown(row.figure),
                "+".join(filter(None, fronts)),
            )
        )
    say(f"{rows[0].figure.full_name} by evaluations of an image and seconds of 1,000 images")
    print_table((*of, "evals", "s/1k", "value", "front"), cells)
    best = min(rows, key=lambda row: row.figure.value)
    floor = best.figure.floor
    if floor:
        say(f"floor   {shown(floor)} is what real images have")
    say("best of the sweep; every combination has its own card in evaluation/:")
    for line in lines(best.found.told((best.figure.name,))):
        tables.hanging(line, 8)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def _keep(place: Path, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / "sweep.json", json_text(add_digest(facts)).encode())
        write_atomically(place / "sweep.png", picture(rows))
    except OSError as failed:
        raise RunError(f"{place} cannot be written ({failed.strerror})") from None


def picture(rows: Sequence[Row]) -> bytes:
    """Quality against evaluations and against seconds, and against guidance where that varies."""
    from rediffuse import plots  # matplotlib takes a second

    return plots.png(partial(_drawn, rows))


def _drawn(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import LogFormatter

    best = min(rows, key=lambda row: row.figure.value)
    alike = [row for row in rows if row.named["guidance"] == best.named["guidance"]]
    several = len({row.named["guidance"] for row in rows}) > 1
    at = f" (guidance {best.named['guidance']:g})" if several else ""
    panels = [
        (f"evaluations of the network per image{at}", _evaluations, alike),
        (f"seconds per 1,000 images{at}", _seconds, alike),
    ]
    if several:
        by_guidance = ("guidance, at the most steps", _guidance, _finest(rows))
        panels = [*(panels if len(alike) > 1 else []), by_guidance]
    canvas = Canvas(figsize=(5 * len(panels), 4), layout="constrained")
    places = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, x, some) in zip(places, panels, strict=True):
        _panel(axes, label, x, some)
        axes.set_ylabel(best.figure.full_name)
        if x is not _guidance:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(LogFormatter())
            axes.xaxis.set_minor_formatter(LogFormatter())
            unbeaten = sorted((x(some[k]), some[k].figure.value) for k in front(some, x))
            axes.step(*zip(*unbeaten, strict=True), where="post", color="0.6", lw=0.8, zorder=0)
        if floor := best.figure.floor:
            axes.axhline(floor.value, color="0.3", linestyle=":", linewidth=1)
            where = {"xy": (0.99, floor.value), "xycoords": ("axes fraction", "data")}
            axes.annotate("real against real", **where, ha="right", va="bottom")
    canvas.axes[0].legend()
    return canvas


def _guidance(row: Row) -> float:
    return float(row.named["guidance"])


def _finest(rows: Sequence[Row]) -> list[Row]:
    """Of each solver and weights the rows with the most steps."""
    most: dict[tuple[str, str], int] = {}
    for row in rows:
        kind = (row.named["solver"], row.named["weights"])
        most[kind] = max(most.get(kind, 0), row.named["steps"])
    return [r for r in rows if r.named["steps"] == most[r.named["solver"], r.named["weights"]]]


def _panel(axes: Any, label: str, x: Callable[[Row], float], rows: Sequence[Row]) -> None:
    """One line per solver and weights, apart in colour, marker and dashes."""
    names = list(dict.fromkeys((row.named["solver"], row.named["weights"]) for row in rows))
    solvers = list(dict.fromkeys(solver for solver, _ in names))
    for solver, weights in names:
        mine = [r for r in rows if (r.named["solver"], r.named["weights"]) == (solver, weights)]
        points = sorted((x(row), row.figure.value) for row in mine)
        kind = solvers.index(solver)
        axes.plot(
            *zip(*points, strict=True),
            color=f"C{kind}",  # of a style whose colours everybody can tell apart
            marker=_MARKERS[kind % len(_MARKERS)],
            linestyle="-" if weights == "average" else "--",
            label=f"{solver}, {weights}",
        )
    axes.set_xlabel(label)


_MARKERS = "osD^vPX"
