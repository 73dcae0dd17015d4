"""Classifier-free guidance."""

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Prediction


def classifier_free(conditional: Denoise, unconditional: Denoise, *, scale: float) -> Denoise:
    """u + s·(c - u): 0 is unconditional, 1 conditional (one forward pass each), above 1 guided.

    Ho & Salimans 2022, Eq. 6, write (1 + w)·c - w·u; their w is s - 1. Since x_0 and ε both are
    affine in the network's output, guiding the two together keeps α·x_0 + σ·ε = x_t.
    """
    if scale == 1:
        return conditional
    if scale == 0:
        return unconditional

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        c, u = conditional(x_t, t), unconditional(x_t, t)
        return Prediction(
            u.x_0 + scale * (c.x_0 - u.x_0), u.eps + scale * (c.eps - u.eps), c.variance
        )

    return guided
