"""DPM-Solver++(2S)."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, between, travel
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def dpmpp_2s(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """Lu et al. 2022b, Alg. 1: second order in ln(α/σ), two evaluations a step.

    They are at t and halfway to s (r = 1/2); a chain's halfway step lies beside it, which r
    accounts for. From α = 0 and onto data the step is DDIM's.
    """
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        first = denoise(x, t)
        to = travel(first, x, now, then)
        middle = between(schedule, t, s)
        if middle is not None:
            at = schedule(middle)
            second = denoise(travel(first, x, now, at), middle)
            h = then.half_log_snr - now.half_log_snr
            r = (at.half_log_snr - now.half_log_snr) / h
            on_x_0 = then.alpha - then.sigma * now.alpha / now.sigma  # α_s·(1 - e^-h)
            to = to + expand(on_x_0 / (2 * r), x) * (second.x_0 - first.x_0)
        x = to
        yield x
