"""What changed under a run between its processes, and whether it is still comparable bit for bit.

`logs/drift.jsonl` has a line for every resuming that met another configuration, code, package or
machine: `{"images": 1280, "time": ..., "config": {key: [old, new]}, "environment": {...}}`.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from rediffuse.config.compose import leaves
from rediffuse.errors import RunError
from rediffuse.runs import Run
from rediffuse.tracking.jsonl import append, cut_back, lines_since

Changes = dict[str, tuple[Any, Any]]
"""Full keys with what they were and what they are; None where there is none."""

DECISIVE = (
    "rng_scheme", "code_sha256", "python", "packages.torch", "packages.numpy", "torch",
    "cpu.model", "gpus", "gpu_driver", "device", "ranks",
)  # fmt: skip
"""What of `environment.json`, beside the data, decides bits."""


class Drift(NamedTuple):
    """What one resuming changed, after so many images."""

    images_seen: int
    config: Changes
    environment: Changes

    @property
    def everything(self) -> Changes:
        """What changed, decisive or not."""
        return self.config | self.environment

    @property
    def decisive(self) -> Changes:
        """What of it changes the weights, or may."""
        return self.config | {k: v for k, v in self.environment.items() if decides(k)}

    def told(self, changes: Changes) -> list[str]:
        """Some of its changes, one line each."""
        return [
            f"{key} after {self.images_seen:,} images: {short(was)}, then {short(now)}"
            for key, (was, now) in changes.items()
        ]


def read(run: Run) -> list[Drift]:
    """Every drift of a run, in order.

    Raises:
        RunError: if a line is damaged.
    """
    path = run.logs / "drift.jsonl"
    try:
        return [
            Drift(
                line["images"],
                {key: (was, now) for key, (was, now) in line["config"].items()},
                {key: (was, now) for key, (was, now) in line["environment"].items()},
            )
            for line, _ in lines_since(path, 0)
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RunError(f"{path} is damaged; restore it") from None


def note(run: Run, config: Changes, environment: Mapping[str, Any], images_seen: int) -> Drift:
    """Record what a process that goes on at `images_seen` finds changed; hold the run's lock.

    What was recorded after that point counts from here: training went back behind it.
    """
    lines, before, after = read(run), leaves(began(run)), leaves(environment)
    for line in lines:
        before |= {key: now for key, (_, now) in line.environment.items()}
    found = {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    }
    for line in reversed([line for line in lines if line.images_seen > images_seen]):
        config, found = _chained(line.config, config), _chained(line.environment, found)
    path = run.logs / "drift.jsonl"
    cut_back(path, images_seen)
    if config or found:
        append(path, images_seen, {"config": config, "environment": found})
    return Drift(images_seen, config, found)


def began(run: Run) -> dict[str, Any]:
    """What `environment.json` says of where a run began.

    Raises:
        RunError: if it cannot be read.
    """
    try:
        known: dict[str, Any] = json.loads(run.environment.read_bytes())
        return {**known}  # a TypeError for what is no mapping
    except (OSError, ValueError, TypeError, RecursionError) as broken:
        raise RunError(f"{run.environment} cannot be read ({broken}); restore it") from None


def decides(key: str) -> bool:
    """Whether bits may depend on this key of the environment."""
    return f"{key}.".startswith(tuple(f"{name}." for name in DECISIVE))


def reasons(run: Run) -> list[str]:
    """Why a run is no longer comparable bit for bit with one that went straight through."""
    return [line for drift in read(run) for line in drift.told(drift.decisive)]


def short(value: Any) -> str:
    """A value in a few characters."""
    text = "absent" if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:16]}..."


def _chained(first: Changes, second: Changes) -> Changes:
    """Two changes, one after the other, as one."""
    both = {}
    for key in dict.fromkeys((*first, *second)):
        was, now = first.get(key) or second[key]
        both[key] = (was, second[key][1] if key in second else now)
    return {key: (was, now) for key, (was, now) in both.items() if was != now}
