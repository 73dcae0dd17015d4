"""DPM-Solver-2: the midpoint rule."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, between, travel
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def midpoint(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """Lu et al. 2022, Alg. 1 (DPM-Solver-2): second order in ln(α/σ), two evaluations a step.

    They are at t and halfway to s (r = 1/2; "dpm_2" elsewhere); a chain's halfway step lies beside
    it, which r accounts for. From α = 0 and onto data the step is DDIM's.
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
            on_eps = then.sigma - then.alpha * now.sigma / now.alpha  # -σ_s·(e^h - 1)
            to = to + expand(on_eps / (2 * r), x) * (second.eps - first.eps)
        x = to
        yield x
