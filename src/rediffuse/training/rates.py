"""The learning rate as a share of its peak: a pure function of the images seen.

Every rate takes the images seen at the end of the step and the horizon over which it falls. Beyond
the horizon it stays where it ended.
"""

import math
from typing import Annotated

from rediffuse.errors import ConfigError
from rediffuse.ranges import Fraction, ImageCount, PositiveFraction, Range


def constant(images: int, horizon_images: int, *, warmup_images: ImageCount = 0) -> float:
    """1, after a linear warm-up (Goyal et al. 2017, Sec. 2.2)."""
    return _warm_up(images, warmup_images)


def cosine(
    images: int, horizon_images: int, *, final: Fraction = 0.0, warmup_images: ImageCount = 0
) -> float:
    """Half a cosine from 1 to `final` (Loshchilov & Hutter 2017, Eq. 5, without restarts)."""
    progress = _progress(images, horizon_images, warmup_images)
    fall = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    return _warm_up(images, warmup_images) * fall


def linear(
    images: int, horizon_images: int, *, final: Fraction = 0.0, warmup_images: ImageCount = 0
) -> float:
    """A straight line from 1 to `final`."""
    progress = _progress(images, horizon_images, warmup_images)
    return _warm_up(images, warmup_images) * (1 + (final - 1) * progress)


def step(
    images: int,
    horizon_images: int,
    *,
    every_images: Annotated[int, Range(1.0, 1e15)],
    factor: PositiveFraction = 0.5,
    warmup_images: ImageCount = 0,
) -> float:
    """Times `factor` every so many images."""
    if every_images <= 0:
        raise ConfigError(f"rate.every_images must be above 0, not {every_images}")
    return _warm_up(images, warmup_images) * factor ** (min(images, horizon_images) // every_images)


def _warm_up(images: int, warmup_images: int) -> float:
    return min(1.0, images / warmup_images) if warmup_images else 1.0


def _progress(images: int, horizon_images: int, warmup_images: int) -> float:
    falling = max(1, horizon_images - warmup_images)
    return min(1.0, max(0, images - warmup_images) / falling)
