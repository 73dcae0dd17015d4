"""Chains of T steps: β_1 .. β_T and ᾱ_t = ∏ (1 - β_i), on the papers' clock, with ᾱ_0 = 1."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Scales
from rediffuse.ranges import Chain, Finite, Fraction, InsideOne, Positive


@dataclass(frozen=True)
class Discrete:
    """A variance-preserving chain: α² = ᾱ_t and σ² = 1 - ᾱ_t, both [T + 1] in float64.

    Between two steps ᾱ is interpolated linearly, so that `time` can invert; `snap` gives whole
    steps.
    """

    alpha_bar: Tensor
    one_minus_alpha_bar: Tensor

    t_min = 1.0

    @property
    def t_max(self) -> float:
        """The number of steps, T."""
        return float(len(self.alpha_bar) - 1)

    def __call__(self, t: Tensor) -> Scales:
        """(√ᾱ_t, √(1 - ᾱ_t))."""
        return Scales(
            _interpolate(self.alpha_bar, t).sqrt(), _interpolate(self.one_minus_alpha_bar, t).sqrt()
        )

    def time(self, half_log_snr: Tensor) -> Tensor:
        """Where ᾱ = sigmoid(2λ), between two steps in general."""
        sigma_2 = torch.sigmoid(-2 * half_log_snr)
        table = self.one_minus_alpha_bar.to(sigma_2.device)
        after = torch.searchsorted(table, sigma_2.contiguous()).clamp(1, len(table) - 1)
        low, high = table[after - 1], table[after]
        return after - 1 + ((sigma_2 - low) / (high - low)).clamp(0, 1)

    def snap(self, t: Tensor) -> Tensor:
        """The nearest whole step in 1 .. T."""
        return t.round().clamp(1, self.t_max)

    def label(self, t: Tensor) -> Tensor:
        """Give t itself, 1 .. T: Ho et al. 2020 count from 1 in the paper, from 0 in their code."""
        return t


def from_betas(betas: Tensor, *, zero_terminal_snr: bool = False) -> Discrete:
    """Build the chain of β_1 .. β_T (Ho et al. 2020, Sec. 2), each in (0, 1)."""
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ConfigError("betas must be one list of numbers between 0 and 1, both excluded")
    log_alpha_bar = torch.log1p(-betas.double()).cumsum(0)
    chain = Discrete(
        torch.cat((log_alpha_bar.new_ones(1), log_alpha_bar.exp())),
        torch.cat((log_alpha_bar.new_zeros(1), -log_alpha_bar.expm1())),
    )
    return rescaled_to_zero_terminal_snr(chain) if zero_terminal_snr else chain


def betas(*, betas: tuple[InsideOne, ...], zero_terminal_snr: bool = False) -> Discrete:
    """The chain of any list β_1 .. β_T, each in (0, 1)."""
    return from_betas(torch.tensor(betas, dtype=torch.float64), zero_terminal_snr=zero_terminal_snr)


def rescaled_to_zero_terminal_snr(chain: Discrete) -> Discrete:
    """Shift and scale √ᾱ so that ᾱ_T = 0 and ᾱ_1 stays (Lin et al. 2023, Alg. 1)."""
    alpha = chain.alpha_bar.sqrt()
    first, last = alpha[1], alpha[-1]
    rescaled = (alpha - last) * first / (first - last)
    rescaled[0] = 1
    return Discrete(rescaled**2, (1 - rescaled) * (1 + rescaled))


def linear(
    *,
    steps: Chain = 1000,
    beta_start: InsideOne = 1e-4,
    beta_end: InsideOne = 0.02,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """β from 1e-4 to 0.02 (Ho et al. 2020, Sec. 4), scaled by 1000/T to end as noisy at any T."""
    _check_rising(beta_start, beta_end)
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return from_betas(_per_step(betas), zero_terminal_snr=zero_terminal_snr)


def quadratic(
    *,
    steps: Chain = 1000,
    beta_start: InsideOne = 1e-4,
    beta_end: InsideOne = 0.02,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """√β from √1e-4 to √0.02 in even steps ("quad" of Ho et al. 2020's code), scaled by 1000/T."""
    _check_rising(beta_start, beta_end)
    root = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return from_betas(_per_step(root**2), zero_terminal_snr=zero_terminal_snr)


def scaled_linear(
    *,
    steps: Chain = 1000,
    beta_start: InsideOne = 8.5e-4,
    beta_end: InsideOne = 0.012,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """`quadratic` between the end points of latent diffusion (Rombach et al. 2022's models)."""
    return quadratic(
        steps=steps,
        beta_start=beta_start,
        beta_end=beta_end,
        zero_terminal_snr=zero_terminal_snr,
    )


def beta_sigmoid(
    *,
    steps: Chain = 1000,
    beta_start: InsideOne = 1e-4,
    beta_end: InsideOne = 0.02,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """β along a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff), scaled by 1000/T."""
    _check_rising(beta_start, beta_end)
    rise = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64))
    betas = beta_start + (beta_end - beta_start) * rise
    return from_betas(_per_step(betas), zero_terminal_snr=zero_terminal_snr)


def alpha_sigmoid(
    *,
    steps: Chain = 1000,
    start: Finite = -3.0,
    end: Finite = 3.0,
    tau: Positive = 1.0,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """ᾱ along a falling sigmoid (Jabri et al. 2022, Alg. 1)."""

    def falling(u: Tensor) -> Tensor:
        at = torch.sigmoid(torch.tensor([start, end], dtype=torch.float64) / tau)
        return (at[1] - torch.sigmoid((u * (end - start) + start) / tau)) / (at[1] - at[0])

    return from_betas(_betas_of(falling, steps), zero_terminal_snr=zero_terminal_snr)


def cosine(
    *, steps: Chain = 1000, offset: Fraction = 0.008, zero_terminal_snr: bool = False
) -> Discrete:
    """ᾱ = cos²((u + 0.008)/1.008·π/2) with β ≤ 0.999 (Nichol & Dhariwal 2021, Eq. 17)."""

    def squared_cosine(u: Tensor) -> Tensor:
        return ((u + offset) / (1 + offset) * math.pi / 2).cos() ** 2

    return from_betas(_betas_of(squared_cosine, steps), zero_terminal_snr=zero_terminal_snr)


def _check_rising(beta_start: float, beta_end: float) -> None:
    if beta_start > beta_end:
        raise ConfigError(
            f"schedule.beta_start={beta_start:g} is above schedule.beta_end={beta_end:g}; a chain "
            "adds more noise in later steps"
        )


def _betas_of(alpha_bar: Callable[[Tensor], Tensor], steps: int, most: float = 0.999) -> Tensor:
    """β_t = 1 - ᾱ_t / ᾱ_{t-1}, at most 0.999 (Nichol & Dhariwal 2021, Sec. 3.2)."""
    at = alpha_bar(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return (1 - at[1:] / at[:-1]).clamp(max=most)


def _per_step(betas_of_1000: Tensor, most: float = 0.999) -> Tensor:
    """Scale β by 1000/T: a chain of 100 steps must take ten times larger ones."""
    betas = betas_of_1000 * (1000 / len(betas_of_1000))
    if (betas > most).any():
        warnings.warn(
            f"{len(betas)} steps are too few for this schedule: {int((betas > most).sum())} of its "
            f"β would pass {most} and are cut there; more steps or schedule=cosine keep its shape",
            stacklevel=3,
        )
    return betas.clamp(max=most)


def _interpolate(table: Tensor, t: Tensor) -> Tensor:
    table = table.to(t.device)
    below = t.floor().long().clamp(0, len(table) - 2)
    part = t - below
    return table[below] * (1 - part) + table[below + 1] * part
