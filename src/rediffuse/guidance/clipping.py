"""Static thresholding."""

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Prediction, Schedule
from rediffuse.tensors import expand


def clipping(denoise: Denoise, schedule: Schedule, *, low: Tensor, high: Tensor) -> Denoise:
    """Hold x_0 where pixels can be (Ho et al. 2020's code; Saharia et al. 2022, App. A.2).

    `low` and `high` broadcast against an image; ε is recomputed, so that α·x_0 + σ·ε = x_t still
    holds. Never for latents, whose range has no bounds.
    """

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        at = schedule(t)
        predicted = denoise(x_t, t)
        x_0 = predicted.x_0.clamp(low.to(x_t), high.to(x_t))
        eps = (x_t - expand(at.alpha, x_t) * x_0) / expand(at.sigma, x_t)
        return Prediction(x_0, eps, predicted.variance)

    return clipped
