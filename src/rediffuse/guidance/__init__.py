"""Guidance and thresholds: functions that give a denoiser, one file each."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Prediction, Scales, Schedule
from rediffuse.tensors import expand


class Sides(NamedTuple):
    """The two opinions between which guidance moves; `both` asks for them at once, in order."""

    conditional: Denoise
    unconditional: Denoise
    both: Callable[[Tensor, Tensor], tuple[Prediction, Prediction]]


Guidance = Callable[[Sides, Schedule], Denoise]


def sides(denoiser: Callable[..., Prediction], cond: Tensor, null: Tensor) -> Sides:
    """One network told `cond`, or `null`; both take one forward pass of twice the batch."""

    def both(x_t: Tensor, t: Tensor) -> tuple[Prediction, Prediction]:
        times = torch.cat((t, t)) if t.ndim else t
        predicted = denoiser(torch.cat((x_t, x_t)), times, torch.cat((cond, null)))
        halves = [(None, None) if part is None else part.chunk(2) for part in predicted]
        conditional, unconditional = zip(*halves, strict=True)
        return Prediction(*conditional), Prediction(*unconditional)

    return Sides(partial(denoiser, cond=cond), partial(denoiser, cond=null), both)


def apart(conditional: Denoise, unconditional: Denoise) -> Sides:
    """Two networks, as a model and a weaker one told the same (Karras et al. 2024b)."""
    return Sides(
        conditional, unconditional, lambda x_t, t: (conditional(x_t, t), unconditional(x_t, t))
    )


def none(denoise: Denoise, schedule: Schedule, *, low: Tensor, high: Tensor) -> Denoise:
    """Leave x_0 as the network said it, as for latents, whose range has no bounds."""
    return denoise


def with_x_0(predicted: Prediction, x_0: Tensor, x_t: Tensor, at: Scales) -> Prediction:
    """Change x_0, and ε with it, so that α·x_0 + σ·ε = x_t still holds."""
    eps = (x_t - expand(at.alpha, x_t) * x_0) / expand(at.sigma, x_t)
    return Prediction(x_0, eps, predicted.variance)


def limited(
    guide: Callable[[Prediction, Prediction, Tensor, Scales], Prediction],
    by: Sides,
    clock: Schedule,
    sigma_min: float,
    sigma_max: float,
) -> Denoise:
    """Guide where σ_min < σ/α <= σ_max (Kynkäänniemi et al. 2024); elsewhere ask one side only."""

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        at = clock(t)
        ratio = at.sigma / at.alpha
        inside = (ratio > sigma_min) & (ratio <= sigma_max)
        if not inside.any():
            return by.conditional(x_t, t)
        conditional, unconditional = by.both(x_t, t)
        found = guide(conditional, unconditional, x_t, at)
        if inside.all():
            return found
        here = expand(inside, x_t).bool()
        return Prediction(
            torch.where(here, found.x_0, conditional.x_0),
            torch.where(here, found.eps, conditional.eps),
            conditional.variance,
        )

    return guided
