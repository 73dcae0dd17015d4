"""What `runs` and `show` tell."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rediffuse import drift, tables
from rediffuse.config.compose import checked, leaves, read_yaml
from rediffuse.errors import RediffuseError
from rediffuse.evaluation.digests import UNVERIFIED, read_report
from rediffuse.runs import Run, last_heard, status_now
from rediffuse.tracking.jsonl import read_metrics
from rediffuse.training.committed import best, checkpoints


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
    """One line per report in a run's evaluation/: its name, and its result or what is wrong."""
    place = run.directory / "evaluation"
    files = sorted(place.glob("*.json"))
    lines = [f"{file.stem}: {_result(file, _first_figure)}" for file in files]
    for kind, (name, result) in _REPORTS.items():
        files = sorted(place.glob(f"{kind}-*/{name}"))
        lines += [f"{file.parent.name}: {_result(file, result)}" for file in files]
    return lines


def _result(file: Path, result: Callable[[dict[str, Any]], str]) -> str:
    """The main result of a report, if it is what was written."""
    try:
        facts, verified = read_report(file)
        return result(facts) + ("" if verified else f" ({UNVERIFIED})")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as broken:
        why = str(broken) if isinstance(broken, ValueError) else "it is not a report"
        return f"damaged ({why[:80]})"


def _first_figure(facts: dict[str, Any]) -> str:
    figure = facts["figures"][0]
    return f"{str(figure['figure'])[:80]} {float(figure['value']):.4g}"


def _of_sweep(facts: dict[str, Any]) -> str:
    values = [float(cell["figures"][0]["value"]) for cell in facts["cells"]]
    return f"{len(values)} combinations, least {min(values):.4g}"


def _of_memorisation(facts: dict[str, Any]) -> str:
    p_value = float(facts["verdict"]["p_value"])
    return f"{'ALARM' if facts['alarm'] else 'no alarm'}, p = {p_value:.2g}"


def _of_diagnosis(facts: dict[str, Any]) -> str:
    return f"{len(facts['levels'])} noise levels"


_REPORTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "sweep": ("sweep.json", _of_sweep),
    "memorisation": ("report.json", _of_memorisation),
    "diagnosis": ("report.json", _of_diagnosis),
}
"""The folders of an evaluation/: the file that each holds, and the function that sums it up."""


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per run, as wide as the terminal, and what is wrong with damaged ones."""
    names = ("id", "name", "status", "created", "images", "loss", "held out")
    shown = [
        {**row, "id": row["id"][:8], "created": str(row.get("created", ""))[:16].replace("T", " ")}
        for row in rows
    ]
    cells = [[_shown(row.get(name)) for name in names] for row in shown]
    tables.table(names, cells, left=names[:4], cut="name", styles=_STYLES)
    for row in rows:
        if "why" in row:
            tables.paragraph(f"{row['id'][:8]}: {row['why']}")


_STYLES = {
    "FINISHED": "green",
    "RUNNING": "cyan",
    "FAILED": "red",
    "damaged": "red",
    "KILLED": "yellow",
    "stale": "yellow",
    "silent": "yellow",
}


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print facts, one per line; a configuration stands apart, below its own head."""
    rest = dict(facts)
    config = rest.pop("config", None)
    tables.facts(_told(rest))
    if config:
        tables.paragraph("\nconfig")
        tables.facts(_told(config))


def command_line(words: Sequence[str]) -> str:
    """A command as it is typed, whatever file the program was."""
    program, *rest = words or [""]
    return shlex.join([Path(program).stem.replace("__main__", "rediffuse"), *rest])


def _told(facts: Mapping[str, Any]) -> dict[str, str]:
    named = {name: value for name, value in leaves(facts).items() if value not in (None, [], {})}
    return {
        name: command_line(value) if name == "command" else _shown(value)
        for name, value in named.items()
    }


def last(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    """The newest value of a metric."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)
