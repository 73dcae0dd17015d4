"""Checkpoints: safetensors and JSON, committed by one rename.

    checkpoints/step-00012000/   named by optimizer steps
        model.safetensors  average.safetensors  optimizer.safetensors  state.json
        learned.safetensors      of a schedule, weighting or times that learn
        manifest.json            sizes and SHA-256 of the others, written last

A folder without a manifest that verifies is not a checkpoint.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count as counting
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rediffuse.errors import CheckpointError, TrainingError
from rediffuse.reading import read_bytes
from rediffuse.tensors import FETCHING
from rediffuse.training.state import Sums, TrainState, UsualLoss

FORMAT = 2
_MANIFEST, _STATE, _LEARNED = "manifest.json", "state.json", "learned.safetensors"
_WEIGHTS = {"model.safetensors", "average.safetensors"}
_MANIFEST_BYTES, _HEADER_BYTES = 1_000_000, 10_000_000  # a tensor's name takes a hundred or two


@dataclass(frozen=True)
class Snapshot:
    """A copy of a state on the CPU, to be written while the state itself trains on."""

    step: int
    images_seen: int
    tensors: dict[str, dict[str, Tensor]]  # by file
    state: bytes  # state.json

    @property
    def bytes_needed(self) -> int:
        """How much room it takes, with a little for headers and the manifest."""
        sizes = (t.nbytes for tensors in self.tensors.values() for t in tensors.values())
        return sum(sizes) + len(self.state) + 256 * 1024


def snapshot(state: TrainState) -> Snapshot:
    """Copy all that a checkpoint holds.

    Raises:
        TrainingError: if a weight, an average or a moment is not finite; such a state is not kept.
    """
    there = {
        "model.safetensors": state.network.state_dict(),
        "optimizer.safetensors": _optimizer_tensors(state),
    }
    if state.average:
        there["average.safetensors"] = state.average.network.state_dict()
    if state.learned:
        there[_LEARNED] = state.learned.state_dict()
    copies = [_copied(named) for named in there.values()]
    tensors = dict(zip(there, copies, strict=True))  # a GPU may still be filling them
    for file, named in there.items():
        if name := _not_finite(named):
            raise TrainingError(
                f"{name} in {file} is not finite after {state.images_seen:,} images: nothing is "
                "saved, and the checkpoint before is untouched"
            )
    facts = {
        **{name: getattr(state, name) for name in _COUNTERS},
        **{name: getattr(state, name).item() for name in _SKIPPED},
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "since_log": state.since_log.as_json(),
        "this_epoch": state.this_epoch.as_json(),
        "usual_loss": state.usual_loss.as_json(),
    }
    return Snapshot(state.step, state.images_seen, tensors, _json(facts))


def write(saved: Snapshot, folder: Path) -> Path:
    """Write a checkpoint below `folder`; it is there completely or not at all.

    The file protocol (Pillai et al. 2014): unique temporary directory beside the final place, every
    file synced, manifest last, one rename, parent synced.

    Raises:
        TrainingError: if there is no room for it, or the folder cannot be written.
    """
    needed = saved.bytes_needed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError("No space left on device")
        return _commit(saved, folder)
    except OSError as failed:
        raise TrainingError(
            f"no checkpoint could be written in {folder}: {failed.strerror or failed} ({needed:,} "
            f"bytes needed, {_free(folder)} free); the one before is untouched"
        ) from failed


def save_checkpoint(state: TrainState, folder: Path) -> Path:
    """Write the whole state below `folder`, now.

    Raises:
        TrainingError: if it is not finite, or there is no room for it.
    """
    return write(snapshot(state), folder)


class Background:
    """Does one thing at a time in a thread of its own; a second one waits for the first."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def start(self, act: Callable[[], None]) -> None:
        """Begin, once what is under way has ended; raise what that raised."""
        self.wait()
        self._under_way = self._pool.submit(act)

    def wait(self) -> None:
        """Wait for what is under way, and raise what it raised."""
        under_way, self._under_way = self._under_way, None
        if under_way:
            under_way.result()


def load_checkpoint(state: TrainState, checkpoint: Path) -> None:
    """Bring a freshly built state to where the checkpoint was.

    Raises:
        CheckpointError: if the checkpoint does not verify, or was made by another network.
    """
    verify(checkpoint)
    saved = facts(checkpoint)
    _load_module(state.network, checkpoint / "model.safetensors")
    if state.average and (checkpoint / "average.safetensors").exists():
        _load_module(state.average.network, checkpoint / "average.safetensors")
    if state.learned:
        _load_module(state.learned, checkpoint / _LEARNED)
    _load_optimizer(state, _tensors(checkpoint / "optimizer.safetensors"))
    if state.scaler and saved["scaler"]:
        state.scaler.load_state_dict(saved["scaler"])
    for name in _COUNTERS:
        setattr(state, name, saved[name])
    for name in _SKIPPED:
        setattr(state, name, torch.tensor(saved[name]))
    state.since_log = Sums.from_json(saved["since_log"])
    state.this_epoch = Sums.from_json(saved["this_epoch"])
    state.usual_loss = UsualLoss.from_json(saved["usual_loss"])


