"""Batches: global image i is one row with one augmentation, whoever computes it.

Nothing here has a state. The batch size, its division among ranks and micro-batches, and a loader
thread only regroup the same images.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import count as counting
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from rediffuse.data.ahead import ahead
from rediffuse.data.pixels import Level, augment, to_model
from rediffuse.errors import ConfigError, DataError
from rediffuse.randomness import order
from rediffuse.tensors import sent

_CPU = torch.device("cpu")
_ORDERED_AT_ONCE = 16_384  # images: `order` costs milliseconds a call, and little more for many


class Batch(NamedTuple):
    """Images in the model's range; `cond` are the numbers of their classes (None: without).

    `index` are global image indices, kept on the CPU: what is keyed by them is computed in float64.
    """

    index: Int[Tensor, " batch"]  # type: ignore[assignment]  # tuple.index is not missed
    x_0: Float[Tensor, "batch channel height width"]
    cond: Int[Tensor, " batch"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """The images that a run trains on, for ever, in their keyed order.

    `rows` are those of `images` to train on (None: all). `batch_size` counts the images of one
    optimizer step over all ranks and micro-batches. With `on_device`, `device` holds all of
    `images` as uint8; otherwise each step is gathered from them, memory-mapped as they may be: if
    `workers` is 1, by a thread that is one step ahead.

    Raises:
        ConfigError: if `batch_size` does not divide, or `crop_padding` is not less than the images.
        DataError: if there is no image.
    """

    images: UInt8[np.ndarray, "images channel height width"]
    labels: Int64[np.ndarray, " images"] | None = None
    rows: Int64[np.ndarray, " rows"] | None = None
    seed: int
    batch_size: int
    micro_batches: int = 1
    rank: int = 0
    ranks: int = 1
    flip: bool = False
    crop_padding: int = 0
    mean: Level = 0.5
    std: Level = 0.5
    device: torch.device = _CPU
    on_device: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise DataError("there is no image to train on")
        pieces, size = self.ranks * self.micro_batches, min(self.images.shape[2:])
        if self.batch_size % pieces:
            below = self.batch_size // pieces * pieces
            raise ConfigError(
                f"training.batch_size={self.batch_size} does not divide into {self.ranks} ranks x "
                f"{self.micro_batches} micro-batches; {below or pieces} or {below + pieces} does"
            )
        if self.crop_padding >= size:
            raise ConfigError(
                f"data.crop_padding={self.crop_padding} is too much for images of {size} pixels; "
                f"at most {size - 1} can be reflected"
            )

    def __len__(self) -> int:
        """Images in an epoch."""
        return len(self.images if self.rows is None else self.rows)

    def since(self, images_seen: int) -> Iterator[list[Batch]]:
        """Yield, for ever, this rank's micro-batches of each step from image `images_seen` on.

        Steps run on over the end of an epoch and are always full.
        """
        shares = self._shares(images_seen)
        if self.on_device or not self.workers:
            yield from map(self._finished, map(self._gathered, shares))
            return
        with ThreadPoolExecutor(1) as pool:
            yield from map(self._finished, ahead(pool, self._gathered, shares, 1))

    def _shares(self, images_seen: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's global image indices, and their places in `rows`, step after step."""
        share = self.batch_size // self.ranks
        mine = torch.arange(share) + self.rank * share
        block = min(_ORDERED_AT_ONCE, len(self))  # `order` takes each epoch by itself
        steps = torch.arange(max(1, block // self.batch_size)) * self.batch_size
        for start in counting(images_seen, len(steps) * self.batch_size):
            index = start + steps[:, None] + mine
            places = order(index.flatten(), len(self), self.seed).view_as(index)
            yield from zip(index, places, strict=True)

    def _gathered(self, share: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        index, places = share
        rows = places.numpy() if self.rows is None else self.rows[places.numpy()]
        pixels = (
            self._resident[sent(torch.from_numpy(rows), self.device)]
            if self.on_device
            else self._sendable(self.images[rows])
        )
        return index, pixels, None if self.labels is None else self._sendable(self.labels[rows])

    def _finished(self, gathered: tuple[Tensor, Tensor, Tensor | None]) -> list[Batch]:
        index, pixels, cond = gathered
        pixels = augment(
            sent(pixels, self.device),
            index,
            self.seed,
            flip=self.flip,
            crop_padding=self.crop_padding,
        )
        pieces = self.micro_batches
        conds = [None] * pieces if cond is None else sent(cond, self.device).chunk(pieces)
        return [
            Batch(i, to_model(p, self.mean, self.std), c)
            for i, p, c in zip(index.chunk(pieces), pixels.chunk(pieces), conds, strict=True)
        ]

    @cached_property
    def _resident(self) -> Tensor:
        return torch.from_numpy(np.array(self.images)).to(self.device)

    def _sendable(self, array: np.ndarray) -> Tensor:
        """A tensor that is pinned, where that matters, by the thread that gathers it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def fixed(
    images: UInt8[np.ndarray, "images channel height width"],
    labels: Int64[np.ndarray, " images"] | None = None,
    rows: Int64[np.ndarray, " rows"] | None = None,
    count: int | None = None,
    *,
    batch_size: int,
    mean: Level = 0.5,
    std: Level = 0.5,
    device: torch.device = _CPU,
) -> list[Batch]:
    """The first `count` of `rows` (None: all), not augmented, with index 0, 1, ...: for validation.

    The last batch may be smaller. All stay on the device, in float32.
    """
    chosen = np.arange(len(images))[:count] if rows is None else rows[:count]
    batches = []
    for start in range(0, len(chosen), batch_size):
        at = chosen[start : start + batch_size]
        x_0 = to_model(torch.from_numpy(images[at]).to(device), mean, std)
        cond = None if labels is None else torch.from_numpy(labels[at]).to(device)
        batches.append(Batch(torch.arange(start, start + len(at)), x_0, cond))
    return batches
