"""Train a run again from what it recorded, and find where the two part.

`logs/digests.jsonl` is what is compared: its first line is what the run began with, every other one
holds the exact loss and digests of weights, average and moments after some step.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from rediffuse import runs
from rediffuse.config.compose import checked, dump_yaml, leaves
from rediffuse.config.schema import Config
from rediffuse.data.packing import Packed
from rediffuse.errors import RunError
from rediffuse.images import Images, prepare
from rediffuse.launch import EXIT_CODES, batches_of, fresh, load_config
from rediffuse.legality import check
from rediffuse.randomness import RNG_SCHEME
from rediffuse.runs import Run
from rediffuse.session import beginning, say
from rediffuse.tracking.jsonl import append, lines_since, write_atomically
from rediffuse.training import checkpoint, hooks
from rediffuse.training.devices import choose, set_determinism
from rediffuse.training.loop import Stop
from rediffuse.training.loop import train as loop
from rediffuse.training.state import TrainState

Row = dict[str, Any]

# What of `environment.json` decides bits.
_DECISIVE = (
    "data", "rng_scheme", "code_sha256", "python", "packages.torch", "packages.numpy",
    "torch", "cpu.model", "gpus", "gpu_driver",
)  # fmt: skip


class Record(NamedTuple):
    """What a run wrote down to be compared with."""

    began: Row
    rows: list[Row]  # up to where resuming changed how it trains
    changed: frozenset[str]  # the keys that any resuming changed
    changed_at: int | None  # the images seen when the first one did

    @property
    def batch_size(self) -> int:
        """The images of a step, as the run began."""
        size: int = self.began["config"]["training.batch_size"]
        return size


class _Comparison:
    """A hook that stops training at the first row that is not what was recorded."""

    def __init__(self, rows: Sequence[Row], copy: Run) -> None:
        self._rows, self._copy = rows, copy
        self.equal = 0
        self.parted: list[str] = []

    @property
    def row(self) -> Row:
        """The row that comes next."""
        return self._rows[self.equal]

    @property
    def before(self) -> int:
        """The images seen at the last row that was equal."""
        return self._rows[self.equal - 1]["images"] if self.equal else 0

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Compare, if this step has a row."""
        if self.equal == len(self._rows) or state.images_seen < self.row["images"]:
            return
        found = hooks.digests(state, metrics)
        append(self._copy.digests, state.images_seen, found)
        was = {name: value for name, value in self.row.items() if name not in _KEYS}
        if state.images_seen != self.row["images"]:  # another batch size never meets the row
            self.parted = ["images"]
        else:
            self.parted = [n for n in {**was, **found} if was.get(n) != found.get(n)]
        if self.parted:
            raise Stop("parted")
        self.equal += 1


_KEYS = ("images", "time")


def reproduce(
    word: str,
    *,
    steps: int | None = None,
    keep: bool = False,
    root: Path | None = None,
    copy_root: Path | None = None,
    trusted: Sequence[str] = (),
) -> int:
    """Train a run again, for so many steps or as far as it came; return the exit code.

    0 if every digest is equal, 1 if the two part, which is where training stops.

    Raises:
        RediffuseError: if the run cannot be found or trained, or has no digests.
    """
    run = runs.find_run(runs.runs_root(root), word)
    record = read_record(run)
    config = _as_it_began(load_config(run), record)
    rows = [r for r in record.rows if not steps or r["images"] <= steps * record.batch_size]
    if not rows:
        raise RunError(f"run {run.id} has no digests of its first steps in {run.digests}")
    check(config, trusted)
    devices = choose(config.device)
    if devices.ranks > 1:
        raise RunError("reproduce compares one process; start it without torchrun or accelerate")
    set_determinism(
        config.determinism, devices.device, config.threads, compiled=config.training.compile
    )
    images = prepare(config.data, run.directory.parent, trusted)
    state, recipe = fresh(config, images, devices, trusted)
    now = _facts(images)
    differing = differences(
        {**_environment(run), "began": _plain(record.began)},
        {**now, "began": _plain(beginning(config, recipe))},
        own_parts=bool(trusted),
    )
    differing += [
        f"data.{part}: its packed pixels are not those of the fingerprint"
        for part in damaged(images.packed)
    ]
    interrupts = hooks.Interrupts()
    say(f"run     {run.id}, {len(rows)} digests up to {rows[-1]['images']:,} images")
    for line in differing:
        say(f"differs {line}")
    try:
        with _copied(run, config, now, copy_root or run.directory.parent, keep) as copy:
            compare = _Comparison(rows, copy)
            batches = batches_of(config, images, devices).since(0)
            loop(recipe, state, batches, [compare, interrupts], rows[-1]["images"])
            if keep:
                step = state.images_seen // config.training.batch_size
                checkpoint.save_checkpoint(state, copy.checkpoints, step)
                ended: runs.Status = "KILLED" if interrupts.received else "FINISHED"
                copy.update(images_seen=state.images_seen, status=ended)
                say(f"copy    {copy.id} in {copy.directory}")
    finally:
        interrupts.close()
    if interrupts.received and not compare.parted and compare.equal < len(rows):
        say(f"{interrupts.received.name} received: {compare.equal} of {len(rows)} digests equal")
        return EXIT_CODES[interrupts.received.name]
    return _verdict(compare, config, record, differing)


