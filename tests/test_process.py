"""The process: marginals, transitions and posteriors, against the equations of the papers."""

import pytest
import torch
from oracles import CHAINS_OF_1000, SCHEDULES, ZERO_SNR_1000, about, images, scalar, several_times
from torch import Tensor

from rediffuse.process import Prediction, Scales, diffuse, posterior, transition_variance, travel
from rediffuse.schedules import discrete, edm
from rediffuse.tensors import expand

close = {"rtol": 1e-9, "atol": 1e-12}


def on_chain(schedule: discrete.Discrete) -> tuple[Tensor, Tensor, Tensor]:
    """t = 1 .. T, with x_t and x_0 for each."""
    t = several_times(schedule)
    return t, images(len(t), 2, seed=1), images(len(t), 2, seed=2)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_diffuse_scales_each_image_by_its_own_time(schedule):
    t = several_times(schedule)[[0, 10, -1]]
    x_0, eps = images(3, 2, 3, 3, seed=1), images(3, 2, 3, 3, seed=2)
    together = diffuse(schedule, x_0, eps, t)
    for n in range(3):
        at = schedule(t[n])
        expected = at.alpha.item() * x_0[n] + at.sigma.item() * eps[n]
        torch.testing.assert_close(together[n], expected, **close)
        alone = diffuse(schedule, x_0[n : n + 1], eps[n : n + 1], t[n])
        torch.testing.assert_close(together[n : n + 1], alone, **close)


def test_a_batch_of_coefficients_never_broadcasts_over_the_width():
    coefficient, x = torch.arange(3.0, dtype=torch.float64), torch.ones(3, 1, 2, 3)
    product = expand(coefficient, x) * x
    assert product.dtype == torch.float32
    assert product.equal(torch.arange(3.0).reshape(3, 1, 1, 1) * torch.ones(3, 1, 2, 3))


def test_the_posterior_on_the_grid_is_ho_et_al_equations_6_and_7():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    schedule = discrete.linear()
    t, x_t, x_0 = on_chain(schedule)

    to = posterior(schedule, x_t, x_0, t, t - 1)

    on_x_0 = before.sqrt() * beta / (1 - alpha_bar)
    on_x_t = alpha.sqrt() * (1 - before) / (1 - alpha_bar)
    mean = on_x_0[:, None] * x_0 + on_x_t[:, None] * x_t
    torch.testing.assert_close(to.mean, mean, **close)
    variance = (1 - before) / (1 - alpha_bar) * beta
    torch.testing.assert_close(to.log_var[:, 0].exp(), variance, **close)


