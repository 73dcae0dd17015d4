"""How much memory training takes: an estimate from sizes, and what there was."""

import ctypes
import gc
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rediffuse.data.batches import Batch
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe, batch_losses


@dataclass(frozen=True)
class Memory:
    """Bytes of a training process beyond what it takes to be there at all."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    libraries: int  # what code and its tables take once it has run
    per_image: int  # what the forward pass keeps for the backward, for an image of a micro-batch
    passing: int  # what comes and goes within a step, for an image of a micro-batch

    @property
    def lasting(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.average + self.libraries

    @property
    def each(self) -> int:
        """Bytes for each image of a micro-batch."""
        return self.per_image + self.passing

    def total(self, images: int) -> int:
        """The most bytes at one time in a step of micro-batches of so many images."""
        return self.lasting + images * self.each


# Measured on a CPU, from 32 to 512 images: what a step took beyond its tensors.
_LIBRARIES = 120_000_000
_GAPS = 1.2  # the C library cannot fill every gap between tensors


def estimated(state: TrainState, recipe: Recipe, batch: Batch) -> Memory:
    """Memory from the sizes of tensors: those that are there, and those a forward pass keeps.

    `batch` is a small one, of which a forward pass is made.
    """
    weights = sum(p.nbytes for p in state.network.parameters())
    count = len(batch.index)
    kept = _kept_for_backward(recipe, batch, state.network)
    cast = sum(p.numel() for p in state.network.parameters()) * recipe.precision.itemsize
    per_image = max(0, kept.total - (0 if recipe.precision is torch.float32 else cast)) // count
    on_cpu = recipe.devices.device.type == "cpu"
    return Memory(
        weights=weights,
        gradients=weights + (0 if recipe.precision is torch.float32 else cast),
        optimizer=2 * weights,
        average=weights if state.average else 0,
        libraries=_LIBRARIES if on_cpu else 0,
        per_image=round(per_image * (_GAPS if on_cpu else 1)),
        # In the backward pass three of the largest tensors stand beside what is kept.
        passing=(3 * kept.largest + 4 * batch.x_0.nbytes) // count,
    )


@dataclass
class _Kept:
    total: int = 0
    largest: int = 0


def _kept_for_backward(recipe: Recipe, batch: Batch, network: nn.Module) -> _Kept:
    """The bytes of all that autograd saves of one forward pass, each storage once."""
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    alive: list[Tensor] = []  # or a storage's place would be given to the next one
    found = _Kept()

    def seen(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            known.add(place)
            alive.append(tensor)
            size = tensor.untyped_storage().nbytes()
            found.total += size
            found.largest = max(found.largest, size)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        losses, _ = batch_losses(recipe, batch)
    del losses
    return found


# What the machine says of memory


def free_bytes(device: torch.device) -> int:
    """Memory that the machine has left for this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # not there on every bare GPU machine

    return int(psutil.virtual_memory().available)


def resident(device: torch.device) -> int:
    """Bytes in use by this process; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _told("VmRSS") or 0


def give_back() -> None:
    """Give the system what tensors have freed, which `keep_freed_memory` keeps."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def forget_peak(device: torch.device) -> None:
    """Begin to watch for the most bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # of proc(5): the peak begins anew


def peak(device: torch.device) -> int:
    """The most bytes there were in use since `forget_peak`; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _told("VmHWM") or 0


def _told(name: str) -> int | None:
    """A number of bytes that Linux tells of this process."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