def load_weights(network: nn.Module, checkpoint: Path, weights: str = "average") -> str:
    """Load only what sampling needs: the average, or the `raw` weights; return which it was.

    Raises:
        CheckpointError: if the checkpoint does not verify, does not fit, or has no average.
    """
    verify(checkpoint)
    file = _FILES_OF_WEIGHTS[weights]
    if not (checkpoint / file).exists():
        raise CheckpointError(f"{checkpoint} keeps no average; use --weights raw")
    _load_module(network, checkpoint / file)
    return weights


_FILES_OF_WEIGHTS = {"average": "average.safetensors", "raw": "model.safetensors"}


def digest_of_weights(checkpoint: Path, weights: str) -> str:
    """The SHA-256 that the manifest gives to the file of these weights.

    Raises:
        CheckpointError: if there is no such file.
    """
    try:
        return str(_manifest(checkpoint)[_FILES_OF_WEIGHTS[weights]]["sha256"])
    except KeyError:
        raise CheckpointError(f"{checkpoint} keeps no {weights} weights") from None


def load_schedule(schedule: nn.Module, checkpoint: Path) -> None:
    """Load a schedule that was learned with the network, from a checkpoint that has verified.

    Raises:
        CheckpointError: if the checkpoint keeps none, or another one.
    """
    _load_module(schedule, checkpoint / _LEARNED, "schedule.")


def copy_for_sampling(checkpoint: Path, folder: Path) -> Path:
    """Copy the average, or the weights where none is kept, and what was learned beside them.

    Raises:
        CheckpointError: if what was copied does not verify.
    """
    files = _manifest(checkpoint)
    weights = "average.safetensors" if "average.safetensors" in files else "model.safetensors"
    kept = {name: files[name] for name in (weights, _LEARNED, _STATE) if name in files}
    copy = folder / checkpoint.name
    copy.mkdir()
    for name in kept:
        shutil.copyfile(checkpoint / name, copy / name)
    _write(copy / _MANIFEST, _json({"format": FORMAT, "files": kept}))
    verify(copy)
    return copy


