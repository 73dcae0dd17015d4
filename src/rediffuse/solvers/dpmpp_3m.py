"""DPM-Solver++(3M)."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule
from rediffuse.ranges import NonNegative
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def dpmpp_3m(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    eta: NonNegative = 0.0,
    noise_scale: NonNegative = 1.0,
    exact: bool = False,
) -> Iterator[Tensor]:
    """Lu et al. 2022b, with x_0 as a quadratic in λ = ln(α/σ), one evaluation a step.

    As it is in use, the method halves the quadratic's last term, which leaves it of second order;
    `exact` integrates the whole quadratic, which makes it third. `eta` scales the variance of the
    reverse SDE's noise: 0 is the ODE, 1 the SDE; `noise_scale` multiplies the noise itself. The
    first step, the one from α = 0 and the one onto data are of first order.
    """
    past: list[tuple[Tensor, Tensor]] = []  # (λ, x_0), newest first
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        half_log_snr = now.half_log_snr
        x_0 = denoise(x, t).x_0
        decay = then.sigma * now.alpha / (then.alpha * now.sigma)  # e^-h, also where h is infinite
        on_x_0 = then.alpha * (1 - decay ** (1 + eta))
        x = expand(then.sigma / now.sigma * decay**eta, x) * x + expand(on_x_0, x) * x_0
        if past and s > 0:
            # Σ w·u^i = k·∫ u^i·e^(-k(1-u)) du over the step: u is 0 now and 1 then, k = (1 + η)·h
            h = then.half_log_snr - half_log_snr
            k = (1 + eta) * h
            first = 1 + torch.expm1(-k) / k
            second = 1 - 2 * first / k
            moments = torch.stack((first, second if exact else second / 2))[: len(past)]
            u = (torch.stack([at for at, _ in past]) - half_log_snr) / h
            power = torch.arange(1, len(past) + 1, dtype=u.dtype)
            weights = torch.linalg.solve(u ** power[:, None], moments)
            for weight, (_, other) in zip(then.alpha * weights, past, strict=True):
                x = x + expand(weight, x) * (other - x_0)
        if eta and s > 0:
            added = noise_scale * then.sigma * (1 - decay ** (2 * eta)).sqrt()
            x = x + expand(added, x) * noise(x)
        if half_log_snr.isfinite():
            past = [(half_log_snr, x_0), *past][:2]
        yield x
