"""Denoisers that are known exactly, networks that say what a test wants, and all schedules."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rediffuse.denoiser import Denoise
from rediffuse.process import Prediction, Schedule
from rediffuse.schedules import cosine, discrete, edm, flow, vp
from rediffuse.tensors import expand

CHAINS = {
    "linear": discrete.linear,
    "scaled_linear": discrete.scaled_linear,
    "quadratic": discrete.quadratic,
    "cosine": discrete.cosine,
    "alpha_sigmoid": discrete.alpha_sigmoid,
    "beta_sigmoid": discrete.beta_sigmoid,
}
CONTINUOUS: dict[str, Schedule] = {
    "vp": vp.vp(),
    "cosine": cosine.cosine(),
    "edm": edm.edm(),
    "flow": flow.flow(),
    "flow_shifted": flow.flow(shift=3.0),
}
CHAINS_OF_1000: dict[str, Schedule] = {f"{name}_1000": chain() for name, chain in CHAINS.items()}
ZERO_SNR_1000: dict[str, Schedule] = {
    f"{name}_zero_snr": chain(zero_terminal_snr=True) for name, chain in CHAINS.items()
}
SCHEDULES = CONTINUOUS | CHAINS_OF_1000 | ZERO_SNR_1000


def is_chain(schedule: Schedule) -> bool:
    return isinstance(schedule, discrete.Discrete)


def scalar(value: float) -> Tensor:
    """A time or a coefficient: float64 without dimensions."""
    return torch.tensor(value, dtype=torch.float64)


def about(expected: Any, rel: float = 1e-9) -> Any:
    """pytest.approx without its absolute tolerance of 1e-12, which small numbers would hide in."""
    return pytest.approx(expected, rel=rel, abs=0)


def several_times(schedule: Schedule, count: int = 200) -> Tensor:
    """Times from t_min to t_max that the network knows, rising; every step of a chain."""
    if is_chain(schedule):
        return torch.arange(1, int(schedule.t_max) + 1, dtype=torch.float64)
    return torch.linspace(schedule.t_min, schedule.t_max, count, dtype=torch.float64)


def images(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 images that only depend on shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gaussian(schedule: Schedule, std: float = 0.5) -> Denoise:
    """E[x_0 | x_t] for data N(0, std²): linear in x_t, exact to the last bit in any batch."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        at = schedule(t)
        total = (at.alpha * std) ** 2 + at.sigma**2
        return Prediction(
            expand(at.alpha * std**2 / total, x_t) * x_t, expand(at.sigma / total, x_t) * x_t
        )

    return denoise


def gaussian_flow(schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, std: float = 0.5) -> Tensor:
    """Where the probability-flow ODE carries x from t to s: it only rescales a Gaussian."""
    now, then = (((at.alpha * std) ** 2 + at.sigma**2).sqrt() for at in (schedule(t), schedule(s)))
    return x * then / now


def two_points(schedule: Schedule) -> Denoise:
    """E[x_0 | x_t] for data that is -1 or 1 with equal chances."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        at = schedule(t)
        x_0 = (expand(at.alpha / at.sigma**2, x_t) * x_t).tanh()
        return Prediction(x_0, (x_t - expand(at.alpha, x_t) * x_0) / expand(at.sigma, x_t))

    return denoise


def two_points_quantile(schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    """P(x_t < x), which the probability-flow ODE keeps for every image with the marginals."""
    at = schedule(t)
    return sum(torch.special.ndtr((x - sign * at.alpha) / at.sigma) / 2 for sign in (-1, 1))


def final(states: Iterator[Tensor]) -> Tensor:
    """The last state that a solver yields."""
    *_, last = states
    return last


def no_noise(like: Tensor) -> Tensor:
    """A solver's noise where none may be drawn."""
    raise AssertionError("this solver must not draw noise here")


class Impulses:
    """Noise that is 1 for row k at the k-th draw, else 0: what comes out are gains, not samples."""

    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, like: Tensor) -> Tensor:
        self.draws += 1
        impulse = torch.zeros_like(like)
        impulse[self.draws] = 1
        return impulse


class Drawn:
    """Noise that remembers how often it was asked."""

    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, like: Tensor) -> Tensor:
        self.draws += 1
        return images(*like.shape, seed=self.draws).to(like)


class Counted:
    """A denoiser that counts its evaluations."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.evaluations = denoise, 0

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        self.evaluations += 1
        return self.denoise(x_t, t)


class Says(nn.Module):
    """A network whose forward is a function of (x, label, cond)."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.function(x, label, cond)


class SmallNetwork(nn.Module):
    """A real network in float64: each pixel's channels and the time, through two layers."""

    def __init__(self, channels: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(channels, 8), nn.Linear(8, channels)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        pixels = x.movedim(1, -1)
        hidden = self.first(pixels) + label.to(x).reshape(-1, *(1,) * (x.ndim - 1)) / 1000
        return self.last(hidden.tanh()).movedim(-1, 1)
