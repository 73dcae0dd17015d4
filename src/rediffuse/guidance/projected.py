"""Adaptive projected guidance."""

import math

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.errors import ConfigError
from rediffuse.guidance import Sides, limited, with_x_0
from rediffuse.process import Prediction, Scales, Schedule
from rediffuse.ranges import Finite, Limit, NonNegative
from rediffuse.tensors import expand


def projected(
    sides: Sides,
    schedule: Schedule,
    *,
    scale: Finite,
    parallel: Finite = 0.0,
    norm: Limit = math.inf,
    momentum: Finite = 0.0,
    sigma_min: NonNegative = 0.0,
    sigma_max: Limit = math.inf,
) -> Denoise:
    """Guide x_0 across the conditional's direction rather than along it, which saturates colours.

    Sadat et al. 2024 (APG), Alg. 1: `parallel` is their η (1 is classifier-free guidance), `norm`
    their r, the largest L2 norm of c - u in an image, and `momentum` their β (below 0, such as
    -0.5), over the evaluations of one trajectory: wrap anew for each. Limits are as for
    `classifier_free`.
    """
    if norm <= 0 or abs(momentum) >= 1:
        raise ConfigError(
            "guidance 'projected' needs a norm above 0 and a momentum between -1 and 1, not "
            f"norm={norm:g}, momentum={momentum:g}"
        )
    if scale == 1:
        return sides.conditional
    running: Tensor | None = None

    def guide(c: Prediction, u: Prediction, x_t: Tensor, at: Scales) -> Prediction:
        nonlocal running
        change = c.x_0 - u.x_0
        if momentum and running is not None:
            change = change + momentum * running
        running = change
        if norm < math.inf:
            change = change * expand((norm / _dot(change, change).sqrt()).clamp(max=1), change)
        along = _dot(change, c.x_0) / _dot(c.x_0, c.x_0).clamp(min=1e-12)
        change = change + (parallel - 1) * expand(along, change) * c.x_0
        return with_x_0(c, c.x_0 + (scale - 1) * change, x_t, at)

    return limited(guide, sides, schedule, sigma_min, sigma_max)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(dim=1)
