"""Solvers: exact cases, orders of convergence, equalities, and what a caller may rely on."""

import math
from functools import partial

import pytest
import torch
from oracles import (
    CHAINS,
    CONTINUOUS,
    SCHEDULES,
    Counted,
    Drawn,
    Impulses,
    about,
    final,
    gaussian,
    gaussian_flow,
    images,
    is_chain,
    no_noise,
    scalar,
    several_times,
    two_points,
    two_points_quantile,
)
from torch import Tensor

from rediffuse.grids import karras, log_snr, trailing
from rediffuse.process import Prediction, posterior, transition_variance
from rediffuse.randomness import ImageNoise
from rediffuse.schedules import discrete, edm, flow
from rediffuse.solvers.ancestral import ancestral
from rediffuse.solvers.ddim import ddim
from rediffuse.solvers.dpmpp_2m import dpmpp_2m
from rediffuse.solvers.euler import euler
from rediffuse.solvers.heun import heun

DETERMINISTIC = {"euler": euler, "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}
STOCHASTIC = {
    "ancestral": ancestral,
    "ancestral_beta": partial(ancestral, variance=1.0),
    "ddim_eta_1": partial(ddim, eta=1.0),
    "heun_churn": partial(heun, churn=40.0, noise_scale=1.003),
}
SOLVERS = DETERMINISTIC | STOCHASTIC


def end_of(solver, schedule, times: Tensor, x_t: float) -> float:
    """Where the exact solution of N(0, 0.5²) ends when it starts from one number."""
    x = torch.full((1, 1), x_t, dtype=torch.float64)
    return final(solver(gaussian(schedule), schedule, x, times, no_noise)).item()


# Exact cases


@pytest.mark.parametrize(
    ("solver", "of_10", "of_40"),
    [
        (euler, 0.365213065063, 0.464850774486),
        (ddim, 0.365213065063, 0.464850774486),
        (heun, 0.609798000799, 0.504876864654),
        (dpmpp_2m, 0.579386657643, 0.505192424886),
    ],
)
def test_the_published_ends_of_a_gaussian_on_the_karras_grid(solver, of_10, of_40):
    schedule = edm.edm()
    for steps, end in ((10, of_10), (40, of_40)):
        assert end_of(solver, schedule, karras(schedule, steps), 80.0) == about(end)
    exact = gaussian_flow(schedule, scalar(80.0), scalar(80.0), scalar(0.0)).item()
    assert exact == about(0.499990234661093)


def test_the_published_ends_of_a_gaussian_in_flow_matching():
    schedule = flow.flow(t_min=0.0)  # so that Heun's last step has its second evaluation
    ends = [end_of(solver, schedule, trailing(schedule, 10), 1.0) for solver in (euler, heun)]
    assert ends == about([0.430782604899, 0.501719912194])


def test_the_published_ends_of_ddim_on_the_linear_chain():
    schedule = discrete.linear()
    ends = [end_of(ddim, schedule, trailing(schedule, steps), 1.0) for steps in (10, 50)]
    assert ends == about([0.36995477, 0.47140284], rel=2e-6)  # published from float32 tables
    exact = gaussian_flow(schedule, scalar(1.0), scalar(1000.0), scalar(0.0)).item()
    assert exact == about(0.5000075673526)


def test_the_published_output_variance_of_ancestral_sampling():
    """Every step is linear in x and in its noise: the squared gains of all sum to the variance."""
    schedule, noise = discrete.linear(), Impulses()
    x = torch.zeros(1000, 1, dtype=torch.float64)
    x[0] = 1
    gains = final(ancestral(gaussian(schedule), schedule, x, trailing(schedule, 1000), noise))
    assert noise.draws == 999
    assert gains.square().sum().item() == about(0.2461252113602836)


# Orders of convergence


@pytest.mark.parametrize(
    ("schedule", "grid"),
    [("edm", karras), ("edm", log_snr), ("vp", log_snr), ("vp", karras), ("cosine", log_snr)],
)
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence_on_an_exact_gaussian(solver, order, schedule, grid):
    schedule = CONTINUOUS[schedule]
    x = schedule(scalar(schedule.t_max)).sigma.reshape(1, 1)
    errors = []
    for steps in (160, 320):
        times = grid(schedule, steps)
        *_, before_data, _ = solver(gaussian(schedule), schedule, x, times, no_noise)
        exact = gaussian_flow(schedule, x, times[0], times[-2])
        errors.append((before_data - exact).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (ddim, 1), (heun, 2)])
