"""DDIM: the same marginals with less noise, or none."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, transition_variance
from rediffuse.ranges import Fraction
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    eta: Fraction = 0.0,
) -> Iterator[Tensor]:
    """Song et al. 2021a, Eq. 12 and 16. `eta` = 0 is the ODE, 1 has the DDPM posterior variance."""
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        predicted = denoise(x, t)
        # Never negative but for rounding, and 0 on data: its root must not be NaN.
        fresh = (
            eta * transition_variance(schedule, t, s).clamp(min=0).sqrt() * then.sigma / now.sigma
        )
        kept = (then.sigma**2 - fresh**2).clamp(min=0).sqrt()
        x = expand(then.alpha, x) * predicted.x_0 + expand(kept, x) * predicted.eps
        if eta and s > 0:
            x = x + expand(fresh, x) * noise(x)
        yield x