@pytest.mark.parametrize("stride", [2, 20, 100])
@pytest.mark.parametrize("schedule", CHAINS_OF_1000.values(), ids=CHAINS_OF_1000)
def test_the_posterior_over_strides_is_that_of_the_respaced_chain(schedule, stride):
    alpha_bar = schedule.alpha_bar[::stride]
    respaced = discrete.from_betas(1 - alpha_bar[1:] / alpha_bar[:-1])
    t, x_t, x_0 = on_chain(respaced)

    of_respaced = posterior(respaced, x_t, x_0, t, t - 1)
    strided = posterior(schedule, x_t, x_0, t * stride, (t - 1) * stride)

    torch.testing.assert_close(strided.mean, of_respaced.mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(strided.log_var, of_respaced.log_var, rtol=1e-8, atol=1e-9)
    betas = transition_variance(respaced, t, t - 1)
    torch.testing.assert_close(
        transition_variance(schedule, t * stride, (t - 1) * stride), betas, rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_posterior_is_gaussian_conditioning_and_keeps_the_marginal(schedule):
    """Bayes' rule on q(x_s | x_0)·q(x_t | x_s); averaged over q(x_t | x_0) it is q(x_s | x_0)."""
    now = several_times(schedule)
    t, s = now[1:], now[:-1]
    var_ts = transition_variance(schedule, t, s)
    assert (var_ts > 0).all()
    gain = schedule(t).alpha / schedule(s).alpha

    x_t, x_0 = images(len(t), 2, seed=1), images(len(t), 2, seed=2)
    to = posterior(schedule, x_t, x_0, t, s)

    precision = 1 / schedule(s).sigma ** 2 + gain**2 / var_ts
    torch.testing.assert_close(to.log_var[:, 0], -precision.log(), rtol=1e-7, atol=1e-7)
    ones, zeros = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1).double()
    on_x_t = posterior(schedule, ones, zeros, t, s).mean[:, 0]
    on_x_0 = posterior(schedule, zeros, ones, t, s).mean[:, 0]
    torch.testing.assert_close(on_x_t, gain / var_ts / precision, rtol=1e-7, atol=1e-9)
    kept = on_x_0 + on_x_t * schedule(t).alpha
    torch.testing.assert_close(kept, schedule(s).alpha, rtol=1e-9, atol=1e-9)
    spread = to.log_var[:, 0].exp() + (on_x_t * schedule(t).sigma) ** 2
    torch.testing.assert_close(spread, schedule(s).sigma ** 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_posterior_is_finite_everywhere_and_a_point_on_data(schedule):
    t = several_times(schedule)
    x_t, x_0 = images(len(t), 2, seed=1), images(len(t), 2, seed=2)
    to = posterior(schedule, x_t[1:], x_0[1:], t[1:], t[:-1])
    assert to.mean.isfinite().all()
    assert to.log_var.isfinite().all()
    onto_data = posterior(schedule, x_t, x_0, t, torch.zeros_like(t))
    torch.testing.assert_close(onto_data.mean, x_0, rtol=0, atol=1e-15)
    assert (onto_data.log_var == -torch.inf).all()


@pytest.mark.parametrize(
    ("chain", "log_of_the_second"),
    [(discrete.linear, -9.81672513529567), (discrete.cosine, -10.7340825324650)],
)
def test_the_published_posterior_variances(chain, log_of_the_second):
    schedule = chain()
    x = torch.ones(1, 1, dtype=torch.float64)
    log_var = {
        t: posterior(schedule, x, x, scalar(t), scalar(t - 1.0)).log_var for t in (1, 2, 1000)
    }
    assert log_var[1].exp().item() == 0
    assert log_var[2].item() == about(log_of_the_second)
    if chain is discrete.linear:
        assert log_var[2].exp().item() == about(5.4531876613e-5)
        assert log_var[1000].exp().item() == about(1.99999835266e-2)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_transition_over_two_steps_is_one_after_the_other(schedule):
    now = several_times(schedule)
    t, u, s = now[2:], now[1:-1], now[:-2]
    in_two = (schedule(t).alpha / schedule(u).alpha) ** 2 * transition_variance(schedule, u, s)
    torch.testing.assert_close(
        transition_variance(schedule, t, s), in_two + transition_variance(schedule, t, u), **close
    )


def test_travel_in_an_exploding_process_is_eulers_step_in_sigma():
    schedule, x = edm.edm(), images(4, 3)
    predicted = Prediction(images(4, 3, seed=1), (x - images(4, 3, seed=1)) / 5)
    moved = travel(predicted, x, schedule(scalar(5.0)), schedule(scalar(3.0)))
    torch.testing.assert_close(moved, x + (3 - 5) * (x - predicted.x_0) / 5, **close)


def test_half_log_snr_is_infinite_on_data_and_minus_infinite_on_noise():
    assert Scales(scalar(1.0), scalar(0.0)).half_log_snr == torch.inf
    assert Scales(scalar(0.0), scalar(1.0)).half_log_snr == -torch.inf
    assert Scales(scalar(3.0), scalar(1.0)).half_log_snr.exp().item() == about(3, rel=1e-15)
    assert all(schedule(scalar(schedule.t_max)).alpha == 0 for schedule in ZERO_SNR_1000.values())
