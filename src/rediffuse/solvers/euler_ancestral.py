"""Euler steps that overshoot, and noise that makes up for it."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule
from rediffuse.ranges import NonNegative
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def euler_ancestral(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    eta: NonNegative = 1.0,
    noise_scale: NonNegative = 1.0,
) -> Iterator[Tensor]:
    """Step to less noise than s has, then add the rest afresh (Crowson's k-diffusion).

    In σ/α the noise of s is split into σ_down² + σ_up². That is `ddim` with the same `eta`, and
    with 1 ancestral sampling (Song et al. 2021a, Eq. 16), but for `noise_scale`, which multiplies
    the fresh noise and should be 1 for the right marginals.
    """
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        predicted = denoise(x, t)
        ratio = then.sigma * now.alpha / (then.alpha * now.sigma)  # of σ_s/α_s and σ_t/α_t
        up = (eta * (1 - ratio**2).clamp(min=0).sqrt()).clamp(max=1)
        down = (1 - up**2).sqrt()
        x = expand(then.alpha, x) * predicted.x_0 + expand(then.sigma * down, x) * predicted.eps
        if eta and s > 0:
            x = x + expand(noise_scale * then.sigma * up, x) * noise(x)
        yield x
