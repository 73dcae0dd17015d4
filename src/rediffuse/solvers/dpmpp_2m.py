"""DPM-Solver++(2M)."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def dpmpp_2m(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """Lu et al. 2022b, Alg. 2: second order in λ = ln(α/σ), one evaluation a step.

    The first step and the one onto data, where λ is infinite, are of first order.
    """
    previous, h_previous = None, None
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        h = then.half_log_snr - now.half_log_snr
        x_0 = denoise(x, t).x_0
        slanted = x_0
        if previous is not None and h_previous is not None and s > 0:
            slanted = x_0 + expand(h / (2 * h_previous), x) * (x_0 - previous)
        # α_s·(1 - e^-h), written so that it holds at σ_s = 0 and at α_t = 0
        on_x_0 = then.alpha - then.sigma * now.alpha / now.sigma
        x = expand(then.sigma / now.sigma, x) * x + expand(on_x_0, x) * slanted
        previous, h_previous = x_0, h
        yield x
