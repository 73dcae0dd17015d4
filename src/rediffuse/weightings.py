"""Weights on the squared error of the network's own output.

On that scale `unit` is L_simple for ε, flow matching for flow and λ(σ)·c_out² = 1 for EDM. Each
weight is written as in its paper, on the error of x_0 or of ε, and carried over once for every
target: an error d of the output is one of σ·d/det in x_0 and of α·d/det in ε (`targets.solve`).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from rediffuse.process import Scales, Schedule, goes_in_steps, transition_variance
from rediffuse.ranges import Finite, NonNegative, Positive, Width
from rediffuse.targets import Target, determinant

Weighting = Callable[[Schedule, Tensor, Target], Tensor]
Weights = Float64[Tensor, "..."]


def unit(schedule: Schedule, t: Tensor, target: Target) -> Weights:
    """1 (Ho et al. 2020, Eq. 14)."""
    return torch.ones_like(t)


def snr(schedule: Schedule, t: Tensor, target: Target) -> Weights:
    """SNR on the error of x_0, which is 1 on that of ε (Salimans & Ho 2022, Sec. 4)."""
    at = schedule(t)
    return _from_x_0(_snr(at), at, target)


def truncated_snr(schedule: Schedule, t: Tensor, target: Target) -> Weights:
    """max(SNR, 1) on the error of x_0 (Salimans & Ho 2022, Sec. 4)."""
    at = schedule(t)
    return _from_x_0(_snr(at).clamp(min=1), at, target)


def min_snr(schedule: Schedule, t: Tensor, target: Target, *, gamma: Positive = 5.0) -> Weights:
    """min(SNR, γ) on the error of x_0 (Hang et al. 2023, Sec. 3.4)."""
    at = schedule(t)
    return _from_x_0(_snr(at).clamp(max=gamma), at, target)


def soft_min_snr(
    schedule: Schedule, t: Tensor, target: Target, *, gamma: Positive = 4.0
) -> Weights:
    """SNR·γ / (SNR + γ), or 1 / (σ² + 1/γ), on the error of x_0 (Crowson et al. 2024, HDiT)."""
    at = schedule(t)
    return _from_x_0(gamma * _snr(at) / (_snr(at) + gamma), at, target)


def p2(
    schedule: Schedule, t: Tensor, target: Target, *, k: NonNegative = 1.0, gamma: NonNegative = 1.0
) -> Weights:
    """1 / (k + SNR)^γ on the error of ε (Choi et al. 2022, P2)."""
    at = schedule(t)
    return _from_eps((k + _snr(at)) ** -gamma, at, target)


def edm(schedule: Schedule, t: Tensor, target: Target, *, sigma_data: Positive = 0.5) -> Weights:
    """λ(σ) = (σ² + σ_data²) / (σ·σ_data)² on the error of x_0 (Karras et al. 2022, Table 1).

    For any α it is SNR + 1/σ_data²: 1 on the output of target=edm with the same `sigma_data`.
    """
    at = schedule(t)
    return _from_x_0(_snr(at) + sigma_data**-2, at, target)


def sigmoid(schedule: Schedule, t: Tensor, target: Target, *, bias: Finite = 2.0) -> Weights:
    """w(λ) = sigmoid(bias - λ) on the bound, where λ is the log-SNR (Kingma & Gao 2023).

    Like the bound's own weight it holds -dλ/dt, so it is the paper's for times drawn uniformly.
    """
    log_snr = 2 * schedule(t).half_log_snr
    return torch.sigmoid(bias - log_snr) * vlb(schedule, t, target)


def vlb(schedule: Schedule, t: Tensor, target: Target) -> Weights:
    """The weight of the variational bound, for times drawn uniformly: the mean is the bound.

    On a continuous clock that is ½·(-d ln SNR/dt)·(t_max - t_min) on the error of ε (Kingma et al.
    2021, Eq. 17-18). On a chain, whose bound is a sum of T terms, it is T·β_t² / (2·σ_t²·α_t·
    (1 - ᾱ_t)) with σ_t² = β_t (Ho et al. 2020, Eq. 12), and t = 1 takes the same form in the place
    of the decoder's term. In nats per dimension; the terms of the prior and the decoder are not in.
    """
    if goes_in_steps(schedule):
        now, then = schedule(t), schedule(t - 1)
        # With α_t = √ᾱ_t / √ᾱ_{t-1} the weight on x_0 holds no division by ᾱ_t, which may be 0.
        beta = transition_variance(schedule, t, t - 1)
        return _from_x_0(schedule.t_max / 2 * beta * (then.alpha / now.sigma**2) ** 2, now, target)
    at, pull = torch.func.vjp(schedule, t)[:2]
    # ½·SNR·(-d ln SNR/dt) as a sum of α' and σ', which has no division by α.
    (falling,) = pull(Scales(-at.alpha / at.sigma**2, at.alpha**2 / at.sigma**3))
    return _from_x_0((schedule.t_max - schedule.t_min) * falling, at, target)


class Uncertainty(nn.Module):
    """exp(-u), where u is learned as a function of the noise level.

    One linear layer, 0 at the start, on Fourier features of c_noise = ¼·ln(σ/α). EDM2 draws their
    frequencies from N(0, (2π)²) and their phases uniformly; these are those distributions'
    quantiles.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rank = torch.arange(channels, dtype=torch.float64)
        golden = (math.sqrt(5) - 1) / 2
        normal = torch.special.ndtri((rank + 0.5) / channels)
        self.register_buffer("frequency", 2 * math.pi * normal, persistent=False)
        self.register_buffer("phase", 2 * math.pi * (rank * golden % 1), persistent=False)
        self.on_features = nn.Parameter(torch.zeros(channels, dtype=torch.float64))

    def forward(self, schedule: Schedule, t: Tensor, target: Target) -> Weights:
        """Weights of t, with a gradient; the loss needs -ln of them added."""
        c_noise = (-schedule(t).half_log_snr / 4).clamp(-5, 5)  # α = 0 would be at infinity
        features = (c_noise[..., None] * self.frequency + self.phase).cos() * math.sqrt(2)
        return (-(features * self.on_features).sum(-1)).exp()


def uncertainty(*, channels: Width = 128) -> Uncertainty:
    """Divide by a learned error level (Karras et al. 2024, EDM2, Eq. 14-15)."""
    return Uncertainty(channels)


def _snr(at: Scales) -> Tensor:
    return (at.alpha / at.sigma).square()


def _from_x_0(on_x_0: Tensor, at: Scales, target: Target) -> Tensor:
    return on_x_0 * (at.sigma / determinant(at, *target(at))) ** 2


def _from_eps(on_eps: Tensor, at: Scales, target: Target) -> Tensor:
    return on_eps * (at.alpha / determinant(at, *target(at))) ** 2
