"""Single-step, stochastic and adaptive solvers, and DDIM backwards: literal methods and laws."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from oracles import (
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
    no_noise,
    scalar,
    two_points,
    two_points_quantile,
)
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.grids import karras, log_snr, trailing
from rediffuse.inversion import inverted
from rediffuse.process import Prediction, between
from rediffuse.schedules import discrete, edm, flow
from rediffuse.solvers.adaptive import adaptive
from rediffuse.solvers.ancestral import ancestral
from rediffuse.solvers.ddim import ddim
from rediffuse.solvers.dpmpp_2s import dpmpp_2s
from rediffuse.solvers.dpmpp_sde import dpmpp_sde
from rediffuse.solvers.euler_ancestral import euler_ancestral
from rediffuse.solvers.euler_maruyama import euler_maruyama
from rediffuse.solvers.midpoint import midpoint
from rediffuse.solvers.predictor_corrector import predictor_corrector

pytestmark = pytest.mark.usefixtures("unchecked")  # test_solver_contract.py checks shapes

dpmpp_sde_of_0 = partial(dpmpp_sde, eta=0.0)
precise = partial(adaptive, rtol=1e-6, atol=1e-6)


def excess_variance(solver, schedule, times: Tensor) -> float:
    """How much too large, relatively, the variance of N(0, 0.5²) is just before data."""

    def variance(t: Tensor) -> Tensor:
        at = schedule(t)
        return (at.alpha / 2) ** 2 + at.sigma**2

    x = torch.zeros(2 * len(times), 1, dtype=torch.float64)
    x[0] = variance(times[0]).sqrt()
    *_, gains, _ = solver(gaussian(schedule), schedule, x, times, Impulses())
    return (gains.square().sum() / variance(times[-2]) - 1).item()


# Exact cases


@pytest.mark.parametrize("solver", [dpmpp_2s, dpmpp_sde_of_0], ids=["dpmpp_2s", "dpmpp_sde"])
def test_the_published_ends_of_a_gaussian_on_the_karras_grid(solver):
    schedule, x = edm.edm(), torch.full((1, 1), 80.0, dtype=torch.float64)
    ends = [
        final(solver(gaussian(schedule), schedule, x, karras(schedule, steps), no_noise)).item()
        for steps in (10, 40)
    ]
    assert ends == about([0.461457097639, 0.497425888090])


def test_midpoint_is_eulers_midpoint_rule_in_sigma_with_the_geometric_mean():
    """k-diffusion's "dpm_2": x + (σ_s - σ_t)·ε(x + (σ_m - σ_t)·ε, σ_m), σ_m = √(σ_t·σ_s)."""
    schedule = edm.edm()
    denoise, sigma = two_points(schedule), karras(schedule, 12)
    x = literal = images(3, 2) * 80
    walk = midpoint(denoise, schedule, x, sigma, no_noise)
    for found, (t, s) in zip(walk, pairwise(sigma), strict=True):
        eps = denoise(literal, t).eps
        if s > 0:
            middle = (t * s).sqrt()
            eps = denoise(literal + (middle - t) * eps, middle).eps
        literal = literal + (s - t) * eps
        torch.testing.assert_close(found, literal, rtol=1e-9, atol=1e-9)


def test_dpmpp_2s_is_lu_et_al_algorithm_1():
    schedule = CONTINUOUS["vp"]
    denoise, t = two_points(schedule), log_snr(schedule, 12)[:-1]
    alpha, sigma = schedule(t)
    lamda = (alpha / sigma).log()
    x = literal = images(3, 2)
    for i, found in enumerate(dpmpp_2s(denoise, schedule, x, t, no_noise), start=1):
        h, r = lamda[i] - lamda[i - 1], 1 / 2
        s = schedule.time(lamda[i - 1] + r * h)
        at = schedule(s)
        x_0 = denoise(literal, t[i - 1]).x_0
        u = at.sigma / sigma[i - 1] * literal - at.alpha * ((-r * h).exp() - 1) * x_0
        d = (1 - 1 / (2 * r)) * x_0 + 1 / (2 * r) * denoise(u, s).x_0
        literal = sigma[i] / sigma[i - 1] * literal - alpha[i] * ((-h).exp() - 1) * d
        torch.testing.assert_close(found, literal, rtol=1e-9, atol=1e-9)


