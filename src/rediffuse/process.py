"""The one process: x_t = α_t·x_0 + σ_t·ε, with ε ~ N(0, I).

A schedule maps its paper's own clock t to (α_t, σ_t); t = 0 is data on every clock: (1, 0).
Everything else follows from those two numbers, for the discrete chain of Ho et al. 2020 as for the
continuous ones. `t` is now and `s < t` is next. Times and scales are float64; `expand` casts them
at the point of use.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rediffuse.tensors import expand

Time = Float64[Tensor, "..."]
Images = Float[Tensor, "batch *shape"]


class Scales(NamedTuple):
    """How much of the image (α) and of the noise (σ) there is in x_t."""

    alpha: Tensor
    sigma: Tensor

    @property
    def half_log_snr(self) -> Tensor:
        """λ = ln(α/σ), in nats; +inf on data, -inf on pure noise."""
        return (self.alpha / self.sigma).log()


@runtime_checkable
class Schedule(Protocol):
    """A clock: from `t_min` (almost data) to `t_max` (noise); t = 0 is data itself."""

    @property
    def t_min(self) -> float:
        """The earliest time that a network is asked about."""

    @property
    def t_max(self) -> float:
        """The time of the noise that sampling starts from."""

    def __call__(self, t: Tensor) -> Scales:
        """The scales at t."""

    def time(self, half_log_snr: Tensor) -> Tensor:
        """The inverse: when ln(α/σ) has this value."""

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time that the network was trained at."""

    def label(self, t: Tensor) -> Tensor:
        """The number by which the paper tells its network the time."""


class Prediction(NamedTuple):
    """What a denoiser believes: α_t·x_0 + σ_t·ε = x_t always holds.

    `variance` is the learned fraction in [0, 1] between log β̃ and log β (Nichol & Dhariwal 2021,
    Eq. 15).
    """

    x_0: Tensor
    eps: Tensor
    variance: Tensor | None = None


class Gaussian(NamedTuple):
    """A diagonal normal distribution; `log_var` is the natural logarithm of its variance."""

    mean: Tensor
    log_var: Tensor


def goes_in_steps(schedule: Schedule) -> bool:
    """Whether the clock is a chain's, 1 .. T: whether `snap` gives whole steps."""
    last = torch.tensor(schedule.t_max, dtype=torch.float64)
    return bool(schedule.snap(last - 0.25) == last)


def diffuse(schedule: Schedule, x_0: Images, eps: Images, t: Time) -> Images:
    """q(x_t | x_0): x_t = α_t·x_0 + σ_t·ε (Ho et al. 2020, Eq. 4)."""
    at = schedule(t)
    return expand(at.alpha, x_0) * x_0 + expand(at.sigma, eps) * eps


def transition_variance(schedule: Schedule, t: Time, s: Time) -> Tensor:
    """The variance of q(x_t | x_s), s < t (Kingma et al. 2021, App. A.1); β_t on the grid."""
    now, then = schedule(t), schedule(s)
    return now.sigma**2 - (now.alpha / then.alpha) ** 2 * then.sigma**2


def posterior(schedule: Schedule, x_t: Images, x_0: Images, t: Time, s: Time) -> Gaussian:
    """q(x_s | x_t, x_0) for any s < t (Kingma et al. 2021, App. A.2).

    On the integer clock with s = t-1 it is Ho et al. 2020, Eq. 6-7; with s < t-1 it is the
    posterior of the respaced chain, so strided sampling needs no second process.
    """
    now, then = schedule(t), schedule(s)
    var_ts = transition_variance(schedule, t, s)  # β_t on the DDPM grid
    on_x_t = (now.alpha / then.alpha) * then.sigma**2 / now.sigma**2
    on_x_0 = then.alpha * var_ts / now.sigma**2
    mean = expand(on_x_t, x_t) * x_t + expand(on_x_0, x_t) * x_0
    return Gaussian(mean, expand((var_ts * then.sigma**2 / now.sigma**2).log(), x_t))


def travel(predicted: Prediction, x_t: Images, now: Scales, then: Scales) -> Images:
    """Follow dx = x_0·dα + ε·dσ in a straight line from `now` to `then`.

    It is the probability-flow ODE (Song et al. 2021, Eq. 13) with the clock divided out: Euler's
    step in σ for EDM, in t for flow matching, in σ/α for a variance-preserving process.
    """
    d_alpha, d_sigma = then.alpha - now.alpha, then.sigma - now.sigma
    return x_t + expand(d_alpha, x_t) * predicted.x_0 + expand(d_sigma, x_t) * predicted.eps


def between(schedule: Schedule, t: Time, s: Time, part: float = 0.5) -> Tensor | None:
    """Find a time that the network knows where ln(α/σ) is `part` of the way from t to s.

    A chain gives its nearest step, or s itself where none lies strictly between. None where that
    logarithm is infinite or s lies below t_min: there is nothing to ask a network there.
    """
    start, end = schedule(t).half_log_snr, schedule(s).half_log_snr
    if s < schedule.t_min or not (end - start).isfinite():
        return None
    middle = schedule.snap(schedule.time(start + part * (end - start)))
    return middle if s < middle < t else s
