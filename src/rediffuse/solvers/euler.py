"""Euler's method on the probability-flow ODE."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, travel
from rediffuse.solvers import Noise


def euler(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """First order in dx = x_0·dα + ε·dσ (Song et al. 2021b, Eq. 13); DDIM with η = 0."""
    for t, s in pairwise(times):
        x = travel(denoise(x, t), x, schedule(t), schedule(s))
        yield x
