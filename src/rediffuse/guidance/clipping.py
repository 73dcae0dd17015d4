"""Static thresholding."""

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.guidance import with_x_0
from rediffuse.process import Prediction, Schedule


def clipping(denoise: Denoise, schedule: Schedule, *, low: Tensor, high: Tensor) -> Denoise:
    """Hold x_0 where pixels can be (Ho et al. 2020's code; Saharia et al. 2022, App. A.2).

    `low` and `high` broadcast against an image. Never for latents, whose range has no bounds.
    """

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        predicted = denoise(x_t, t)
        x_0 = predicted.x_0.clamp(low.to(x_t), high.to(x_t))
        return with_x_0(predicted, x_0, x_t, schedule(t))

    return clipped