def split(t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """k-diffusion's σ_down and σ_up of a step from σ = t to s."""
    up = min(s, eta * (s**2 * (t**2 - s**2) / t**2) ** 0.5)
    return (s**2 - up**2) ** 0.5, up


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_euler_ancestral_is_k_diffusions(eta):
    schedule, noise = edm.edm(), Drawn()
    denoise, sigma = two_points(schedule), karras(schedule, 12)
    x = literal = images(3, 2) * 80
    walk = euler_ancestral(denoise, schedule, x, sigma, Drawn(), eta=eta, noise_scale=1.1)
    for found, (t, s) in zip(walk, pairwise(sigma), strict=True):
        down, up = split(t, s, eta)
        literal = literal + (down - t) * denoise(literal, t).eps
        if s > 0 and eta:
            literal = literal + 1.1 * up * noise(literal)
        torch.testing.assert_close(found, literal, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("eta", "r"), [(0.3, 0.5), (1.0, 0.5), (1.0, 0.3), (1.0, 0.8)])
def test_dpmpp_sde_is_k_diffusions_on_one_brownian_path(eta, r):
    schedule, noise = edm.edm(), Drawn()
    denoise, sigma = two_points(schedule), karras(schedule, 12)
    x = literal = images(3, 2) * 80
    walk = dpmpp_sde(denoise, schedule, x, sigma, Drawn(), eta=eta, noise_scale=1.1, r=r)
    for found, (t, s) in zip(walk, pairwise(sigma), strict=True):
        x_0 = denoise(literal, t).x_0
        if s > 0:
            m = t ** (1 - r) * s**r
            down, up = split(t, m, eta)
            z = noise(literal)
            halfway = down / t * literal + (1 - down / t) * x_0 + 1.1 * up * z
            d = (1 - 1 / (2 * r)) * x_0 + 1 / (2 * r) * denoise(halfway, m).x_0
            down, up = split(t, s, eta)
            # Brownian in 1/σ², in which the SDE's noise over σ² has even increments
            z = (m**-2 - t**-2).sqrt() * z + (s**-2 - m**-2).clamp(min=0).sqrt() * noise(literal)
            z = z / (s**-2 - t**-2).sqrt()
            literal = down / t * literal + (1 - down / t) * d + 1.1 * up * z
        else:
            literal = x_0
        torch.testing.assert_close(found, literal, rtol=1e-8, atol=1e-9)


def test_euler_maruyama_is_the_reverse_vp_sde_in_small_steps():
    """x + (½β·x + β·score)·dt + √(β·dt)·z (Song et al. 2021b, Eq. 6 and 32), up to dt^1.5."""
    schedule, z = CONTINUOUS["vp"], images(3, 2, seed=1)
    denoise, t, x = two_points(schedule), scalar(0.4), images(3, 2)
    beta = 0.1 + 19.9 * t
    missed = []
    for dt in (1e-4, 1e-5):
        found = next(euler_maruyama(denoise, schedule, x, torch.stack((t, t - dt)), lambda _: z))
        at = schedule(t)
        score = (at.alpha * denoise(x, t).x_0 - x) / at.sigma**2
        literal = x + (beta / 2 * x + beta * score) * dt + (beta * dt).sqrt() * z
        missed.append((found - literal).abs().max().item())
    assert missed[1] < 1e-6
    assert math.log10(missed[0] / missed[1]) == pytest.approx(1.5, abs=0.2)  # of the noise


def test_predictor_corrector_is_song_et_al_algorithm_4_after_an_ancestral_step():
    schedule, noise, r = edm.edm(), Drawn(), 0.16
    denoise, sigma = two_points(schedule), karras(schedule, 12)
    x = literal = images(3, 40) * 80
    walk = predictor_corrector(denoise, schedule, x, sigma, Drawn(), corrections=2, snr=r)
    for found, (t, s) in zip(walk, pairwise(sigma), strict=True):
        score = (denoise(literal, t).x_0 - literal) / t**2
        literal = literal + (t**2 - s**2) * score
        if s > 0:
            literal = literal + (s**2 * (t**2 - s**2) / t**2).sqrt() * noise(literal)
            for _ in range(2):
                score, z = (denoise(literal, s).x_0 - literal) / s**2, noise(literal)
                step = 2 * (r * z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2
                literal = literal + step * score + (2 * step).sqrt() * z
        torch.testing.assert_close(found, literal, rtol=1e-8, atol=1e-8)


# Equalities


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_euler_ancestral_is_ddim_of_the_same_eta(schedule, eta):
    times, x = trailing(schedule, 10), images(3, 2) * schedule(scalar(schedule.t_max)).sigma
    one, other = (
        list(solver(two_points(schedule), schedule, x, times, Drawn(), eta=eta))
        for solver in (euler_ancestral, ddim)
    )
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_corrector_without_corrections_is_ancestral_sampling():
    schedule, x = discrete.linear(), images(3, 2)
    one, other = (
        list(solver(two_points(schedule), schedule, x, trailing(schedule, 20), Drawn()))
        for solver in (partial(predictor_corrector, corrections=0), ancestral)
    )
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_dpmpp_sde_of_eta_0_is_dpmpp_2s(schedule):
    times, x = trailing(schedule, 10), images(3, 2) * schedule(scalar(schedule.t_max)).sigma
    one, other = (
        list(solver(two_points(schedule), schedule, x, times, no_noise))
        for solver in (dpmpp_sde_of_0, dpmpp_2s)
    )
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


# Orders of convergence


@pytest.mark.parametrize(
    ("schedule", "grid"), [("edm", karras), ("edm", log_snr), ("vp", log_snr), ("cosine", log_snr)]
)
@pytest.mark.parametrize(
    ("solver", "order"), [(midpoint, 2), (dpmpp_2s, 2), (partial(euler_ancestral, eta=0.0), 1)]
)
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


@pytest.mark.parametrize("solver", [midpoint, dpmpp_2s])
def test_a_chains_nearest_steps_keep_the_second_order(solver):
    """The step between two stops is not the exact middle, and is not taken for it."""
    schedule, x = discrete.linear(), torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for steps in (10, 50):
        times = log_snr(schedule, steps)
        *_, before_data, _ = solver(gaussian(schedule), schedule, x, times, no_noise)
        exact = gaussian_flow(schedule, x, times[0], times[-2])
        errors.append((before_data - exact).abs().item())
    assert math.log(errors[0] / errors[1], 5) > 1.8


@pytest.mark.parametrize("schedule", ["edm", "vp", "cosine"])
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (euler_maruyama, 1),
        (euler_ancestral, 1),
        (dpmpp_sde, 2),
        (partial(dpmpp_sde, eta=0.5), 2),
    ],
)
def test_order_of_convergence_of_a_gaussians_variance(solver, order, schedule):
    """Every step is linear in x and in its noise: the squared gains of all sum to the variance."""
    schedule = CONTINUOUS[schedule]
    coarse, fine = (
        abs(excess_variance(solver, schedule, log_snr(schedule, steps))) for steps in (120, 240)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("schedule", ["edm", "vp", "cosine"])
def test_langevin_steps_mend_the_variance_of_ancestral_sampling(schedule):
    schedule = CONTINUOUS[schedule]
    times = log_snr(schedule, 30)
    x = images(20, 1000) * schedule(times[0]).sigma
    ends = [
        final(predictor_corrector(gaussian(schedule), schedule, x, times, Drawn(), corrections=n))
        for n in (0, 1, 4)
    ]
    missed = [abs(end.std().item() - 0.5) for end in ends]
    assert missed[2] < missed[1] < missed[0]
    assert missed[2] < 0.03


@pytest.mark.parametrize(
    ("schedule", "grid"), [("edm", karras), ("vp", log_snr), ("cosine", log_snr)]
)
@pytest.mark.parametrize(
    ("solver", "steps"),
    [(partial(euler_ancestral, eta=0.0), 2000), (midpoint, 256), (dpmpp_2s, 256), (precise, 10)],
)
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


# What lies between two stops


def test_between_is_the_chains_nearest_step_or_the_end_of_the_step():
    schedule = discrete.linear()
    assert between(schedule, scalar(1000.0), scalar(998.0)).item() == 999
    assert between(schedule, scalar(1000.0), scalar(999.0)).item() == 999
    for t, s in ((600.0, 500.0), (50.0, 1.0)):
        at = [schedule(scalar(u)).half_log_snr.item() for u in (t, s)]
        found = between(schedule, scalar(t), scalar(s), 0.3)
        middle = at[0] + 0.3 * (at[1] - at[0])
        nearby = [schedule(found + d).half_log_snr.item() for d in (0.51, -0.51)]
        assert nearby[0] < middle < nearby[1]
        assert found.item() == round(found.item())


def test_between_is_nowhere_at_alpha_0_and_below_t_min():
    schedule = flow.flow(t_min=0.1)
    assert between(schedule, scalar(1.0), scalar(0.5)) is None
    assert between(schedule, scalar(0.5), scalar(0.05)) is None
    assert between(flow.flow(t_min=0.0), scalar(0.5), scalar(0.0)) is None
    assert between(schedule, scalar(0.8), scalar(0.2)).item() == about(0.5)


# Noise


@pytest.mark.parametrize(
    ("solver", "draws"),
    [
        (euler_ancestral, 19),
        (euler_maruyama, 19),
        (dpmpp_sde, 38),
        (predictor_corrector, 38),
        (partial(predictor_corrector, corrections=2), 57),
    ],
)
def test_no_noise_is_drawn_on_the_step_to_data(solver, draws):
    schedule, noise = discrete.linear(), Drawn()
    final(solver(gaussian(schedule), schedule, images(2, 2), trailing(schedule, 20), noise))
    assert noise.draws == draws


def test_an_image_without_noise_in_it_takes_no_endless_langevin_step():
    """The paper's step divides by ‖ε‖; it stops at σ², after which x is forgotten."""
    schedule, z = edm.edm(), images(2, 3)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(x_t, torch.zeros_like(x_t))

    times = torch.tensor([2.0, 1.0], dtype=torch.float64)
    x = next(predictor_corrector(denoise, schedule, torch.zeros(2, 3).double(), times, lambda _: z))
    torch.testing.assert_close(x, (0.75**0.5 + 2**0.5) * z, rtol=1e-9, atol=1e-9)


# The adaptive solver


@pytest.mark.parametrize("schedule", ["cosine", "edm", "flow"])
def test_a_tighter_tolerance_costs_more_and_errs_less(schedule):
    schedule = CONTINUOUS[schedule]
    times = trailing(schedule, 4)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None] * schedule(times[0]).sigma
    exact = gaussian_flow(schedule, x, times[0], times[-1])
    evaluations, errors = [], []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        denoise = Counted(gaussian(schedule))
        solver = partial(adaptive, rtol=tolerance, atol=tolerance)
        errors.append((final(solver(denoise, schedule, x, times, no_noise)) - exact).abs().max())
        evaluations.append(denoise.evaluations)
    assert evaluations[0] < evaluations[1] < evaluations[2] < evaluations[3] < 100
    assert all(error < 0.5 * t for error, t in zip(errors, (1e-2, 1e-3, 1e-4), strict=False))
    assert errors[3] < 2e-5  # what is left below t_min


