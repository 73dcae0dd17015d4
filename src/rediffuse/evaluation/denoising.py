"""How well a denoiser denoises, noise level by noise level, and what a Gaussian would make of it.

At each time the same images meet the same noise, so that two denoisers differ by what they learned
alone. The error of ε is that of x_0 times the SNR, since α·x_0 + σ·ε = x_t: the one is telling
where there is little noise, the other where there is much.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.likelihood import log_posterior_variance
from rediffuse.process import (
    Images,
    Prediction,
    Scales,
    Schedule,
    Time,
    diffuse,
    goes_in_steps,
    transition_variance,
)

WIDEST = 5.0
"""Levels lie within e^±5 of α = σ; beyond, data or noise is all that there is."""


class Gaussian(NamedTuple):
    """A normal distribution of images: its mean, unit axes and the variance along each.

    `rest` is the variance in every other direction, and added to the others.
    """

    mean: Float[Tensor, "*shape"]
    axes: Float[Tensor, "rank dim"]
    variances: Float[Tensor, " rank"]
    rest: float


class Errors(NamedTuple):
    """Squared errors, the mean over each image's values, and the calibration of its variance.

    `calibration` is the mean squared residual of x_s, one step on, over the variance that was
    predicted for it: 1 is right, more is overconfident. None where no variance is learned.
    """

    x_0: Float[Tensor, " batch"]
    eps: Float[Tensor, " batch"]
    calibration: Float[Tensor, " batch"] | None


def levels(schedule: Schedule, count: int) -> Time:
    """Times evenly spread in log-SNR, from data to noise; the nearest steps of a chain."""
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    low, high = schedule(ends).half_log_snr.clamp(-WIDEST, WIDEST).tolist()
    times = schedule.time(torch.linspace(low, high, count, dtype=torch.float64))
    return schedule.snap(times.clamp(schedule.t_min, schedule.t_max)).unique()


def errors(denoise: Denoise, schedule: Schedule, x_0: Images, eps: Images, t: Time) -> Errors:
    """What a denoiser makes of images at one time."""
    x_t = diffuse(schedule, x_0, eps, t)
    predicted = denoise(x_t, t)
    return Errors(
        _squared(predicted.x_0 - x_0),
        _squared(predicted.eps - eps),
        _calibration(schedule, predicted, x_0, t),
    )


def fit(images: Images, rest: float) -> Gaussian:
    """The normal distribution with the images' mean and covariance, and `rest` added to it."""
    x = images.flatten(1).double()
    mean = x.mean(dim=0)
    x = x - mean
    if x.shape[1] <= len(x):
        variances, vectors = torch.linalg.eigh(x.T @ x / len(x))
        axes = vectors.T
    else:  # the same, by way of the products of images with one another
        variances, vectors = torch.linalg.eigh(x @ x.T / len(x))
        variances, vectors = variances[1:], vectors[:, 1:]  # the mean takes one away
        axes = (x.T @ vectors / (len(x) * variances.clamp(min=1e-12)).sqrt()).T
    return Gaussian(
        mean.view(images.shape[1:]).to(images),
        axes.to(images),
        variances.clamp(min=0).to(images),
        rest,
    )


def posterior_mean(gaussian: Gaussian, schedule: Schedule, x_t: Images, t: Time) -> Prediction:
    """E[x_0 | x_t] if images had this distribution: the best that a linear denoiser can do."""
    at = schedule(t)
    away = x_t - at.alpha.to(x_t) * gaussian.mean
    flat = away.flatten(1)
    least = _gain(at, torch.tensor(gaussian.rest).double()).to(x_t)
    gain = _gain(at, gaussian.variances.double() + gaussian.rest).to(x_t)
    moved = least * flat + ((flat @ gaussian.axes.T) * (gain - least)) @ gaussian.axes
    x_0 = gaussian.mean + moved.view_as(x_t)
    return Prediction(x_0, (x_t - at.alpha.to(x_t) * x_0) / at.sigma.to(x_t))


def rms(x: Tensor) -> float:
    """The root of the mean square of all values."""
    return math.sqrt(float(x.double().square().mean()))


def _gain(at: Scales, variance: Tensor) -> Tensor:
    return at.alpha * variance / (at.alpha**2 * variance + at.sigma**2)


def _squared(x: Images) -> Tensor:
    return x.double().square().flatten(1).mean(dim=1)


def _calibration(schedule: Schedule, predicted: Prediction, x_0: Images, t: Time) -> Tensor | None:
    """E[(x_s - μ)²]/σ² with s = t - 1: of q(x_s | x_t, x_0) around the predicted mean."""
    if predicted.variance is None or not goes_in_steps(schedule) or t < 2:
        return None
    s, now = t - 1, schedule(t)
    log_smallest = log_posterior_variance(schedule, t, s)
    beta = transition_variance(schedule, t, s)
    on_x_0 = schedule(s).alpha * beta / now.sigma**2
    fraction = predicted.variance.double()
    log_var = fraction * beta.log() + (1 - fraction) * log_smallest
    residual = log_smallest.exp() + (on_x_0 * (predicted.x_0 - x_0).double()).square()
    return (residual / log_var.exp()).flatten(1).mean(dim=1)