def newest(
    folder: Path, tell: Callable[[str], None] = lambda line: None, *, set_aside: bool = True
) -> Path | None:
    """The newest checkpoint that verifies, or None if there never was one.

    Broken ones are named, and set aside by whoever may write the run.

    Raises:
        CheckpointError: if there are checkpoints and none of them verifies.
    """
    tried = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as refused:
            tried.append(str(refused))
            moved = f"set aside as {_set_aside(checkpoint).name}, " if set_aside else ""
            tell(f"{refused}; {moved}trying the one before")
        else:
            return checkpoint
    aside = [f"{c.name} was set aside" for c in sorted(folder.glob("step-*.corrupt*"))]
    if tried or aside:
        raise CheckpointError(
            f"no checkpoint in {folder} verifies ({'; '.join(tried or aside)}); put one of them "
            "back from a copy, or start a new run"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Every committed checkpoint, oldest first."""
    return sorted(c for c in folder.glob("step-*") if c.name[5:].isdecimal() and not c.is_symlink())


def facts(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says: images seen, losses, counters.

    Raises:
        CheckpointError: if it is not what was written.
    """
    expected = _manifest(checkpoint)[_STATE]["sha256"]
    try:
        if _sha256(checkpoint / _STATE) == expected:
            read: dict[str, Any] = json.loads((checkpoint / _STATE).read_bytes())
            counted = (read[name] for name in ("images_seen", "step", *_SKIPPED))
            if all(type(n) is int and n >= 0 for n in counted):
                return {**read}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{checkpoint.name}: its {_STATE} is damaged")


def verify(checkpoint: Path) -> None:
    """Hold every file to the manifest's size and SHA-256.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    for name, entry in _manifest(checkpoint).items():
        file = checkpoint / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{checkpoint.name}: {name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{checkpoint.name}: {name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            )
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint.name}: {name} is damaged (SHA-256 differs)")


def retain(
    folder: Path, latest: int, *, every_images: int | None = None, metric: str = "validation/loss"
) -> None:
    """Remove old checkpoints, once the newest one verifies.

    Kept are the newest `latest`, the one with the lowest `metric`, and the first one after each
    multiple of `every_images`.
    """
    there = checkpoints(folder)
    verify(there[-1])
    kept = {*there[-latest:], best(folder, metric)}
    if every_images:
        first: dict[int, Path] = {}
        for checkpoint, saved in _all_facts(folder).items():
            first.setdefault(saved["images_seen"] // every_images, checkpoint)
        first.pop(0, None)
        kept |= set(first.values())
    for old in there:
        if old not in kept:
            doomed = old.with_name(f".trash-{old.name}")
            old.rename(doomed)
            shutil.rmtree(doomed)


def best(folder: Path, metric: str = "validation/loss") -> Path | None:
    """The checkpoint with the lowest of a metric, if any has measured it."""
    measured = {
        checkpoint: saved["metrics"].get(metric, math.nan)
        for checkpoint, saved in _all_facts(folder).items()
    }
    return min(
        (c for c, value in measured.items() if math.isfinite(value)),
        key=measured.__getitem__,
        default=None,
    )


def _all_facts(folder: Path) -> dict[Path, dict[str, Any]]:
    """The facts of every checkpoint whose own are not damaged, oldest first."""
    known = {}
    for checkpoint in checkpoints(folder):
        with suppress(CheckpointError):
            known[checkpoint] = facts(checkpoint)
    return known


_SKIPPED = ("skipped_steps", "skipped_in_a_row")
_COUNTERS = ("images_seen", "step", "metrics", "best_loss", "checks_since_best")


def _commit(saved: Snapshot, folder: Path) -> Path:
    final = folder / f"step-{saved.step:08d}"
    building = Path(tempfile.mkdtemp(prefix=f".building-{saved.step:08d}-", dir=folder))
    try:
        building.chmod(0o777 & ~_umask())
        files = {}
        for name, tensors in saved.tensors.items():  # one file in memory at a time
            files[name] = _write(building / name, save(tensors))
        files[_STATE] = _write(building / _STATE, saved.state)
        _write(building / _MANIFEST, _json({"format": FORMAT, "files": files}))
        _sync(building)
        if final.exists():  # a resumed run walks over the same steps again
            shutil.rmtree(final)
        building.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return final


def _manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file; it is itself held to the one way to write it."""
    try:
        raw = read_bytes(checkpoint / _MANIFEST, _MANIFEST_BYTES)
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{checkpoint.name}: format {manifest['format']}, but this version reads {FORMAT}"
            )
        names = set(manifest["files"])
        if raw == _json(manifest) and _STATE in names and names & _WEIGHTS:
            files: dict[str, dict[str, Any]] = manifest["files"]
            return {name: {"bytes": f["bytes"], "sha256": f["sha256"]} for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{checkpoint.name}: its manifest cannot be read")


def _set_aside(checkpoint: Path) -> Path:
    """Rename a broken checkpoint to a name that is free; nothing is ever deleted."""
    names = (f"{checkpoint.name}.corrupt{number or ''}" for number in counting())
    aside = next(a for a in map(checkpoint.with_name, names) if not a.exists())
    return checkpoint.rename(aside)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names = _optimized(state)
    return {
        f"{names[index]}/{key}": torch.as_tensor(value)
        for index, values in state.optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Restore the moments only: rates, betas and decay are what the config says now."""
    index = {name: index for index, name in enumerate(_optimized(state))}
    moments: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        if name not in index:
            raise CheckpointError(f"the optimizer's {full} belongs to no parameter of this network")
        moments.setdefault(index[name], {})[key] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, values in state.optimizer.state.items():
        for key, value in values.items():
            # Fused optimizers walk over memory: a moment must lie there as its parameter does.
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _optimized(state: TrainState) -> list[str]:
    """The names of the optimizer's parameters, in its own order."""
    named = (*state.network.named_parameters(), *state.learned.named_parameters("learned"))
    names = {id(parameter): name for name, parameter in named}
    return [names[id(p)] for group in state.optimizer.param_groups for p in group["params"]]


def _load_module(module: nn.Module, file: Path, prefix: str = "") -> None:
    if not file.exists():
        raise CheckpointError(f"{file} is missing: this checkpoint was made by another recipe")
    saved, wanted = _tensors(file), module.state_dict()
    tensors = {n.removeprefix(prefix): value for n, value in saved.items() if n.startswith(prefix)}
    if differing := sorted(set(tensors) ^ set(wanted)):
        raise CheckpointError(f"{file}: made by another network ({differing[0]} is in one only)")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise CheckpointError(
                f"{file}: {name} is {tuple(tensor.shape)} {tensor.dtype}, but the network has "
                f"{tuple(wanted[name].shape)} {wanted[name].dtype}"
            )
    module.load_state_dict(tensors)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > _HEADER_BYTES:
            raise CheckpointError(f"{file} cannot be read: its header would have {header:,} bytes")
        return load_file(file)
    except (OSError, SafetensorError) as broken:
        raise CheckpointError(f"{file} cannot be read: {broken}") from None


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which a GPU fills by itself: they are there once it has told a value."""
    copies = {}
    for name, tensor in tensors.items():
        by_itself = tensor.device.type in FETCHING
        try:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=by_itself)
        except RuntimeError:  # a container may pin little; a plain copy waits
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=by_itself)
    return copies


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor with a value that is not finite; waits for the devices that they are on."""
    found = [tensor.isfinite().all() for tensor in tensors.values()]
    for device in {flag.device for flag in found}:
        flags = torch.stack([flag for flag in found if flag.device == device])
        if not flags.all():
            return next(n for n, flag in zip(tensors, found, strict=True) if not flag)
    return None


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _write(file: Path, data: bytes) -> dict[str, Any]:
    """Write and sync a file; return what the manifest says of it."""
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
