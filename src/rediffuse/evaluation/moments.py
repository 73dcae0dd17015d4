"""Mean and covariance of features that come batch by batch."""

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


class Moments(NamedTuple):
    """How many, their mean, and their covariance (over n - 1; 0 for a single one)."""

    n: int
    mean: Float64[Tensor, " feature"]
    covariance: Float64[Tensor, "feature feature"]


def moments(features: Float[Tensor, "n feature"]) -> Moments:
    """Count one batch, in float64.

    Raises:
        ValueError: if it is empty, or not finite.
    """
    x = features.double()
    if not len(x) or not x.isfinite().all():
        raise ValueError("moments need at least one row of finite features")
    mean = x.mean(0)
    centred = x - mean
    return Moments(len(x), mean, centred.mT @ centred / max(1, len(x) - 1))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together (Chan, Golub & LeVeque 1983), in any order."""
    n = a.n + b.n
    apart = b.mean - a.mean
    scatter = (a.n - 1) * a.covariance + (b.n - 1) * b.covariance
    scatter += (a.n * b.n / n) * torch.outer(apart, apart)
    return Moments(n, a.mean + (b.n / n) * apart, scatter / (n - 1))


def merged(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts together: of batches, of seed blocks, of processes."""
    return reduce(merge, parts)


def moments_without(
    features: Float[Tensor, "n feature"], group: Int64[Tensor, " n"]
) -> Iterator[Moments]:
    """Yield the moments of all rows but those of group 0, of group 1, and so on."""
    x = features.double()
    centred = x - x.mean(0)
    scatter = centred.mT @ centred
    for number in range(int(group.max()) + 1):
        rows = centred[group == number]
        n = len(x) - len(rows)
        mean = -rows.sum(0) / n  # of the others, whose sum with these is 0
        rest = scatter - rows.mT @ rows - n * torch.outer(mean, mean)
        yield Moments(n, x.mean(0) + mean, rest / max(1, n - 1))
