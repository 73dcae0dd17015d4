"""One run: gather what it left, draw what its model draws, and write the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rediffuse import build, drift, overview
from rediffuse.config.compose import leaves
from rediffuse.config.schema import Config
from rediffuse.errors import RediffuseError
from rediffuse.launch import load_config
from rediffuse.legality import check_sampling
from rediffuse.lengths import command, next_command, planned_images
from rediffuse.models import Model, find, load
from rediffuse.processes import alone
from rediffuse.report import curves, images, page
from rediffuse.report.evaluations import evaluations
from rediffuse.report.page import Section
from rediffuse.runs import Run
from rediffuse.tracking.jsonl import read_metrics
from rediffuse.tracking.tracker import Row
from rediffuse.training import committed
from rediffuse.words import say

Facts = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What `rediffuse report` was asked for; None leaves it as the run's configuration says."""

    root: Path | None = None
    output: Path | None = None
    pictures: Path | None = None
    draws: bool = True
    count: int = 10
    solvers: tuple[str, ...] = ()
    steps: int | None = None
    seed: int = 0
    checkpoint: str = "latest"
    trust: tuple[str, ...] = ()


def report(word: str, asked: Asked) -> int:
    """Write the page of a run, and say where it is; return the exit code.

    Raises:
        RediffuseError: if the run cannot be read, or cannot do what is asked for.
    """
    alone("report")
    run = find(word, asked.root)
    file = asked.output or run.directory / "report.html"
    page.check_output(file)
    facts, config, rows = overview.full(run), load_config(run), read_metrics(run.metrics)
    names = drift.class_names(drift.began(run))
    model, without = _model(run, asked)
    clock = model.denoiser.schedule if model else build.schedule(config, asked.trust)
    check_sampling(config, config.sampling, clock, asked.trust)
    sections = [
        curves.curves([("", rows)], config.training.clip_norm),
        images.timeline(run.samples, config, names),
        *_drawn(model, without, asked),
        curves.schedule(config, clock, asked.trust),
    ]
    figures, notes = evaluations(run.directory / "evaluation")
    drawn, more = images.pictures_in(run.directory / "evaluation")
    text = page.render(
        "run.html",
        title=facts["name"] or run.id[:12],
        run=facts,
        header=_header(facts, config, rows, names, asked.trust),
        commands=_commands(run, facts, config),
        sections=sections,
        figures=figures,
        evaluation=Section("Evaluation", drawn, [*notes, *more]),
        last=_last(rows),
        config=leaves(config.model_dump()),
        **_environment(run),
        version=version("rediffuse"),
    )
    if asked.pictures:
        page.write_pictures(asked.pictures, run.id, sections)
        say(f"pictures  {asked.pictures}")
    page.write(file, text)
    say(f"report    {file} ({len(text.encode()) / 1e6:.1f} MB)")
    return 0


def _model(run: Run, asked: Asked) -> tuple[Model | None, str]:
    """The run's model, or why there is none to draw with."""
    if not asked.draws:
        return None, "Not drawn, as asked (--no-images)."
    if not any(run.checkpoints.glob("step-*")):
        return None, "There is no checkpoint yet to draw with."
    try:
        return load(run.directory, which=asked.checkpoint, trusted=asked.trust), ""
    except RediffuseError as refused:
        if asked.checkpoint != "latest":
            raise
        return None, f"Not drawn: {refused}."


def _drawn(model: Model | None, without: str, asked: Asked) -> list[Section]:
    if model is None:
        return [Section(title, notes=[without]) for title in ("From noise to image", "Solvers")]
    return [
        images.trajectories(model, asked.seed),
        images.samplers(model, asked.solvers, asked.count, asked.steps, asked.seed),
    ]


def _header(
    facts: Facts, config: Config, rows: Sequence[Row], names: Sequence[str], trust: Sequence[str]
) -> Facts:
    """What is worth knowing first."""
    data = facts["data"] if isinstance(facts["data"], dict) else {}
    skipped = overview.last(rows, "skipped_steps")
    return {
        "status": facts["status"],
        "images seen": facts["images"],
        "training loss": facts["loss"],
        "held-out loss": facts["held out"],
        "parameters": _parameters(config, len(names), trust),
        "network": config.model.name,
        "process": f"schedule={config.schedule.name}, target={config.target.name}",
        "objective": f"{config.objective.name}, weighting={config.weighting.name}",
        "data": f"{config.data.name}, {config.data.image_size} × {config.data.image_size}, "
        f"{config.data.channels} channel{'s' * (config.data.channels > 1)}",
        "training images": data.get("train_images"),
        "classes": len(names) or None,
        "created": facts["created"].replace("T", " ") + " UTC",
        "newest checkpoint": facts["checkpoints"][-1] if facts["checkpoints"] else None,
        "best checkpoint": facts["best checkpoint"],
        "skipped steps": skipped or None,
        "parent": facts["parent"],
        "bit for bit": "comparable" if facts["bit-comparable"] else "not comparable",
    }


def _parameters(config: Config, classes: int, trust: Sequence[str]) -> int | None:
    try:
        network = build.empty_network(config, classes, trust)
    except RediffuseError:
        return None
    return sum(weight.numel() for weight in network.parameters())


def _commands(run: Run, facts: Facts, config: Config) -> dict[str, str]:
    """What to type next."""
    going_on = command("resume", run.id, config)
    if facts["status"] == "FINISHED":
        data = facts["data"] if isinstance(facts["data"], dict) else {}
        per_epoch = data.get("train_images") or 1
        ended = facts["images"], planned_images(config, per_epoch), _checks_since_best(run)
        going_on = next_command(run.id, config, *ended)
    found = {"resume": going_on, "sample": command("sample", run.id, config)}
    if len(facts["command"]) > 1:
        found["was started by"] = overview.command_line(facts["command"])
    return found


def _checks_since_best(run: Run) -> int:
    """How many validations the newest checkpoint has seen since the best one."""
    try:
        return int(committed.facts(committed.checkpoints(run.checkpoints)[-1])["checks_since_best"])
    except (RediffuseError, LookupError, TypeError, ValueError):
        return 0


def _environment(run: Run) -> Facts:
    """Where the run began; packages apart, since there are hundreds."""
    known = drift.began(run)
    packages = known.pop("packages", {})
    return {
        "environment": leaves(known),
        "packages": packages if isinstance(packages, dict) else {},
    }


def _last(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """The last value of each metric, with the images seen then."""
    return {
        name: (int(row["images"]), value)
        for row in rows
        for name, value in row.items()
        if name not in ("images", "time")
    }