def test_the_adaptive_solvers_grid_only_says_what_is_shown():
    schedule = CONTINUOUS["vp"]
    x = images(4, 3)
    ends, evaluations = [], []
    for steps in (1, 7, 100):
        denoise = Counted(two_points(schedule))
        ends.append(final(adaptive(denoise, schedule, x, trailing(schedule, steps), no_noise)))
        evaluations.append(denoise.evaluations)
    assert all(end.equal(ends[0]) for end in ends)
    assert max(evaluations) == min(evaluations) < 100


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_state_that_the_adaptive_solver_shows_is_on_the_ode(schedule):
    times = trailing(schedule, 9)
    x = images(4, 3) * schedule(times[0]).sigma
    walk = adaptive(gaussian(schedule), schedule, x, times, no_noise, rtol=1e-4, atol=1e-4)
    for state, s in zip(walk, times[1:], strict=True):
        exact = gaussian_flow(schedule, x, times[0], s)
        size = (schedule(s).alpha ** 2 + schedule(s).sigma ** 2).sqrt()
        # Straight to data from t_min, where the first step of a chain has much noise, errs by σ².
        rest = schedule(scalar(schedule.t_min)).sigma ** 2 * 2 if s == 0 else 0
        assert (state - exact).abs().max() < 2e-4 * size + rest * x.abs().max()


