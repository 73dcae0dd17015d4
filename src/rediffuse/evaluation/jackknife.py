"""Standard errors of figures that are no means over images: the delete-a-group jackknife.

The images are dealt into groups, and the figure is computed without each group in turn (Kott 2001).
How much these values differ tells how much the figure of other images of the same model would. The
variance is right in the limit where the figure is smooth, and otherwise too large on average, never
too small, whatever the figure (Efron & Stein 1981). It is twice the true one for a distance between
two equal distributions, whose leading term is quadratic in what the samples got by chance.

The alternatives are worse here. Blocks of n/5 images tell of n/5 images, and how a distance's error
shrinks with n is not known (as 1/n between equal distributions, as 1/√n between others). The
bootstrap repeats images, which adds to the bias of a distance, and its variance is three times the
true one between equal distributions.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from rediffuse.randomness import Stream, permuted

GROUPS = 20
"""Groups of images: the error itself is then known within 1/√(2·19), some 16 %."""


def groups_of(
    count: int, classes: Int64[Tensor, " count"] | None = None
) -> Int64[Tensor, " count"] | None:
    """Deal images into `GROUPS` groups at random, of each class as evenly as can be.

    Classes in turn make a distance vary less than random ones; each group has them in the same
    shares. Returns the group of each image, or None for less than two images a group.
    """
    if count < 2 * GROUPS:
        return None
    order = permuted(torch.arange(count), count, 0, torch.tensor(0), Stream.EVALUATION)
    if classes is not None:
        order = order[classes[order].argsort(stable=True)]
    group = torch.empty(count, dtype=torch.long)
    group[order] = torch.arange(count) % GROUPS
    return group


def standard_error(without: Sequence[float] | Tensor) -> float | None:
    """Return the standard error of a figure from its values without each group.

    Returns None if one of the values is not finite: too few images were left to compute it.
    """
    values = torch.as_tensor(without, dtype=torch.float64)
    if not values.isfinite().all():
        return None
    return math.sqrt((len(values) - 1) * float(values.var(correction=0)))