def test_order_of_convergence_down_to_data_on_the_trailing_grid(solver, order, schedule):
    schedule = CONTINUOUS[schedule]
    exact = gaussian_flow(schedule, scalar(1.0), scalar(schedule.t_max), scalar(0.0)).item()
    errors = [
        abs(end_of(solver, schedule, trailing(schedule, steps), 1.0) - exact)
        for steps in (160, 320)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("schedule", "grid"), [("edm", karras), ("vp", log_snr), ("cosine", log_snr)]
)
@pytest.mark.parametrize(("solver", "steps"), [(euler, 2000), (heun, 256), (dpmpp_2m, 256)])
def test_the_ode_keeps_the_quantile_of_every_image_of_a_two_point_distribution(
    solver, steps, schedule, grid
):
    schedule = CONTINUOUS[schedule]
    times = grid(schedule, steps)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64)[:, None] * schedule(times[0]).sigma
    before = two_points_quantile(schedule, x, times[0])
    *states, data = solver(two_points(schedule), schedule, x, times, no_noise)
    for state, t in zip(states, times[1:-1], strict=True):
        assert (two_points_quantile(schedule, state, t) - before).abs().max() < 1e-3
    torch.testing.assert_close(data, x.sign(), rtol=0, atol=1e-9)


# Equalities


