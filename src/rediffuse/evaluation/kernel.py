"""The kernel distance between two sets of features: KID, where they are Inception's."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rediffuse.evaluation.estimate import Estimate
from rediffuse.randomness import Stream, permuted

_ROWS = 2048
"""Of a kernel matrix at once: 160 MB for 10,000 columns."""


def squared_mmd(x: Float[Tensor, "n feature"], y: Float[Tensor, "m feature"]) -> float:
    """Unbiased MMD² (Gretton et al. 2012, Lemma 6) with (xᵀy/d + 1)³ (Bińkowski et al. 2018).

    It may fall below 0, since it is unbiased.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("the kernel distance needs at least two images on each side")
    x, y = x.double(), y.double()
    return _mean_apart(x) + _mean_apart(y) - 2 * _sum(x, y) / (len(x) * len(y))


def kernel_distance(
    x: Float[Tensor, "n feature"],
    y: Float[Tensor, "m feature"],
    seed: int,
    *,
    subsets: int = 100,
    size: int = 1000,
) -> Estimate:
    """KID: mean and spread of MMD² over keyed subsets (Bińkowski et al. 2018).

    100 subsets of 1000, each without repetition, are torch-fidelity's defaults. Subsets overlap, so
    the spread is that of one subset, and no error of the mean.

    Raises:
        ValueError: if a side has fewer images than a subset.
    """
    if min(len(x), len(y)) < size:
        raise ValueError(f"subsets of {size} cannot be taken from {min(len(x), len(y))} images")
    found = [
        squared_mmd(x[subset(len(x), size, seed, 2 * k)], y[subset(len(y), size, seed, 2 * k + 1)])
        for k in range(subsets)
    ]
    drawn = torch.tensor(found, dtype=torch.float64)
    return Estimate(float(drawn.mean()), float(drawn.std(correction=0)))


def subset(length: int, size: int, seed: int, number: int) -> Tensor:
    """`size` different rows out of `length`, keyed by seed and number."""
    return permuted(torch.arange(size), length, seed, torch.tensor(number), Stream.EVALUATION)


def _mean_apart(x: Float64[Tensor, "n feature"]) -> float:
    """The kernel's mean over pairs of two different rows."""
    own = float(_kernel(x.square().sum(1), x.shape[1]).sum())
    return (_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _sum(x: Float64[Tensor, "n feature"], y: Float64[Tensor, "m feature"]) -> float:
    return sum(float(_kernel(rows @ y.mT, x.shape[1]).sum()) for rows in x.split(_ROWS))


def _kernel(product: Tensor, features: int) -> Tensor:
    return (product / features + 1) ** 3
