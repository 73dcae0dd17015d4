"""Ancestral sampling: DDPM's own."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, posterior, transition_variance
from rediffuse.ranges import Fraction
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def ancestral(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    variance: Fraction = 0.0,
) -> Iterator[Tensor]:
    """Ho et al. 2020, Alg. 2, on any grid: draw x_s from q(x_s | x_t, x̂_0).

    `variance` lies between 0, the posterior's β̃_t, and 1, the transition's β_t (their Sec. 3.2),
    in logarithms (Nichol & Dhariwal 2021, Eq. 15); a network that learned the fraction decides
    instead.
    """
    for t, s in pairwise(times):
        predicted = denoise(x, t)
        to = posterior(schedule, x, predicted.x_0, t, s)
        x = to.mean
        if s > 0:  # the last step lands on data: its variance is 0
            log_beta = expand(transition_variance(schedule, t, s).log(), x)
            fraction = variance if predicted.variance is None else predicted.variance
            x = x + (0.5 * (fraction * log_beta + (1 - fraction) * to.log_var)).exp() * noise(x)
        yield x