@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize("name", CHAINS)
def test_ddim_with_eta_1_is_ancestral_sampling(name, steps):
    schedule = CHAINS[name](steps=100)
    times, x = trailing(schedule, steps), images(3, 2)
    walks = (
        solver(two_points(schedule), schedule, x, times, ImageNoise(0, torch.arange(3)))
        for solver in (partial(ddim, eta=1.0), ancestral)
    )
    for one, other in zip(*walks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_with_eta_0_is_euler(schedule):
    times = trailing(schedule, 20)
    x = images(3, 2) * schedule(times[0]).sigma
    walks = (solver(two_points(schedule), schedule, x, times, no_noise) for solver in (ddim, euler))
    for one, other in zip(*walks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_ddim_is_song_et_al_equations_12_and_16():
    schedule, eta, noise = discrete.linear(), 0.3, Drawn()
    # The paper's α is Ho et al.'s ᾱ, here from index 0 for t = 1.
    alpha = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    x, t, s = images(2, 3), 599, 349
    denoise, times = two_points(schedule), torch.tensor([600.0, 350.0], dtype=torch.float64)
    found = next(ddim(denoise, schedule, x, times, noise, eta=eta))

    eps = denoise(x, times[0]).eps
    sigma = eta * ((1 - alpha[s]) / (1 - alpha[t])).sqrt() * (1 - alpha[t] / alpha[s]).sqrt()
    predicted_x_0 = (x - (1 - alpha[t]).sqrt() * eps) / alpha[t].sqrt()
    direction = (1 - alpha[s] - sigma**2).sqrt() * eps
    literal = alpha[s].sqrt() * predicted_x_0 + direction + sigma * images(2, 3, seed=1)
    torch.testing.assert_close(found, literal, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("variance", [0.0, 1.0])
def test_ancestral_is_ho_et_al_algorithm_2(variance):
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha, alpha_bar = 1 - beta, (1 - beta).cumprod(0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    posterior_variance = (1 - before) / (1 - alpha_bar) * beta
    schedule = discrete.linear()
    denoise = two_points(schedule)

    x = literal = images(2, 3)
    walk = ancestral(denoise, schedule, x, trailing(schedule, 1000), Drawn(), variance=variance)
    for n, found in enumerate(walk, start=1):
        t = 1000 - n  # 0-based
        z = images(2, 3, seed=n) if t > 0 else torch.zeros(2, 3)
        eps = denoise(literal, scalar(t + 1.0)).eps
        deviation = (beta if variance else posterior_variance)[t].sqrt()
        literal = (literal - beta[t] / (1 - alpha_bar[t]).sqrt() * eps) / alpha[
            t
        ].sqrt() + deviation * z
        torch.testing.assert_close(found, literal, rtol=1e-8, atol=1e-8)


def test_a_learned_fraction_interpolates_log_variances_per_pixel():
    """log Σ = f·log β_t + (1 - f)·log β̃_t (Nichol & Dhariwal 2021, Eq. 15)."""
    schedule, x, fraction = discrete.linear(), images(2, 3), images(2, 3, seed=5).sigmoid()
    denoise = two_points(schedule)

    def learned(x_t: Tensor, t: Tensor) -> Prediction:
        return denoise(x_t, t)._replace(variance=fraction)

    t, s = scalar(600.0), scalar(580.0)
    walk = ancestral(learned, schedule, x, torch.stack((t, s)), Drawn(), variance=0.123)
    to = posterior(schedule, x, denoise(x, t).x_0, t, s)
    log_beta = transition_variance(schedule, t, s).log()
    deviation = (fraction * log_beta + (1 - fraction) * to.log_var).exp().sqrt()
    torch.testing.assert_close(
        next(walk), to.mean + deviation * images(2, 3, seed=1), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("s_churn", [4.0, 40.0])
def test_heun_with_churn_is_karras_et_al_algorithm_2(s_churn):
    schedule, steps = edm.edm(), 32
    s_tmin, s_tmax, s_noise = 0.05, 50.0, 1.003
    denoise, drawn = two_points(schedule), Drawn()
    t = karras(schedule, steps)
    x = images(4, 2) * 80
    walk = heun(
        denoise, schedule, x, t, drawn,
        churn=s_churn, churn_min=s_tmin, churn_max=s_tmax, noise_scale=s_noise,
    )  # fmt: skip

    draws = 0
    for i, found in enumerate(walk):
        inside = s_tmin <= t[i] <= s_tmax
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if inside else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x
        if gamma > 0:
            draws += 1
            epsilon = s_noise * images(4, 2, seed=draws)
            x_hat = x + (t_hat**2 - t[i] ** 2).sqrt() * epsilon
        d = (x_hat - denoise(x_hat, t_hat).x_0) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - denoise(x, t[i + 1]).x_0) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
        torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
        assert drawn.draws == draws
    assert 0 < draws < steps


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_churn_moves_an_image_to_a_known_noisier_time_with_the_marginal_of_that_time(schedule):
    known = several_times(schedule)
    t, s = known[len(known) // 2], known[len(known) // 3]
    asked = []

    def denoise(x_t: Tensor, at: Tensor) -> Prediction:
        asked.append((x_t, at))
        return gaussian(schedule)(x_t, at)

    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    next(heun(denoise, schedule, x, torch.stack((t, s)), Impulses(), churn=40.0))
    (kept, added), higher = asked[0]
    now, then = schedule(t), schedule(higher)
    assert higher > t
    assert schedule.snap(higher) == higher
    assert kept.item() == about((then.alpha / now.alpha).item())
    marginal = (kept * now.sigma) ** 2 + added**2
    assert marginal.item() == about(then.sigma.item() ** 2)
    if not is_chain(schedule):
        raised = (now.half_log_snr - then.half_log_snr).exp()
        assert raised.item() == about(math.sqrt(2))


def test_dpmpp_2m_is_lu_et_al_algorithm_2():
    schedule = CONTINUOUS["vp"]
    denoise, t = two_points(schedule), log_snr(CONTINUOUS["vp"], 12)
    alpha, sigma = schedule(t)
    lamda = (alpha / sigma).log()
    x = literal = images(3, 2)
    x_0 = []
    for i, found in enumerate(dpmpp_2m(denoise, schedule, x, t, no_noise), start=1):
        x_0.append(denoise(literal, t[i - 1]).x_0)
        h = lamda[i] - lamda[i - 1]
        d = x_0[-1]
        if 1 < i < 12:
            r = (lamda[i - 1] - lamda[i - 2]) / h
            d = (1 + 1 / (2 * r)) * x_0[-1] - 1 / (2 * r) * x_0[-2]
        literal = sigma[i] / sigma[i - 1] * literal - alpha[i] * ((-h).exp() - 1) * d
        torch.testing.assert_close(found, literal, rtol=1e-9, atol=1e-9)


# What a caller may rely on


@pytest.mark.parametrize(
    ("solver", "evaluations"), [(euler, 18), (ddim, 18), (dpmpp_2m, 18), (heun, 35)]
)
@pytest.mark.parametrize("sigma_min", [0.002, 0.01, 0.003])
def test_deterministic_solvers_draw_no_noise_and_count_their_evaluations(
    solver, evaluations, sigma_min
):
    schedule = edm.edm(sigma_min=sigma_min)
    denoise = Counted(gaussian(schedule))
    states = list(solver(denoise, schedule, images(2, 2), karras(schedule, 18), no_noise))
    assert len(states) == 18
    assert denoise.evaluations == evaluations


def test_stochastic_heun_has_edms_511_evaluations_in_256_steps():
    schedule = edm.edm()
    denoise = Counted(gaussian(schedule))
    churned = partial(heun, churn=40.0, churn_min=0.05, churn_max=50.0, noise_scale=1.003)
    final(churned(denoise, schedule, images(2, 2), karras(schedule, 256), Drawn()))
    assert denoise.evaluations == 511


@pytest.mark.parametrize("solver", [ancestral, partial(ddim, eta=0.5)], ids=["ancestral", "ddim"])
def test_no_noise_is_drawn_on_the_step_to_data(solver):
    schedule, noise = discrete.linear(), Drawn()
    assert (
        len(list(solver(gaussian(schedule), schedule, images(2, 2), trailing(schedule, 20), noise)))
        == 20
    )
    assert noise.draws == 19


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_solver_stays_finite_and_lands_on_the_last_image_it_was_told(solver, schedule):
    told = []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        predicted = two_points(schedule)(x_t, t)
        told.append(predicted.x_0)
        return predicted

    x = images(3, 2) * schedule(scalar(schedule.t_max)).sigma
    for steps in (1, 2, 10):
        states = list(solver(denoise, schedule, x, trailing(schedule, steps), Drawn()))
        assert len(states) == steps
        assert all(state.isfinite().all() for state in states)
        torch.testing.assert_close(states[-1], told[-1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_solver_leaves_the_start_and_earlier_states_as_they_were(solver):
    schedule = discrete.linear()
    x = images(3, 2)
    states, copies = [], []
    for state in solver(gaussian(schedule), schedule, x, trailing(schedule, 10), Drawn()):
        states.append(state)
        copies.append(state.clone())
    assert x.equal(images(3, 2))
    assert all(state.equal(copy) for state, copy in zip(states, copies, strict=True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_solver_never_changes_the_callers_grad_mode(solver, grad):
    schedule, modes = discrete.linear(), []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        modes.append(torch.is_grad_enabled())
        return gaussian(schedule)(x_t, t)

    with torch.set_grad_enabled(grad):
        for _ in solver(denoise, schedule, images(3, 2), trailing(schedule, 5), Drawn()):
            modes.append(torch.is_grad_enabled())
    assert set(modes) == {grad}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_caller_may_stop_early_and_nothing_more_is_evaluated(solver):
    schedule = discrete.linear()
    denoise = Counted(gaussian(schedule))
    walk = solver(denoise, schedule, images(3, 2), trailing(schedule, 50), Drawn())
    assert denoise.evaluations == 0
    next(walk)
    after_one = denoise.evaluations
    walk.close()
    assert list(walk) == []
    assert denoise.evaluations == after_one <= 2
