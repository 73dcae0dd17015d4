"""DEIS: an exponential integrator with polynomials in ln(σ/α)."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, travel
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def deis(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    order: Literal[1, 2, 3, 4] = 3,
) -> Iterator[Tensor]:
    """Zhang & Chen 2023, tAB-DEIS, with the last `order` ε as a polynomial in ln(σ/α).

    The first step, the one from α = 0 and the one onto data are DDIM's.
    """
    past: list[tuple[Tensor, Tensor]] = []  # (λ, ε), newest first
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        half_log_snr = now.half_log_snr
        predicted = denoise(x, t)
        x = travel(predicted, x, now, then)
        if past and s > 0:
            # Σ w·u^i = h·∫ u^i·e^(-hu) du over the step: u is 0 now and 1 then, u = (λ - λ_t)/h
            h = then.half_log_snr - half_log_snr
            u = (torch.stack([at for at, _ in past]) - half_log_snr) / h
            moments = [-torch.expm1(-h)]
            for i in range(1, len(past) + 1):
                moments.append(moments[-1] * i / h - (-h).exp())
            power = torch.arange(1, len(past) + 1, dtype=u.dtype)
            weights = torch.linalg.solve(u ** power[:, None], torch.stack(moments[1:]))
            on_eps = -then.alpha * now.sigma / now.alpha * weights
            for weight, (_, eps) in zip(on_eps, past, strict=True):
                x = x + expand(weight, x) * (eps - predicted.eps)
        if half_log_snr.isfinite():
            past = [(half_log_snr, predicted.eps), *past][: order - 1]
        yield x
