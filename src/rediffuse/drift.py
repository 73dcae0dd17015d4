"""What changed under a run between its processes, and whether it is still comparable bit for bit.

`logs/drift.jsonl` has a line for every resuming that met another configuration, code, package or
machine: `{"images": 1280, "time": ..., "config": {key: [old, new]}, "environment": {...}}`.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rediffuse.config.compose import checked, is_under, leaves, read_yaml
from rediffuse.config.schema import DECLARED, FREE, Config
from rediffuse.errors import RunError
from rediffuse.reading import read_object, why
from rediffuse.runs import Run, wrong
from rediffuse.tracking.jsonl import append, cut_back, lines_since
from rediffuse.words import masked_tree

Changes = dict[str, tuple[Any, Any]]
"""Full keys with what they were and what they are; None where there is none."""

DECISIVE = (
    "rng_scheme", "code_sha256", "python", "packages.torch", "packages.numpy", "torch",
    "cpu.model", "gpus", "gpu_driver", "device", "ranks",
)  # fmt: skip
"""What of `environment.json`, beside the data, decides bits."""


class _Data(BaseModel):
    """What `environment.json` says of the images, as far as anything depends on it."""

    model_config = ConfigDict(strict=True)

    class_names: list[str] | None = None
    train_images: int | None = None


class _Environment(BaseModel):
    """What `environment.json` holds; other keys may stand there, too."""

    model_config = ConfigDict(strict=True)

    data: _Data | None = None
    packages: dict[str, str | None] | None = None
    git: dict[str, Any] | None = None


class _Line(BaseModel):
    """A line of `drift.jsonl`."""

    images: int = Field(ge=0)
    config: dict[str, tuple[Any, Any]]
    environment: dict[str, tuple[Any, Any]]


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
        lines = [_Line.model_validate(line) for line, _ in lines_since(path, 0)]
    except ValidationError as damage:
        raise RunError(f"{path} is damaged: {wrong(damage)}; restore it") from None
    return [Drift(line.images, line.config, line.environment) for line in lines]


def note(run: Run, config: Changes, environment: Mapping[str, Any], images_seen: int) -> Drift:
    """Record what a process that goes on at `images_seen` finds changed; hold the run's lock.

    What was recorded after that point counts from here: training went back behind it.
    """
    lines = read(run)
    before, after = masked_tree(leaves(began(run))), masked_tree(leaves(environment))
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
        known = read_object(run.environment)
        _Environment.model_validate(known)
    except ValidationError as damage:
        raise RunError(f"{run.environment} is damaged: {wrong(damage)}; restore it") from None
    except (OSError, ValueError) as broken:
        raise RunError(f"{run.environment} cannot be read ({why(broken)}); restore it") from None
    return known


def class_names(environment: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of what `began` returned; none if it does not say."""
    return tuple((environment.get("data") or {}).get("class_names") or ())


def recorded_config(run: Run) -> dict[str, Any]:
    """The configuration that a run has recorded, by full keys, without what may change freely.

    It is the one that the run began with, in the first line of its digests, and every change that
    a resume declared. Empty where the run has not begun to train.

    Raises:
        RunError: if a line is damaged.
    """
    first = next((line for line, _ in lines_since(run.digests, 0)), {})
    known = first.get("config")
    recorded = dict(known) if isinstance(known, dict) else {}
    for line in read(run) if recorded else ():
        recorded |= {key: now for key, (_, now) in line.config.items()}
    return recorded


def edited(run: Run) -> Changes:
    """What in `config.yaml` is not what the run recorded: somebody edited the file.

    Raises:
        RediffuseError: if a file is damaged.
    """
    if not (recorded := recorded_config(run)):
        return {}
    recorded = masked_tree(recorded)  # what a run wrote down before secrets were masked
    now = masked_tree(leaves(checked(read_yaml(run.config)).model_dump()))
    # A field of the schema that is missing in the record is younger than the run.
    arguments = [key for key in now if key not in recorded and not _is_field(key)]
    return {
        key: (recorded.get(key), now.get(key))
        for key in (*recorded, *arguments)
        if not is_under(key, FREE) and recorded.get(key) != now.get(key)
    }


def refuse_edited(run: Run) -> Changes:
    """Return the declared keys that were edited in `config.yaml`; refuse fixed ones.

    Raises:
        RunError: naming a fixed key, what the run recorded and what the file says now.
    """
    found = edited(run)
    for key, (was, now) in found.items():
        if not is_under(key, DECLARED):
            raise RunError(
                f"{run.config} was edited: {key} is {short(now)} there, and run {run.id} was "
                f"trained with {short(was)}; restore it, or start a new run for another value"
            )
    return found


def undone(tree: dict[str, Any], changes: Changes, known: Collection[str]) -> dict[str, Any]:
    """A configuration before changes; arguments of parts that are not in `known` are removed.

    Raises:
        RunError: if a change is of what a configuration has no place for.
    """
    before = deepcopy(tree)
    for key, (was, _) in changes.items():
        *sections, last = key.split(".")
        at = before
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise RunError(f"a recorded change is of {key}, which no configuration has")
        if was is None and key not in known:
            at.pop(last, None)
        else:
            at[last] = was
    return before


def _is_field(key: str) -> bool:
    """Whether a full key is a field of the schema, not an argument of a part."""
    section, _, name = key.rpartition(".")
    if not section:
        return name in Config.model_fields
    field = Config.model_fields.get(section)
    return field is not None and name in getattr(field.annotation, "model_fields", {})


def decides(key: str) -> bool:
    """Whether bits may depend on this key of the environment."""
    return f"{key}.".startswith(tuple(f"{name}." for name in DECISIVE))


def reasons(run: Run) -> list[str]:
    """Why a run is no longer comparable bit for bit with one that went straight through."""
    changed = [line for drift in read(run) for line in drift.told(drift.decisive)]
    by_hand = [
        f"config.yaml was edited: {key} is {short(now)} there, and the run recorded {short(was)}"
        for key, (was, now) in edited(run).items()
    ]
    return changed + by_hand


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
