"""Checkpoints: a whole training state as safetensors and JSON, and back.

How their files are committed, verified and found is told in `rediffuse.training.committed`.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rediffuse.errors import CheckpointError, TrainingError
from rediffuse.reading import open_regular
from rediffuse.tensors import FETCHING
from rediffuse.training.committed import (
    LEARNED,
    SKIPPED,
    STATE,
    WEIGHTS,
    commit,
    facts,
    json_bytes,
    verify,
)
from rediffuse.training.state import Sums, TrainState, UsualLoss

_HEADER_BYTES = 10_000_000  # a tensor's name takes a hundred or two


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
        there[LEARNED] = state.learned.state_dict()
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
        **{name: getattr(state, name).item() for name in SKIPPED},
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "since_log": state.since_log.as_json(),
        "this_epoch": state.this_epoch.as_json(),
        "usual_loss": state.usual_loss.as_json(),
    }
    return Snapshot(state.step, state.images_seen, tensors, json_bytes(facts))


def write(saved: Snapshot, folder: Path) -> Path:
    """Write a checkpoint below `folder`; it is there completely or not at all (`commit`).

    Raises:
        TrainingError: if there is no room for it, or the folder cannot be written.
    """
    files: dict[str, Callable[[], bytes]] = {
        name: partial(save, tensors) for name, tensors in saved.tensors.items()
    }
    return commit(folder, saved.step, {**files, STATE: lambda: saved.state}, saved.bytes_needed)


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
    files, saved = verify(checkpoint), facts(checkpoint)
    for name in (
        "model.safetensors",
        "optimizer.safetensors",
        *([LEARNED] if state.learned else []),
    ):
        if name not in files:
            raise CheckpointError(f"{checkpoint.name}: {name} is not in its manifest")
    _load_module(state.network, checkpoint / "model.safetensors")
    if state.average and "average.safetensors" in files:
        _load_module(state.average.network, checkpoint / "average.safetensors")
    elif state.average:  # switched on since: the weights that the network began with are long gone
        state.average.restart(state.network)
    if state.learned:
        _load_module(state.learned, checkpoint / LEARNED)
    _load_optimizer(state, _tensors(checkpoint / "optimizer.safetensors"))
    try:
        _load_facts(state, saved)
    except (ValueError, KeyError) as broken:
        raise CheckpointError(f"{checkpoint.name}: its {STATE} is damaged ({broken})") from None


def _load_facts(state: TrainState, saved: Mapping[str, Any]) -> None:
    """Restore what is no tensor; `facts` has checked the counters and the metrics.

    Raises:
        ValueError, KeyError: for what `snapshot` did not write.
    """
    if state.scaler and saved["scaler"]:
        state.scaler.load_state_dict(_numbers(saved["scaler"]))
    if type(saved["best_loss"]) not in (int, float, type(None)):
        raise ValueError("the best loss is no number")
    if type(saved["checks_since_best"]) is not int:
        raise ValueError("the checks since the best are no number")
    for name in _COUNTERS:
        setattr(state, name, saved[name])
    for name in SKIPPED:
        setattr(state, name, torch.tensor(saved[name]))
    state.since_log = Sums.from_json(saved["since_log"])
    state.this_epoch = Sums.from_json(saved["this_epoch"])
    state.usual_loss = UsualLoss.from_json(saved["usual_loss"])


def _numbers(saved: Any) -> dict[str, float]:
    if isinstance(saved, dict) and all(type(value) in (int, float) for value in saved.values()):
        return saved
    raise ValueError("the loss scaler has other values than numbers")


def load_weights(network: nn.Module, checkpoint: Path, weights: str = "average") -> str:
    """Load only what sampling needs: the average, or the `raw` weights; return which it was.

    Raises:
        CheckpointError: if the checkpoint does not verify, does not fit, or has no average.
    """
    file = WEIGHTS[weights]
    if file not in verify(checkpoint):
        raise CheckpointError(f"{checkpoint} keeps no average; use --weights raw")
    _load_module(network, checkpoint / file)
    return weights


def load_schedule(schedule: nn.Module, checkpoint: Path) -> None:
    """Load a schedule that was learned with the network, from a checkpoint that has verified.

    Raises:
        CheckpointError: if the checkpoint keeps none, or another one.
    """
    _load_module(schedule, checkpoint / LEARNED, "schedule.")


_COUNTERS = ("images_seen", "step", "metrics", "best_loss", "checks_since_best")


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
        with open_regular(file) as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > _HEADER_BYTES:
            raise CheckpointError(f"{file} cannot be read: its header would have {header:,} bytes")
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as broken:
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
