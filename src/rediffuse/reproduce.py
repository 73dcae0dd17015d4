"""Train a run again from what it recorded, and find where the two part.

`logs/digests.jsonl` is what is compared: its first line is what the run began with, every other one
holds the exact loss and digests of weights, average and moments after some step.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rediffuse import drift, private, runs
from rediffuse.config.compose import checked, leaves
from rediffuse.config.schema import Config
from rediffuse.drift import Drift
from rediffuse.errors import RunError
from rediffuse.images import Images, located, prepare
from rediffuse.launch import batches_of, fresh, load_config, set_up, surroundings
from rediffuse.legality import check
from rediffuse.processes import alone, exit_code
from rediffuse.progress import Progress
from rediffuse.runs import Run
from rediffuse.session import beginning
from rediffuse.tracking.jsonl import append, lines_since, write_atomically
from rediffuse.training import checkpoint, hooks
from rediffuse.training.devices import Devices, choose
from rediffuse.training.loop import Hook, Stop
from rediffuse.training.loop import train as loop
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe
from rediffuse.words import json_text, say

Row = dict[str, Any]
Tree = dict[str, Any]


class Record(NamedTuple):
    """What a run wrote down to be compared with."""

    began: Row
    rows: list[Row]
    parts: list[tuple[int, Config]]  # how it trained, and the images seen where that began
    drifts: list[Drift]

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
    def asked(self) -> int:
        """How many rows there are to be compared."""
        return len(self._rows)

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
    as_json: bool = False,
) -> int:
    """Train a run again, for so many steps or as far as it came; return the exit code.

    0 if every digest is equal; 1 if the two part, which is where training stops, or if training
    ends before the last digest.

    Raises:
        RediffuseError: if the run cannot be found or trained, or has no digests.
    """
    alone("reproduce")
    run = runs.find_run(runs.runs_root(root), word)
    record = read_record(run)
    config = record.parts[0][1]
    rows = [r for r in record.rows if not steps or r["images"] <= steps * record.batch_size]
    if not rows:
        raise RunError(f"run {run.id} has no digests of its first steps in {run.digests}")
    check(config, trusted)
    devices = choose(config.device)
    set_up(config, devices)
    data = located(run, config.data, trusted)
    images = prepare(data, run.directory.parent, trusted, whole=True)
    state, recipe = fresh(config, images, devices, trusted)
    now = surroundings(images, devices)
    differing = differences(
        {**drift.began(run), "began": _plain(record.began)},
        {**now, "began": _plain(beginning(config, recipe))},
        own_parts=bool(trusted),
    )
    told = (lambda line: None) if as_json else say
    told(f"run     {run.id}, {len(rows)} digests up to {rows[-1]['images']:,} images")
    for line in differing:
        told(f"differs {line}")
    kept = None
    with (
        Progress(rows[-1]["images"]) as bar,
        closing(hooks.Interrupts(devices)) as interrupts,
        _copied(run, config, now, copy_root or run.directory.parent, keep) as copy,
    ):
        compare = _Comparison(rows, copy)
        ends = [*(images_seen for images_seen, _ in record.parts[1:]), rows[-1]["images"]]
        for (_, part), end in zip(record.parts, ends, strict=True):
            if part is not config:
                state, recipe = _gone_on(state, part, images, devices, copy, trusted)
            batches = batches_of(part, images, devices).since(state.images_seen)
            looking: list[Hook] = [
                lambda state, _: bar.move(state.images_seen),
                compare,
                interrupts,
            ]
            loop(recipe, state, batches, looking, min(end, rows[-1]["images"]))
            if compare.parted or compare.equal == compare.asked or interrupts.received:
                break
        if keep:
            checkpoint.save_checkpoint(state, copy.checkpoints)
            ended: runs.Status = "KILLED" if interrupts.received else "FINISHED"
            copy.update(images_seen=state.images_seen, status=ended)
            kept = copy
    facts = _found(run, compare, config, record, differing, kept)
    signal = interrupts.received if facts["verdict"] == "UNFINISHED" else None
    if as_json:
        say(json_text(facts))
    else:
        _tell(facts, kept, signal.name if signal else "")
    return exit_code(signal) if signal else int(facts["verdict"] != "PASS")


def read_record(run: Run) -> Record:
    """Read a run's digests, and how it trained from where to where.

    Raises:
        RunError: if there are none, or not from the beginning on.
    """
    lines = [line for line, _ in lines_since(run.digests, 0)]
    began = lines[0].get("config") if lines else None
    began = began if isinstance(began, dict) else {}
    size = began.get("training.batch_size")
    if not isinstance(size, int) or size < 1 or len(lines) < 2:
        raise RunError(
            f"run {run.id} has no digests from its first step on in {run.digests}; only a run "
            "that wrote them can be compared"
        )
    drifts = drift.read(run)
    tree, parts = _undisturbed(load_config(run)), []
    for line in reversed(drifts):
        if line.config and line.images_seen:  # with 0 the run began anew
            parts.append((line.images_seen, checked(tree)))
            tree = drift.undone(tree, line.config, began)
    parts.append((0, checked(tree)))
    return Record(lines[0], lines[1:], parts[::-1], drifts)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], own_parts: bool) -> list[str]:
    """Name what can decide bits and is not what it was: `key: then, now value`.

    The checkout that a process stands in matters only to parts of the user's own.
    """
    known, found = leaves(then), leaves(now)
    others = ("began.", "data.", *(("git.",) if own_parts else ()))
    return [
        f"{key.removeprefix('began.').removeprefix('config.')}: {drift.short(known.get(key))}, "
        f"now {drift.short(found.get(key))}"
        for key in dict.fromkeys((*known, *found))
        if (key.startswith(others) or drift.decides(key)) and known.get(key) != found.get(key)
    ]


def _gone_on(
    state: TrainState,
    config: Config,
    images: Images,
    devices: Devices,
    copy: Run,
    trusted: Sequence[str],
) -> tuple[TrainState, Recipe]:
    """The same state in a recipe that resuming changed, by way of a checkpoint as there."""
    set_up(config, devices)
    again, recipe = fresh(config, images, devices, trusted)
    checkpoint.load_checkpoint(again, checkpoint.save_checkpoint(state, copy.checkpoints))
    return again, recipe


def _undisturbed(config: Config) -> Tree:
    """Nothing is shown, sent or stopped early."""
    tree = config.model_dump()
    tree["training"] |= {"stop_after_images": None, "previews": False}
    tree["tracking"]["trackers"] = []
    return tree


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
            private.write_config(copy, config)
            if run.private.exists():
                write_atomically(copy.private, run.private.read_bytes(), mode=0o600)
            write_atomically(copy.environment, json.dumps(facts, indent=1).encode())
            yield copy
    finally:
        if not keep:
            shutil.rmtree(copy.directory, ignore_errors=True)


def _found(
    run: Run,
    compare: _Comparison,
    config: Config,
    record: Record,
    differing: list[str],
    kept: Run | None,
) -> Tree:
    """What came of it, as plain data."""
    size, parted = record.batch_size, bool(compare.parted)
    finished = parted or compare.equal == compare.asked
    return {
        "run": run.id,
        "verdict": "FAIL" if parted else "PASS" if finished else "UNFINISHED",
        "digests": compare.asked,
        "equal": compare.equal,
        "equal_up_to_images": compare.before,
        "equal_up_to_step": compare.before // size,
        "part_at_images": compare.row["images"] if parted else None,
        "part_at_step": compare.row["images"] // size if parted else None,
        "part_in": compare.parted,
        "differing": differing,
        "likely": _causes(compare.row["images"], config, record, differing) if parted else [],
        "copy": str(kept.directory) if kept else None,
    }


def _causes(images: int, config: Config, record: Record, differing: list[str]) -> list[str]:
    causes = list(differing)
    for line in record.drifts:
        if line.images_seen < images:  # the configuration was followed, the rest cannot be
            causes += line.told({k: v for k, v in line.decisive.items() if k not in line.config})
    if config.determinism == "fast":
        causes.append("determinism=fast, which leaves the choice of kernels to torch")
    return causes or ["another machine or nondeterministic kernels"]


def _tell(facts: Tree, kept: Run | None, signal: str) -> None:
    if kept:
        say(f"copy    {kept.id} in {kept.directory}")
    if facts["verdict"] == "PASS":
        say(f"PASS: {facts['equal']} digests equal up to {facts['equal_up_to_images']:,} images")
    elif facts["verdict"] == "UNFINISHED":
        ended = f"{signal} received" if signal else "training ended before the last digest"
        told = f"{facts['equal']} of {facts['digests']} digests compared, all equal"
        say(f"UNFINISHED: {ended}; {told}")
    else:
        say(
            f"FAIL: they part at step {facts['part_at_step']} ({facts['part_at_images']:,} images) "
            f"in {', '.join(facts['part_in'])}; equal up to step {facts['equal_up_to_step']}"
        )
        for cause in facts["likely"]:
            say(f"likely  {cause}")