def test_an_adaptive_images_steps_do_not_depend_on_its_neighbours():
    schedule = CONTINUOUS["vp"]
    asked = []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        asked.append(t)
        return two_points(schedule)(x_t, t)

    x, times = images(4, 3), trailing(schedule, 3)
    together = final(adaptive(denoise, schedule, x, times, no_noise))
    assert any(t.ndim and t.unique().numel() > 1 for t in asked)
    for i in range(4):
        assert final(adaptive(denoise, schedule, x[i : i + 1], times, no_noise)).equal(
            together[i : i + 1]
        )


def test_the_adaptive_solver_refuses_to_go_on_for_ever():
    schedule = CONTINUOUS["vp"]
    wild = Counted(lambda x_t, t: Prediction(x_t * torch.nan, x_t))
    walk = adaptive(
        wild, schedule, images(2, 3), trailing(schedule, 3), no_noise, max_evaluations=50
    )
    with pytest.raises(ConfigError, match=r"not done after 49 evaluations; use a larger rtol"):
        list(walk)
    assert wild.evaluations == 49


# DDIM backwards


@pytest.mark.parametrize(
    "name", ["vp", "cosine", "flow", "linear_1000", "cosine_1000", "scaled_linear_zero_snr"]
)
def test_ddim_gives_an_inverted_image_back(name):
    schedule, x_0 = SCHEDULES[name], images(4, 3) / 2
    denoise, times = gaussian(schedule), trailing(schedule, 50)

    def missed(iterations: int) -> float:
        *_, x = inverted(denoise, schedule, x_0, times, iterations=iterations)
        return (final(ddim(denoise, schedule, x, times, no_noise)) - x_0).abs().max().item()

    assert missed(12) < 1e-12
    assert missed(3) < 1e-3 < missed(1) < 0.1


