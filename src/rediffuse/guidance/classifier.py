"""Classifier guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Prediction, Schedule
from rediffuse.tensors import expand


def classifier_guided(
    denoise: Denoise,
    schedule: Schedule,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float,
) -> Denoise:
    """ε - s·σ·∇_x log p(y | x_t) (Dhariwal & Nichol 2021, Alg. 2), and x_0 with it.

    `log_prob` maps (x_t, t) to one number per image, differentiable in x_t, from a classifier that
    was trained on noisy images. Gradients are taken although sampling runs in inference mode. Where
    α = 0, x_t says nothing about y and the prediction stays as it is.
    """

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        at = schedule(t)
        predicted = denoise(x_t, t)
        gradient = _gradient(log_prob, x_t, t)
        on_x_0 = torch.where(at.alpha > 0, scale * at.sigma**2 / at.alpha, 0)
        on_eps = torch.where(at.alpha > 0, scale * at.sigma, 0)
        return Prediction(
            predicted.x_0 + expand(on_x_0, x_t) * gradient,
            predicted.eps - expand(on_eps, x_t) * gradient,
            predicted.variance,
        )

    return guided


def _gradient(log_prob: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.clone().requires_grad_()  # tensors of inference mode cannot be differentiated by
        (gradient,) = torch.autograd.grad(log_prob(x, t.clone()).sum(), x)
    return gradient
