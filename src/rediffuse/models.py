"""From a run to a model that can be sampled: one id is all that it takes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from rediffuse import build, drift, runs
from rediffuse.config.compose import checked, read_yaml
from rediffuse.config.schema import Config
from rediffuse.denoiser import Denoiser
from rediffuse.errors import CheckpointError, ConfigError, RunError, TrainingError
from rediffuse.networks.replay import Replay
from rediffuse.runs import Run
from rediffuse.training import checkpoint, committed
from rediffuse.training.compiling import compile_network, try_compiler
from rediffuse.training.devices import (
    PRECISIONS,
    choose,
    has_bfloat16_units,
    keep_freed_memory,
    set_determinism,
)
from rediffuse.words import tell


@dataclass(frozen=True)
class Model:
    """A denoiser with the facts of its data: `config.data` and the classes it knows, if any."""

    config: Config
    denoiser: Denoiser
    class_names: tuple[str, ...]
    device: torch.device
    precision: torch.dtype = torch.float32
    trusted: tuple[str, ...] | None = None
    origin: dict[str, str] | None = None  # of a run: its id, checkpoint and weights, and a digest
    images_seen: int | None = None  # by those weights
    compiled: bool = False

    @property
    def null_class(self) -> int | None:
        """The number that stands for no class, if the model was trained without its labels, too."""
        dropped = self.config.training.label_dropout > 0
        return len(self.class_names) if self.class_names and dropped else None


def load(
    word: str | Path | Run,
    *,
    root: str | Path | None = None,
    weights: str = "average",
    which: str = "latest",
    device: str = "auto",
    compiled: bool = False,
    trusted: Sequence[str] = (),
) -> Model:
    """Build a run's model from its own configuration.

    `word` is a run, its folder, its id, or the beginning of that.

    `weights` are the `average` or the `raw` ones, of the `latest` or `best` checkpoint or that of a
    step's number. With `compiled`, and on a CPU if the run was, the network is compiled. `trusted`
    are packages of the user's own that the run names.

    Raises:
        RediffuseError: if there is no such run or checkpoint, or it does not verify.
    """
    run = find(word, root)
    config = checked(read_yaml(run.config))
    if weights not in _WEIGHTS:
        raise ConfigError(f"weights={weights}: expected {' or '.join(_WEIGHTS)}")
    keep_freed_memory()
    chosen_device = choose(device).device
    threads = config.threads if chosen_device.type == "cpu" else None
    if chosen_device.type == "cpu":  # as the previews were drawn
        compiled = compiled or bool(config.training.compile)
    set_determinism(config.determinism, chosen_device, threads, compiled=compiled)
    names = _class_names(run)
    weights = weights if config.average.half_life_images else "raw"
    read = _read_steadily(run, which, config, len(names), weights, trusted)
    network = read.denoiser.network.to(chosen_device).eval()
    if compiled:
        try:
            try_compiler(chosen_device)
            compile_network(network, chosen_device)
        except TrainingError as failed:
            tell(f"{failed}; sampling without, which may change last digits", sys.stderr)
            compiled = False
    if chosen_device.type == "cuda":
        network = Replay(network)
    origin = {
        "run": run.id,
        "checkpoint": read.checkpoint,
        "weights": weights,
        "digest": read.digest[:16],
    }
    return Model(
        config,
        replace(read.denoiser, network=network),
        names,
        chosen_device,
        _precision(config, chosen_device),
        trusted=tuple(trusted),
        origin=origin,
        images_seen=read.images_seen,
        compiled=compiled,
    )


class _Read(NamedTuple):
    """What a model takes from a checkpoint."""

    denoiser: Denoiser
    checkpoint: str
    digest: str
    images_seen: int


def _read_steadily(
    run: Run, which: str, config: Config, num_classes: int, weights: str, trusted: Sequence[str]
) -> _Read:
    """Choose a checkpoint and read it, anew if the run removes old ones meanwhile.

    Retention keeps the newest two, so that a run has to commit two others while one is read.
    """
    for _ in range(_MOST_TRIES):
        before = committed.checkpoints(run.checkpoints)
        try:
            chosen = _checkpoint(run, which, config.training.best_metric)
            return _read(config, num_classes, chosen, weights, trusted)
        except (CheckpointError, OSError):
            if all(each.exists() for each in before):
                raise
    raise CheckpointError(f"run {run.id} removes its checkpoints faster than they can be read")


_MOST_TRIES = 10


def _read(
    config: Config, num_classes: int, chosen: Path, weights: str, trusted: Sequence[str]
) -> _Read:
    _check_size(config, num_classes, chosen, trusted)
    network = build.network(config, num_classes, trusted)
    checkpoint.load_weights(network, chosen, weights)
    denoiser = build.denoiser(config, network, trusted)
    if isinstance(denoiser.schedule, nn.Module):
        checkpoint.load_schedule(denoiser.schedule, chosen)
    digest, seen = committed.digest_of_weights(chosen, weights), committed.facts(chosen)
    return _Read(denoiser, chosen.name, digest, seen["images_seen"])


_WEIGHTS = ("average", "raw")


def _precision(config: Config, device: torch.device) -> torch.dtype:
    """The run's own, but float32 for bfloat16 on a CPU without units for it, whatever the clock."""
    precision = PRECISIONS[config.training.precision]
    if precision is torch.bfloat16 and device.type == "cpu" and not has_bfloat16_units():
        tell("this processor has no units for bfloat16: computing in float32", sys.stderr)
        return torch.float32
    return precision