def test_inversion_works_on_the_karras_grid_where_steps_are_long():
    schedule, x_0 = edm.edm(), images(4, 3) / 2
    denoise, times = gaussian(schedule), karras(schedule, 40)
    *_, x = inverted(denoise, schedule, x_0, times, iterations=20)
    back = final(ddim(denoise, schedule, x, times, no_noise))
    torch.testing.assert_close(back, x_0, rtol=0, atol=1e-6)


def test_inversion_passes_through_the_states_of_ddim_in_reverse():
    schedule, x = CONTINUOUS["cosine"], images(3, 2)
    denoise, times = gaussian(schedule), trailing(schedule, 12)
    down = [x, *ddim(denoise, schedule, x, times, no_noise)]
    up = [down[-1], *inverted(denoise, schedule, down[-1], times, iterations=40)]
    torch.testing.assert_close(up, down[::-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vp", "cosine", "flow"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_inversion_follows_the_ode_to_first_order(name, iterations):
    schedule, x_0 = CONTINUOUS[name], images(4, 3) / 2
    exact = gaussian_flow(schedule, x_0, scalar(0.0), scalar(schedule.t_max))
    errors = []
    for steps in (160, 320):
        times = trailing(schedule, steps)
        *_, x = inverted(gaussian(schedule), schedule, x_0, times, iterations=iterations)
        errors.append((x - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)
