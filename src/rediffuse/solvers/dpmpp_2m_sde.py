"""SDE-DPM-Solver++(2M)."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule
from rediffuse.ranges import NonNegative
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def dpmpp_2m_sde(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    eta: NonNegative = 1.0,
    noise_scale: NonNegative = 1.0,
) -> Iterator[Tensor]:
    """Lu et al. 2022b, SDE-DPM-Solver++(2M): second order in λ = ln(α/σ), with noise.

    `eta` scales the variance that the SDE adds: 1 is the paper's, 0 the ODE of `dpmpp_2m`. The
    noise is multiplied by `noise_scale`, which should be 1 for the right marginals.
    """
    previous, h_previous = None, None
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        h = then.half_log_snr - now.half_log_snr
        x_0 = denoise(x, t).x_0
        slanted = x_0
        if previous is not None and h_previous is not None and s > 0:
            slanted = x_0 + expand(h / (2 * h_previous), x) * (x_0 - previous)
        decay = then.sigma * now.alpha / (then.alpha * now.sigma)  # e^-h, also where h is infinite
        on_x_0 = then.alpha * (1 - decay ** (1 + eta))
        x = expand(then.sigma / now.sigma * decay**eta, x) * x + expand(on_x_0, x) * slanted
        if eta and s > 0:
            added = noise_scale * then.sigma * (1 - decay ** (2 * eta)).sqrt()
            x = x + expand(added, x) * noise(x)
        previous, h_previous = x_0, h
        yield x
