"""Are samples copies of training images? Judged by how near images that nobody trained on lie.

A distance says little by itself: plain images lie nearer to one another than rich ones do. So each
image's nearest training image is compared with those around it, as by Carlini et al. (2023, Sec.
5.1: the distance over half of the mean of the 50 nearest), and that ratio is held against the same
ratio of held-out images, of which it is known that they are no copies.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.evaluation.neighbours import Vectors, nearest_shown

AROUND = 50
"""How many of the nearest training images tell how densely they lie (Carlini et al. 2023)."""

COPY = 1 / 3
"""Nearest over second nearest, below which Yoon et al. (2023) call a sample memorised."""

LEVEL, SIGNIFICANCE, LEAST_SHARE = 0.01, 0.001, 0.05
"""Suspicious held-out images, false alarms, and the share of samples that is worth an alarm."""


class Nearness(NamedTuple):
    """How near each image lies to what training shows; `rows` is the nearest training image.

    `distance` is the root mean squared difference of a value, `ratio` the distance over the mean of
    the `AROUND` nearest images, `second` over that of the second nearest. `shift` (down, right) and
    `mirrored` say in which version the nearest one lies so near.
    """

    distance: Float64[Tensor, " images"]
    ratio: Float64[Tensor, " images"]
    second: Float64[Tensor, " images"]
    rows: Int64[Tensor, " images"]
    shift: Int64[Tensor, "images 2"]
    mirrored: Bool[Tensor, " images"]


class Verdict(NamedTuple):
    """What the ratios of samples mean, beside those of held-out images.

    A sample is `suspicious` if its ratio is below `threshold`, the held-out images' `rank`-th
    least. `expected` is the share of suspicious ones if samples were fresh real images; `p_value`
    is the probability that as many or more of these would be.
    """

    threshold: float
    rank: int
    suspicious: Bool[Tensor, " samples"]
    share: float
    expected: float
    p_value: float
    alarm: bool


def nearness(
    images: Vectors,
    training: Vectors,
    done: Callable[[int], object] = lambda count: None,
    *,
    flip: bool = False,
    crop_padding: int = 0,
) -> Nearness:
    """Measure how near images lie to what a training set with this augmentation shows.

    A training image is as near as the nearest of its versions. `done` gets the number of images
    that are measured.

    Raises:
        ConfigError: for fewer than three training images.
    """
    if len(training) < 3:
        raise ConfigError(
            f"{len(training)} training images are too few to tell a copy from a neighbour; it "
            "takes 3 or more"
        )
    around = min(AROUND, len(training))
    found = nearest_shown(images, training, around, flip=flip, crop_padding=crop_padding, done=done)
    first, second = found.distances[:, 0], found.distances[:, 1]
    return Nearness(
        first / math.sqrt(images[0].numel()),
        _share(first, found.distances.mean(dim=1)),
        _share(first, second),
        found.rows[:, 0],
        found.shift[:, 0],
        found.mirrored[:, 0],
    )


def judge(
    samples: Float64[Tensor, " samples"],
    held_out: Float64[Tensor, " held_out"],
    *,
    level: float = LEVEL,
    significance: float = SIGNIFICANCE,
    least_share: float = LEAST_SHARE,
) -> Verdict:
    """Judge the samples' ratios by the held-out images'.

    The threshold is the order statistic nearest below the quantile `level` (the least, where there
    are fewer than 1/level images). The share of fresh real images below it has a Beta distribution
    (Wilks 1941), so their number among n has a beta-binomial one: whatever the images are like, an
    alarm is false with a probability of at most `significance`. It is only raised where at least
    `least_share` are suspicious, since no model's distribution is the data's exactly.
    """
    count, drawn = len(held_out), len(samples)
    rank = max(1, math.floor(level * (count + 1)))
    threshold = held_out.sort().values[rank - 1]
    suspicious = samples < threshold
    found = int(suspicious.sum())
    share = found / drawn
    return Verdict(
        threshold=float(threshold),
        rank=rank,
        suspicious=suspicious,
        share=share,
        expected=rank / (count + 1),
        p_value=(p_value := tail(found, drawn, rank, count)),
        alarm=p_value < significance and share >= least_share,
    )


def tail(found: int, drawn: int, rank: int, count: int) -> float:
    """P(at least `found` of `drawn` values lie below the `rank`-th least of `count` others).

    All are alike: it is the beta-binomial tail of `drawn` draws with parameters rank and
    count + 1 - rank, summed in logarithms, as scipy's `sf` rounds below 1e-12.
    """
    from scipy.special import logsumexp
    from scipy.stats import betabinom

    more = np.arange(found, drawn + 1)
    return min(1.0, math.exp(logsumexp(betabinom.logpmf(more, drawn, rank, count + 1 - rank))))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 / 0 = 0: a copy of an image that is there many times is a copy."""
    return torch.where(whole > 0, part / whole, 0.0)
