"""What runs there are, and what one of them is, has and has left; all of it may be damaged."""

from pathlib import Path
from typing import Any, NamedTuple

from rediffuse import drift, overview
from rediffuse.config.schema import Config
from rediffuse.errors import CheckpointError, RediffuseError
from rediffuse.launch import load_config
from rediffuse.report import curves, images
from rediffuse.report.page import Section
from rediffuse.runs import Run, find_run, list_runs, status_now
from rediffuse.tracking.jsonl import read_metrics
from rediffuse.training.committed import best, checkpoints, facts

Choice = tuple[str, str]
"""What a list shows, and what it stands for."""


class Card(NamedTuple):
    """What a page has to know of a run before it can ask for images."""

    run: Run
    config: Config
    checkpoints: list[Choice]  # newest first
    class_names: tuple[str, ...]


def run_choices(root: Path) -> list[Choice]:
    """The runs of a root, newest first, with how they are."""
    return [(_told(overview.brief(run)), run.id) for run in list_runs(root)]


def _told(row: dict[str, Any]) -> str:
    words = [row["name"] or "unnamed", row["id"][:8], row["status"]]
    return " · ".join([*words, f"{row['images']:,} images"] if "images" in row else words)


def card(root: Path, word: str) -> Card:
    """Read what a run says of itself.

    Raises:
        RediffuseError: if there is no such run, or it is damaged.
    """
    run = find_run(root, word)
    config, names = load_config(run), drift.class_names(drift.began(run))
    there = checkpoint_choices(run, config.training.best_metric)
    return Card(run, config, there, names)


def checkpoint_choices(run: Run, metric: str) -> list[Choice]:
    """The checkpoints of a run, newest first."""
    spared = best(run.checkpoints, metric)
    return [
        (f"{_seen(checkpoint)}{' · best' * (checkpoint == spared)}", checkpoint.name)
        for checkpoint in checkpoints(run.checkpoints)[::-1]
    ]


def _seen(checkpoint: Path) -> str:
    step = f"step {int(checkpoint.name[5:]):,}"
    try:
        return f"{step} · {facts(checkpoint)['images_seen']:,} images"
    except CheckpointError:
        return f"{step} · damaged"


def mark(run: Run) -> str:
    """What changes when there is something new to see of a run."""
    files = [run.metrics, run.directory / "run.json", *sorted(run.samples.glob("preview-*.png"))]
    there = [(f.name, s.st_size, s.st_mtime_ns) for f in files if f.is_file() for s in [f.stat()]]
    return repr([run.id, status_now(run), there])


def training(run: Run) -> tuple[dict[str, Any], list[Section]]:
    """The facts of a run, its curves and its previews; what cannot be read is a note.

    Raises:
        RediffuseError: if its record or its configuration is damaged.
    """
    config, names = load_config(run), drift.class_names(drift.began(run))
    told: dict[str, Any] = {**overview.brief(run), "checkpoints": len(checkpoints(run.checkpoints))}
    try:
        drawn = curves.curves([("", read_metrics(run.metrics))], config.training.clip_norm)
    except RediffuseError as refused:
        drawn = Section("Training", notes=[str(refused)])
    return told, [drawn, images.timeline(run.samples, config, names)]