def read_record(run: Run) -> Record:
    """Read a run's digests, as far as they are of one way to train.

    Raises:
        RunError: if there are none, or not from the beginning on.
    """
    lines = [line for line, _ in lines_since(run.digests, 0)]
    config = lines[0].get("config") if lines else None
    size = config.get("training.batch_size") if isinstance(config, dict) else None
    if not isinstance(size, int) or size < 1 or len(lines) < 2:
        raise RunError(
            f"run {run.id} has no digests from its first step on in {run.digests}; only a run "
            "that wrote them can be compared"
        )
    drift = [line for line, _ in lines_since(run.logs / "drift.jsonl", 0) if line["images"]]
    changed = frozenset(key for line in drift for key in line if key not in _KEYS)
    until = min((line["images"] for line in drift), default=None)
    rows = [row for row in lines[1:] if until is None or row["images"] <= until]
    return Record(lines[0], rows, changed, until)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], own_parts: bool) -> list[str]:
    """Name what can decide bits and is not what it was: `key: then, now value`.

    The checkout that a process stands in matters only to parts of the user's own.
    """
    known, found = leaves(then), leaves(now)
    decisive = ("began", *_DECISIVE, *(("git",) if own_parts else ()))
    return [
        f"{key.removeprefix('began.').removeprefix('config.')}: {_short(known.get(key))}, "
        f"now {_short(found.get(key))}"
        for key in dict.fromkeys((*known, *found))
        if f"{key}.".startswith(tuple(f"{name}." for name in decisive))
        and known.get(key) != found.get(key)
    ]


def damaged(packed: Packed) -> list[str]:
    """The parts whose pixels or labels are not those that were packed."""
    return [
        name
        for name, part in packed.parts.items()
        if packed.facts["parts"][name]["sha256"]
        != _sha256(part.images, np.load(packed.folder / name / "labels.npy", allow_pickle=False))
    ]


def _sha256(images: np.ndarray, labels: np.ndarray) -> str:
    found = hashlib.sha256(repr(images.shape[1:]).encode())
    for start in range(0, len(images), 1024):
        found.update(np.ascontiguousarray(images[start : start + 1024]).data)
    found.update(labels.astype("<i8").tobytes())
    return found.hexdigest()


def _as_it_began(config: Config, record: Record) -> Config:
    """Take back what resuming changed; nothing is shown, sent or stopped early."""
    tree, began = config.model_dump(), record.began["config"]
    for key in record.changed:
        *sections, last = key.split(".")
        at = tree
        for section in sections:
            at = at.get(section, {})
        if key in began:
            at[last] = began[key]
        else:
            at.pop(last, None)
    tree["training"] |= {"stop_after_images": None, "previews": False}
    tree["tracking"]["trackers"] = []
    return checked(tree)


def _facts(images: Images) -> dict[str, Any]:
    return {**runs.environment(), "rng_scheme": RNG_SCHEME, "data": images.facts()}


def _environment(run: Run) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(run.environment.read_bytes())
        return {**known}  # a TypeError for what is no mapping
    except (OSError, ValueError, TypeError) as broken:
        raise RunError(f"{run.environment} cannot be read ({broken}); restore it") from None


def _plain(row: Mapping[str, Any]) -> Row:
    """As JSON would bring it back, without when and where."""
    plain: Row = json.loads(json.dumps({k: v for k, v in row.items() if k not in _KEYS}))
    return plain


@contextmanager
def _copied(
    run: Run, config: Config, facts: Mapping[str, Any], root: Path, keep: bool
) -> Iterator[Run]:
    """A run for the copy, which is removed at the end unless it is to be kept."""
    try:
        copy = runs.create(root.expanduser().resolve(), name=f"again {run.id[:12]}", parent=run.id)
    except OSError as failed:
        raise RunError(f"{root}: {failed.strerror}; name another --root-for-copy") from None
    try:
        with runs.locked(copy):
            copy.config.write_text(dump_yaml(config))
            write_atomically(copy.environment, json.dumps(facts, indent=1).encode())
            yield copy
    finally:
        if not keep:
            shutil.rmtree(copy.directory, ignore_errors=True)


def _verdict(compare: _Comparison, config: Config, record: Record, differing: list[str]) -> int:
    if not compare.parted:
        say(f"PASS: {compare.equal} digests equal up to {compare.before:,} images")
        if record.changed_at is not None:
            keys = ", ".join(sorted(record.changed))
            say(f"not compared: after {record.changed_at:,} images resuming changed {keys}")
        return 0
    images, size = compare.row["images"], record.batch_size
    say(
        f"FAIL: they part at step {images // size} ({images:,} images) in "
        f"{', '.join(compare.parted)}; equal up to step {compare.before // size}"
    )
    causes = list(differing)
    if config.determinism == "fast":
        causes.append("determinism=fast, which leaves the choice of kernels to torch")
    for line in causes or ["another machine or nondeterministic kernels"]:
        say(f"likely  {line}")
    return 1


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:16]}..."
