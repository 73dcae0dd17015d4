"""Classifier-free guidance."""

import math

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.errors import ConfigError
from rediffuse.guidance import Sides, limited, with_x_0
from rediffuse.process import Prediction, Scales, Schedule
from rediffuse.ranges import Finite, Fraction, Limit, NonNegative
from rediffuse.tensors import expand


def classifier_free(
    sides: Sides,
    schedule: Schedule,
    *,
    scale: Finite,
    rescale: Fraction = 0.0,
    sigma_min: NonNegative = 0.0,
    sigma_max: Limit = math.inf,
) -> Denoise:
    """u + s·(c - u): 0 is unconditional, 1 conditional (one forward pass each), above 1 guided.

    Ho & Salimans 2022, Eq. 6, write (1 + w)·c - w·u; their w is s - 1. Since x_0 and ε both are
    affine in the network's output, guiding the two together keeps α·x_0 + σ·ε = x_t.

    `rescale` (φ of Lin et al. 2023, Sec. 3.4) brings each image's standard deviation back towards
    the conditional's: 0 not at all, 1 fully. They do it to the network's output; here it is x_0, so
    that it means the same for every target. Guidance is limited to `sigma_min` < σ/α <= `sigma_max`
    (Kynkäänniemi et al. 2024).
    """
    if not 0 <= rescale <= 1:
        raise ConfigError(f"guidance 'classifier_free' needs a rescale in 0 .. 1, not {rescale:g}")
    if scale == 1:
        return sides.conditional
    if scale == 0 and rescale == 0 and sigma_min <= 0 and sigma_max == math.inf:
        return sides.unconditional

    def guide(c: Prediction, u: Prediction, x_t: Tensor, at: Scales) -> Prediction:
        x_0 = u.x_0 + scale * (c.x_0 - u.x_0)
        if rescale == 0:
            return Prediction(x_0, u.eps + scale * (c.eps - u.eps), c.variance)
        # An image without contrast, as one class may give for pure noise, stays as it is.
        back = (_contrast(c.x_0) / _contrast(x_0)).nan_to_num(nan=1.0, posinf=1.0)
        return with_x_0(c, x_0 * expand(rescale * back + (1 - rescale), x_0), x_t, at)

    return limited(guide, sides, schedule, sigma_min, sigma_max)


def _contrast(images: Tensor) -> Tensor:
    """Each image's standard deviation; torch.std's last bits depend on the size of the batch."""
    pixels = images.flatten(1)
    return (pixels - pixels.mean(dim=1, keepdim=True)).square().mean(dim=1).sqrt()
