"""The kernel distance between two sets of features: KID, where they are Inception's."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from rediffuse.evaluation.estimate import Estimate
from rediffuse.evaluation.jackknife import standard_error
from rediffuse.randomness import Stream, permuted

_ROWS = 2048
"""Of a kernel matrix at once: 160 MB for 10,000 columns."""


def squared_mmd(x: Float[Tensor, "n feature"], y: Float[Tensor, "m feature"]) -> float:
    """Unbiased MMD² (Gretton et al. 2012, Lemma 6) with (xᵀy/d + 1)³ (Bińkowski et al. 2018).

    It may fall below 0, since it is unbiased.
    """
    return float(_mmds(x, y, torch.zeros(len(x), 0, dtype=torch.float64))[0])


def kernel_distance(
    x: Float[Tensor, "n feature"],
    y: Float[Tensor, "m feature"],
    seed: int,
    *,
    subsets: int = 100,
    size: int = 1000,
    group: Int64[Tensor, " n"] | None = None,
) -> Estimate:
    """KID: mean and deviation of MMD² over keyed subsets (Bińkowski et al. 2018).

    100 subsets of 1000, each without repetition, are torch-fidelity's defaults. Subsets overlap,
    and those of n <= `size` samples are all the same samples, so that the deviation is no error of
    the mean. The standard error is found by leaving each `group` of x out of every subset.

    Raises:
        ValueError: if a side has fewer images than a subset.
    """
    if min(len(x), len(y)) < size:
        raise ValueError(f"subsets of {size} cannot be taken from {min(len(x), len(y))} images")
    of_group = torch.zeros(len(x), 0) if group is None else F.one_hot(group)
    found = []
    for k in range(subsets):
        rows = subset(len(x), size, seed, 2 * k)
        others = subset(len(y), size, seed, 2 * k + 1)
        found.append(_mmds(x[rows], y[others], of_group[rows].double()))
    drawn = torch.stack(found)
    error = None if group is None else standard_error(drawn[:, 1:].mean(0))
    return Estimate(float(drawn[:, 0].mean()), float(drawn[:, 0].std(correction=0)), error)


def subset(length: int, size: int, seed: int, number: int) -> Tensor:
    """`size` different rows out of `length`, keyed by seed and number."""
    return permuted(torch.arange(size), length, seed, torch.tensor(number), Stream.EVALUATION)


def _mmds(
    x: Float[Tensor, "n feature"],
    y: Float[Tensor, "m feature"],
    of_group: Float64[Tensor, "n group"],
) -> Float64[Tensor, " mmds"]:
    """MMD² of all rows of x, then without each group, from sums of the kernel over groups."""
    if min(len(x), len(y)) < 2:
        raise ValueError("the kernel distance needs at least two images on each side")
    x, y = x.double(), y.double()
    every = torch.cat((torch.ones(len(x), 1, dtype=torch.float64), of_group), dim=1)
    own = torch.zeros(every.shape[1], every.shape[1], dtype=torch.float64)
    across = torch.zeros(every.shape[1], dtype=torch.float64)
    for rows, mine in zip(x.split(_ROWS), every.split(_ROWS), strict=True):
        own += mine.mT @ (_kernel(rows @ x.mT, x.shape[1]) @ every)
        across += mine.mT @ _kernel(rows @ y.mT, x.shape[1]).sum(1)
    itself = every.mT @ _kernel(x.square().sum(1), x.shape[1])
    left = every[:, 0].sum() - every.sum(0)
    left[0] = len(x)
    within = own[0, 0] - 2 * own[0] + own.diagonal() - (itself[0] - itself)
    within[0] = own[0, 0] - itself[0]
    between = across[0] - across
    between[0] = across[0]
    return within / (left * (left - 1)) + _mean_apart(y) - 2 * between / (left * len(y))


def _mean_apart(x: Float64[Tensor, "n feature"]) -> float:
    """The kernel's mean over pairs of two different rows."""
    own = float(_kernel(x.square().sum(1), x.shape[1]).sum())
    return (_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _sum(x: Float64[Tensor, "n feature"], y: Float64[Tensor, "m feature"]) -> float:
    return sum(float(_kernel(rows @ y.mT, x.shape[1]).sum()) for rows in x.split(_ROWS))


def _kernel(product: Tensor, features: int) -> Tensor:
    return (product / features + 1) ** 3
