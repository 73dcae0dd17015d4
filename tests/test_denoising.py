"""What a Gaussian's own posterior mean errs by is known, and so is what its variance should be."""

import pytest
import torch
from oracles import SCHEDULES
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.evaluation.denoising import (
    WIDEST,
    Errors,
    Gaussian,
    errors,
    fit,
    levels,
    posterior_mean,
)
from rediffuse.likelihood import log_posterior_variance
from rediffuse.process import Prediction, Schedule, goes_in_steps, transition_variance
from rediffuse.randomness import Stream, normal
from rediffuse.schedules import discrete
from rediffuse.schedules.flow import flow

VARIANCES = torch.tensor([2.0, 0.5, 0.1, 0.02]).double()


def drawn(count: int, size: int, seed: int = 0) -> Tensor:
    return normal(seed, Stream.EVALUATION, torch.arange(count), (1, 1, size)).double()


@pytest.fixture(scope="module")
def gaussian() -> Gaussian:
    axes = torch.linalg.qr(drawn(4, 4, seed=5)[:, 0, 0]).Q
    return Gaussian(drawn(1, 4, seed=6)[0], axes, VARIANCES, 0.0)


def images(gaussian: Gaussian, count: int) -> Tensor:
    z = drawn(count, 4)[:, 0, 0] * gaussian.variances.sqrt()
    return gaussian.mean + (z @ gaussian.axes).view(count, 1, 1, 4)


def exact(gaussian: Gaussian, schedule: Schedule) -> Denoise:
    return lambda x_t, t: posterior_mean(gaussian, schedule, x_t, t)


@pytest.mark.parametrize("schedule", [discrete.linear(), flow()], ids=["linear", "flow"])
def test_the_posterior_mean_errs_by_its_variance(gaussian: Gaussian, schedule: Schedule) -> None:
    x_0, eps = images(gaussian, 20_000), drawn(20_000, 4, seed=1)
    for t in levels(schedule, 7):
        at = schedule(t)
        known = (VARIANCES * at.sigma**2 / (at.alpha**2 * VARIANCES + at.sigma**2)).mean()
        found = errors(exact(gaussian, schedule), schedule, x_0, eps, t)
        assert float(found.x_0.mean()) == pytest.approx(float(known), rel=0.04)
        torch.testing.assert_close(found.eps, found.x_0 * (at.alpha / at.sigma) ** 2)


@pytest.mark.parametrize("count", [3, 60])
def test_the_fit_has_the_mean_and_covariance_of_the_images(count: int) -> None:
    x = drawn(count, 8)
    found = fit(x, rest=0.25)
    flat = x.flatten(1)
    torch.testing.assert_close(found.mean.flatten(), flat.mean(dim=0))
    covariance = found.axes.T @ torch.diag(found.variances) @ found.axes
    torch.testing.assert_close(covariance, torch.cov(flat.T, correction=0))
    assert found.rest == 0.25


def test_what_the_axes_do_not_reach_has_the_rest_for_its_variance() -> None:
    schedule = flow()
    all_alike = Gaussian(torch.zeros(1, 1, 4), torch.zeros(0, 4), torch.zeros(0), 0.3)
    full = Gaussian(torch.zeros(1, 1, 4), torch.eye(4), torch.full((4,), 0.2), 0.1)
    x_t, t = drawn(5, 4).float(), torch.tensor(0.4).double()
    torch.testing.assert_close(
        posterior_mean(all_alike, schedule, x_t, t).x_0, posterior_mean(full, schedule, x_t, t).x_0
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_are_evenly_spread_and_are_times_that_the_network_knows(name: str) -> None:
    schedule = SCHEDULES[name]
    times = levels(schedule, 9)
    assert 2 <= len(times) <= 9
    assert (times.diff() > 0).all()
    assert schedule.t_min <= times[0]
    assert times[-1] <= schedule.t_max
    assert torch.equal(schedule.snap(times), times)
    half = schedule(times).half_log_snr
    if not goes_in_steps(schedule):
        assert half.abs().max() <= WIDEST + 1e-6
        torch.testing.assert_close(half.diff(), half.diff().mean().expand(len(times) - 1))


def calibrated(gaussian: Gaussian, spread: float) -> Errors:
    """Errors of a model that knows its mean, and takes `spread` times the variance to be true."""
    schedule, t = discrete.linear(steps=50), torch.tensor(20.0).double()
    now, then = schedule(t), schedule(t - 1)
    beta = transition_variance(schedule, t, t - 1)
    smallest = log_posterior_variance(schedule, t, t - 1)
    on_x_0 = then.alpha * beta / now.sigma**2
    one = Gaussian(
        torch.zeros(1, 1, 4).double(), torch.eye(4).double(), torch.ones(4).double(), 0.0
    )
    true = smallest.exp() + on_x_0**2 * now.sigma**2 / (now.alpha**2 + now.sigma**2)
    fraction = ((spread * true).log() - smallest) / (beta.log() - smallest)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return posterior_mean(one, schedule, x_t, t)._replace(variance=fraction.expand_as(x_t))

    return errors(denoise, schedule, drawn(20_000, 4), drawn(20_000, 4, seed=1), t)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_a_right_variance_has_calibration_1_and_half_of_it_2(
    gaussian: Gaussian, spread: float
) -> None:
    found = calibrated(gaussian, spread).calibration
    assert found is not None
    assert float(found.mean()) == pytest.approx(1 / spread, rel=0.02)
