"""Which images are held out: the same ones in every run."""

import numpy as np
import torch
from jaxtyping import Int64

from rediffuse.randomness import Stream, permuted


def split(
    length: int, fraction: float
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " held_out"]]:
    """Row numbers to train on, ascending, and a `fraction` of [0, length) to hold out.

    The choice depends on `length` alone, never on a run's seed, and a larger fraction contains a
    smaller one. At least one row is held out unless `fraction` is 0, and at least one is left
    unless it is 1, which shuffles a part. What is held out comes in random order, so that its first
    rows are a fair sample of it.
    """
    first = torch.zeros(1, dtype=torch.long)
    order = permuted(torch.arange(length), length, 0, first, Stream.SPLIT).numpy()
    count = max(round(fraction * length), int(fraction > 0))
    count = min(count, length if fraction == 1 else length - 1)
    return np.sort(order[count:]), order[:count]
