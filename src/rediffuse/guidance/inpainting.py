"""Inpainting by replacement."""

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.guidance import with_x_0
from rediffuse.process import Prediction, Schedule


def inpainting(denoise: Denoise, schedule: Schedule, *, known: Tensor, mask: Tensor) -> Denoise:
    """Put the given image in the place of x_0 where `mask` is 1 (Song et al. 2021b, App. I.2).

    They replace x_t instead. Here every solver carries the given pixels down as it does all others,
    and lands on them.
    """
    given = mask.bool()

    def painted(x_t: Tensor, t: Tensor) -> Prediction:
        predicted = denoise(x_t, t)
        x_0 = torch.where(given, known.to(x_t), predicted.x_0)
        return with_x_0(predicted, x_0, x_t, schedule(t))

    return painted
