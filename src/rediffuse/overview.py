"""What `runs` and `show` tell."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rediffuse import drift
from rediffuse.config.compose import checked, leaves, read_yaml
from rediffuse.errors import RediffuseError
from rediffuse.reading import read_object
from rediffuse.runs import Run, last_heard, status_now
from rediffuse.tracking.jsonl import read_metrics
from rediffuse.training.checkpoint import best, checkpoints


def brief(run: Run) -> dict[str, Any]:
    """One row about a run; a damaged one is listed with what is wrong with it."""
    try:
        record = run.read()
        rows = read_metrics(run.metrics)
    except RediffuseError as refused:
        return {"id": run.id, "name": None, "status": "damaged", "why": str(refused)}
    return {
        "id": run.id,
        "name": record.name,
        "status": status_now(run),
        "created": record.created[:19],
        "images": record.images_seen,
        "loss": last(rows, "loss"),
        "held out": last(rows, "validation/loss"),
    }


def full(run: Run) -> dict[str, Any]:
    """Everything worth knowing about a run, as plain data."""
    environment, config = drift.began(run), checked(read_yaml(run.config))
    spared = best(run.checkpoints, config.training.best_metric)
    heard, parted = last_heard(run), drift.reasons(run)
    return {
        **brief(run),
        "directory": str(run.directory),
        "parent": run.read().parent,
        "command": list(run.read().command),
        "checkpoints": [checkpoint.name for checkpoint in checkpoints(run.checkpoints)],
        "best checkpoint": spared.name if spared else None,
        "last heard": heard and f"{datetime.fromtimestamp(heard, UTC):%Y-%m-%dT%H:%M:%S}",
        "evaluations": evaluations(run),
        "data": environment.get("data"),
        "code": environment.get("git"),
        "torch": leaves(environment).get("torch.version"),
        "drift": [told for line in drift.read(run) for told in line.told(line.everything)],
        "bit-comparable": not parted and config.determinism == "exact",
        "because": parted or f"determinism={config.determinism}, nothing changed on the way",
        "config": leaves(config.model_dump()),
    }


def evaluations(run: Run) -> list[str]:
    """What was found of a run: a file of its evaluation/ and the first figure in it, each."""
    files = sorted((run.directory / "evaluation").glob("step-*.json"))
    return [f"{file.stem}: {_first_figure(file)}" for file in files]


def _first_figure(file: Path) -> str:
    try:
        figure = read_object(file)["figures"][0]
        return f"{str(figure['figure'])[:80]} {float(figure['value']):.4g}"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "damaged"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per run, as wide as the terminal."""
    table = Table(box=None, pad_edge=False)
    for name in ("id", "name", "status", "created", "images", "loss", "held out"):
        right = name in {"images", "loss", "held out"}
        table.add_column(name, justify="right" if right else "left", no_wrap=name == "id")
    for row in rows:
        shown = {**row, "id": row["id"][:12]}
        table.add_row(*(_shown(shown.get(str(column.header))) for column in table.columns))
    Console(markup=False, emoji=False, highlight=False).print(table)


def print_facts(facts: dict[str, Any]) -> None:
    """Print a run's facts, one per line."""
    table = Table.grid(padding=(0, 2))
    for name, value in leaves(facts).items():
        if value not in (None, [], {}):
            table.add_row(name, _shown(value))
    Console(markup=False, emoji=False, highlight=False).print(table)


def last(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    """The newest value of a metric."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)
