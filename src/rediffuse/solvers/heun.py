"""Heun's method, with EDM's churn."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Prediction, Schedule, travel
from rediffuse.ranges import Limit, NonNegative
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def heun(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    churn: NonNegative = 0.0,
    churn_min: NonNegative = 0.0,
    churn_max: Limit = math.inf,
    noise_scale: NonNegative = 1.0,
) -> Iterator[Tensor]:
    """Karras et al. 2022, Alg. 2: the trapezoid rule on dx = x_0·dα + ε·dσ, two evaluations a step.

    `churn` (S_churn) first raises the noise level where σ/α lies in [`churn_min`, `churn_max`]
    (S_tmin, S_tmax), with noise of standard deviation `noise_scale` (S_noise). A step that ends
    below t_min, where no network was trained, is Euler's.
    """
    rise = min(churn / (len(times) - 1), math.sqrt(2) - 1)  # their γ_i
    for t, s in pairwise(times):
        ratio = (-schedule(t).half_log_snr).exp()  # σ/α
        if rise > 0 and churn_min <= ratio <= churn_max:
            t, x = _raised(schedule, x, t, ratio * (1 + rise), noise, noise_scale)
        now, then = schedule(t), schedule(s)
        first = denoise(x, t)
        guess = travel(first, x, now, then)
        if s >= schedule.t_min:
            second = denoise(guess, s)
            mean = Prediction((first.x_0 + second.x_0) / 2, (first.eps + second.eps) / 2)
            x = travel(mean, x, now, then)
        else:
            x = guess
        yield x


def _raised(
    schedule: Schedule, x: Tensor, t: Tensor, ratio: Tensor, noise: Noise, noise_scale: float
) -> tuple[Tensor, Tensor]:
    """Move x to the noisier time where σ/α is `ratio` (Karras et al. 2022, Alg. 2, lines 5-6)."""
    higher = schedule.snap(schedule.time(-ratio.log()))
    if higher <= t:  # a discrete chain may have no step in between, and none above T
        return t, x
    now, then = schedule(t), schedule(higher)
    kept = then.alpha / now.alpha
    added = noise_scale * (then.sigma**2 - (kept * now.sigma) ** 2).clamp(min=0).sqrt()
    return torch.as_tensor(higher), expand(kept, x) * x + expand(added, x) * noise(x)