def _class_names(run: Run) -> tuple[str, ...]:
    began = drift.began(run)
    if (began.get("data") or {}).get("class_names") is None:
        raise RunError(f"{run.environment} does not tell the run's classes; restore it")
    return drift.class_names(began)


def _check_size(
    config: Config, num_classes: int, chosen: Path, trusted: Sequence[str] | None
) -> None:
    """Refuse a network that its checkpoint cannot fill before memory is taken for it."""
    wanted = build.empty_network(config, num_classes, trusted).state_dict()
    needed, kept = sum(t.nbytes for t in wanted.values()), chosen / "model.safetensors"
    kept = kept if kept.is_file() else chosen / "average.safetensors"  # `copy_for_sampling`
    if kept.is_file() and needed > kept.stat().st_size:
        raise CheckpointError(
            f"{chosen.name}: {kept.name} has {kept.stat().st_size:,} bytes, but the network of "
            f"config.yaml (model, image_size, classes) needs {needed:,}; one of them was changed"
        )


def find(word: str | Path | Run, root: str | Path | None = None) -> Run:
    """Find a run by its directory, or by its id or the beginning of it in `root`.

    Raises:
        RunError: if there is none.
    """
    if isinstance(word, Run):
        word = word.directory
    if isinstance(word, Path) or "/" in word:
        try:
            directory = Path(word).expanduser().resolve()
            is_there = directory.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, NUL, nobody's home, a loop of links
            is_there = False
        if not is_there:
            raise RunError(
                f"there is no folder {str(word)[:200]!r}; give a run's folder, or its id"
            )
        return runs.find_run(directory.parent, directory.name)
    return runs.find_run(runs.runs_root(root), word)


def _checkpoint(run: Run, which: str, metric: str) -> Path:
    """Latest, best by a metric, or the step of that number."""
    if which == "latest":
        broken: list[str] = []
        found = committed.newest(run.checkpoints, broken.append, set_aside=False)
        for line in broken:  # where none verifies, the refusal says it all
            tell(line, sys.stderr)
    elif which == "best":
        found = committed.best(run.checkpoints, metric)
    else:
        number = which.removeprefix("step-").lstrip("0") or "0"
        found = run.checkpoints / f"step-{number:>08}"
    there = committed.checkpoints(run.checkpoints)
    if found not in there or found is None:
        names = ", ".join(c.name for c in there) or "none yet"
        raise CheckpointError(f"run {run.id} has no checkpoint {which[:200]!r}; it has {names}")
    return found
