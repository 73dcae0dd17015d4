"""Dynamic thresholding."""

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.errors import ConfigError
from rediffuse.guidance import with_x_0
from rediffuse.process import Prediction, Schedule
from rediffuse.ranges import PositiveFraction
from rediffuse.tensors import expand


def dynamic_thresholding(
    denoise: Denoise,
    schedule: Schedule,
    *,
    low: Tensor,
    high: Tensor,
    percentile: PositiveFraction = 0.995,
) -> Denoise:
    """Clip x_0 at a percentile of its own pixels, and shrink it into range if that lies outside.

    Saharia et al. 2022 (Imagen), Sec. 2.3, whose range is [-1, 1]; `low` and `high` broadcast
    against an image, and its middle takes the place of their 0. `percentile` is a fraction.
    """
    if not 0 < percentile <= 1:
        raise ConfigError(
            "threshold 'dynamic_thresholding' needs a percentile above 0, at most 1, not "
            f"{percentile:g}"
        )

    def thresholded(x_t: Tensor, t: Tensor) -> Prediction:
        predicted = denoise(x_t, t)
        middle, half = ((high + low) / 2).to(x_t), ((high - low) / 2).to(x_t)
        inside = (predicted.x_0 - middle) / half
        # One image at a time: torch.quantile takes no more than 2^24 numbers.
        reach = torch.stack([torch.quantile(image.abs(), percentile) for image in inside])
        s = expand(reach.clamp(min=1), x_t)
        return with_x_0(predicted, middle + half * inside.clamp(-s, s) / s, x_t, schedule(t))

    return thresholded
