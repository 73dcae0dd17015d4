"""Multistep solvers: exact cases, what they integrate exactly, orders, noise, and contracts."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from oracles import (
    CONTINUOUS,
    SCHEDULES,
    Counted,
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

from rediffuse.grids import karras, log_snr, trailing
from rediffuse.process import Prediction
from rediffuse.schedules import discrete, edm
from rediffuse.solvers.deis import deis
from rediffuse.solvers.dpmpp_2m import dpmpp_2m
from rediffuse.solvers.dpmpp_2m_sde import dpmpp_2m_sde
from rediffuse.solvers.dpmpp_3m import dpmpp_3m
from rediffuse.solvers.lms import lms
from rediffuse.solvers.pndm import pndm
from rediffuse.solvers.unipc import unipc

pytestmark = pytest.mark.usefixtures("unchecked")  # test_solver_contract.py checks shapes

plms = partial(pndm, runge_kutta=False)
dpmpp_3m_exact = partial(dpmpp_3m, exact=True)
DETERMINISTIC = {
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_exact": dpmpp_3m_exact,
    "dpmpp_2m_sde_eta_0": partial(dpmpp_2m_sde, eta=0.0),
    "pndm": pndm,
    "plms": plms,
    **{f"deis_{order}": partial(deis, order=order) for order in (1, 3, 4)},
    **{f"lms_{order}": partial(lms, order=order) for order in (1, 4)},
    **{f"unipc_{order}_bh1": partial(unipc, order=order, bh=1) for order in (1, 2, 3)},
    **{f"unipc_{order}_bh2": partial(unipc, order=order, bh=2) for order in (1, 2, 3)},
}
HIGH_ORDER = {k: v for k, v in DETERMINISTIC.items() if k not in ("lms_1", "deis_1")}
STOCHASTIC = {
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_eta_1": partial(dpmpp_3m, eta=1.0),
    "dpmpp_3m_exact_eta_1": partial(dpmpp_3m_exact, eta=1.0),
}
SOLVERS = DETERMINISTIC | STOCHASTIC


def keyed(like: Tensor) -> Tensor:
    """Some noise that depends on the image alone, whatever its batch is."""
    return like.roll(1, dims=-1).sin() * 1.4


# Exact cases


@pytest.mark.parametrize(
    ("solver", "of_10", "of_40"),
    [
        (lms, 0.413260222600, 0.498037158053),
        (dpmpp_3m, 0.650858263036, 0.500589854139),
        (partial(dpmpp_2m_sde, eta=0.0), 0.579386657643, 0.505192424886),
        # of first order all are Euler
        (partial(lms, order=1), 0.365213065063, 0.464850774486),
        (partial(deis, order=1), 0.365213065063, 0.464850774486),
    ],
)
def test_the_published_ends_of_a_gaussian_on_the_karras_grid(solver, of_10, of_40):
    schedule, x = edm.edm(), torch.full((1, 1), 80.0, dtype=torch.float64)
    for steps, end in ((10, of_10), (40, of_40)):
        times = karras(schedule, steps)
        found = final(solver(gaussian(schedule), schedule, x, times, no_noise)).item()
        assert found == about(end)


def test_the_published_end_of_unipc_on_the_linear_chain():
    """Published for eleven even stops on 0 .. 999, the last of which is replaced by data."""
    schedule, x = discrete.linear(), torch.ones(1, 1, dtype=torch.float64)
    times = torch.linspace(999, 0, 11, dtype=torch.float64).round() + 1
    times[-1] = 0
    found = final(unipc(gaussian(schedule), schedule, x, times, no_noise, order=2)).item()
    assert found == about(0.40817034, rel=2e-6)  # from float32 tables


# What they integrate exactly


def integral(power: int, y: Tensor) -> Tensor:
    """∫ y^k·e^y dy, by parts."""
    terms = ((-1) ** j * math.perm(power, j) * y ** (power - j) for j in range(power + 1))
    return y.exp() * sum(terms)


@pytest.mark.parametrize("grid", [karras, log_snr])
@pytest.mark.parametrize("schedule", ["vp", "edm"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("solver", [lms, deis])
def test_order_p_integrates_a_noise_that_is_a_polynomial_of_degree_below_p(
    solver, order, schedule, grid
):
    schedule = CONTINUOUS[schedule]
    times, log = grid(schedule, 30), solver is deis
    for power in range(order):

        def denoise(x_t: Tensor, t: Tensor, power: int = power) -> Prediction:
            at = schedule(t)
            eps = (-at.half_log_snr if log else at.sigma / at.alpha) ** power * torch.ones_like(x_t)
            return Prediction((x_t - at.sigma * eps) / at.alpha, eps)

        states = solver(denoise, schedule, images(1, 1), times, no_noise, order=order)
        walked = [
            (x / at.alpha, at.sigma / at.alpha)
            for x, at in zip(states, (schedule(t) for t in times[1:-1]), strict=False)
        ]
        for (x_t, ratio), (x_s, smaller) in pairwise(walked[order:]):
            exact = (smaller ** (power + 1) - ratio ** (power + 1)) / (power + 1)
            if log:
                exact = integral(power, smaller.log()) - integral(power, ratio.log())
            # What the first steps, of lower order, missed stays in x/α, and rounds the difference.
            assert (x_s - x_t - exact).abs() < 1e-12 * max(x_s.abs(), 1)


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["vp", "cosine"])
@pytest.mark.parametrize("solver", [dpmpp_3m_exact, partial(unipc, bh=1), partial(unipc, bh=2)])
def test_third_order_integrates_an_image_that_is_a_quadratic_in_log_snr(solver, schedule, power):
    schedule = CONTINUOUS[schedule]
    times = karras(schedule, 30)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(schedule(t).half_log_snr ** power * torch.ones_like(x_t), x_t)

    *states, _ = solver(denoise, schedule, images(1, 1), times, no_noise)
    scales = [schedule(t) for t in times[1:-1]]
    walked = [(x / at.sigma, at.half_log_snr) for x, at in zip(states, scales, strict=True)]
    for (x_t, now), (x_s, then) in pairwise(walked[3:-1]):  # UniPC's last two are of lower order
        exact = integral(power, then) - integral(power, now)
        assert (x_s - x_t - exact).abs() < 1e-12 * max(x_s.abs(), 1)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_dpmpp_3m_is_newton_interpolation_with_half_of_the_last_term(eta):
    schedule, z = CONTINUOUS["vp"], 0.3
    denoise, t = two_points(schedule), log_snr(CONTINUOUS["vp"], 12)
    alpha, sigma = schedule(t)
    lamda = (alpha / sigma).log()
    x = literal = images(3, 2)
    d = []
    walk = dpmpp_3m(denoise, schedule, x, t, lambda x: torch.full_like(x, z), eta=eta)
    for i, found in enumerate(walk, start=1):
        d.append(denoise(literal, t[i - 1]).x_0)
        h = lamda[i] - lamda[i - 1]
        h_eta = (1 + eta) * h
        phi_2 = (1 - h_eta - (-h_eta).exp()) / -h_eta if i < 12 else None
        literal = sigma[i] / sigma[i - 1] * (-eta * h).exp() * literal
        literal = literal + alpha[i] * (1 - (-h_eta).exp()) * d[-1]
        if i == 12:
            literal = d[-1]
        elif i == 2:
            literal = literal + alpha[i] * phi_2 * h * (d[1] - d[0]) / (lamda[1] - lamda[0])
        elif i > 2:
            first = (d[-1] - d[-2]) / (lamda[i - 1] - lamda[i - 2])
            second = (d[-2] - d[-3]) / (lamda[i - 2] - lamda[i - 3])
            curvature = (first - second) / (lamda[i - 1] - lamda[i - 3])
            slope = first + curvature * (lamda[i - 1] - lamda[i - 2])
            phi_3 = phi_2 / h_eta - 0.5
            literal = literal + alpha[i] * (phi_2 * h * slope - phi_3 * h**2 * curvature)
        if i < 12:
            literal = literal + sigma[i] * (1 - (-2 * eta * h).exp()).sqrt() * z
        torch.testing.assert_close(found, literal, rtol=1e-9, atol=1e-9)


# Orders of convergence


@pytest.mark.parametrize(("schedule", "grid"), [("edm", karras), ("vp", karras)])
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (dpmpp_3m, 2),  # the halved term is of third order in one step, of second in all
        (dpmpp_3m_exact, 3),
        (partial(dpmpp_2m_sde, eta=0.0), 2),
        (pndm, 2),  # Liu et al. 2022: the transfer along DDIM's step is of second order
        (plms, 2),
        *((partial(deis, order=order), order) for order in (1, 2, 3)),
        *((partial(lms, order=order), order) for order in (1, 2, 3, 4)),
        # UniPC-p is of order p + 1 (Zhao et al. 2023): the corrector adds one
        *((partial(unipc, order=order, bh=bh), order + 1) for order in (1, 2, 3) for bh in (1, 2)),
    ],
)
def test_order_of_convergence_on_an_exact_gaussian(solver, order, schedule, grid):
    assert measured_order(solver, CONTINUOUS[schedule], grid) == pytest.approx(order, abs=0.15)


def test_pndm_is_of_fourth_order_where_the_grid_is_even_in_the_noise_ratio():
    schedule = edm.edm(sigma_min=0.02, sigma_max=2.0)
    assert measured_order(pndm, schedule, trailing) == pytest.approx(4, abs=0.15)


def measured_order(solver, schedule, grid) -> float:
    """From errors two stops before data: UniPC's order falls over the last two steps."""
    x = schedule(scalar(schedule.t_max)).sigma.reshape(1, 1)
    errors = []
    for steps in (160, 320):
        times = grid(schedule, steps)
        *_, state, _, _ = solver(gaussian(schedule), schedule, x, times, no_noise)
        exact = gaussian_flow(schedule, x, times[0], times[-3])
        errors.append((state - exact).abs().item())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("schedule", "grid"), [("edm", karras), ("cosine", log_snr)])
@pytest.mark.parametrize("solver", HIGH_ORDER.values(), ids=HIGH_ORDER)
def test_the_ode_keeps_the_quantile_of_every_image_of_a_two_point_distribution(
    solver, schedule, grid
):
    schedule = CONTINUOUS[schedule]
    times = grid(schedule, 256)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64)[:, None] * schedule(times[0]).sigma
    before = two_points_quantile(schedule, x, times[0])
    *states, data = solver(two_points(schedule), schedule, x, times, no_noise)
    for state, t in zip(states[-3:], times[-4:-1], strict=True):
        assert (two_points_quantile(schedule, state, t) - before).abs().max() < 1e-3
    torch.testing.assert_close(data, x.sign(), rtol=0, atol=1e-3)


# Noise


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_dpmpp_2m_sde_with_eta_0_is_dpmpp_2m(schedule):
    times = trailing(schedule, 20)
    x = images(3, 2) * schedule(times[0]).sigma
    still = partial(dpmpp_2m_sde, eta=0.0)
    walks = (s(two_points(schedule), schedule, x, times, no_noise) for s in (still, dpmpp_2m))
    for one, other in zip(*walks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("solver", [dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_exact])
@pytest.mark.parametrize("schedule", ["vp", "edm"])
def test_the_sde_of_any_eta_keeps_the_variance_of_the_data(solver, schedule, eta):
    """Every step is linear in x and in its noise: the squared gains of all sum to the variance."""
    schedule, noise, steps = CONTINUOUS[schedule], Impulses(), 300
    x = torch.zeros(steps, 1, dtype=torch.float64)
    x[0] = schedule(scalar(schedule.t_max)).sigma
    times = log_snr(schedule, steps)
    gains = final(solver(gaussian(schedule), schedule, x, times, noise, eta=eta))
    assert noise.draws == steps - 1  # none on the way to data
    assert gains.square().sum().item() == pytest.approx(0.25, rel=2e-3)


@pytest.mark.parametrize("solver", [dpmpp_2m_sde, dpmpp_3m])
def test_noise_scale_multiplies_the_noise(solver):
    schedule = discrete.linear()
    times, x = trailing(schedule, 20)[:2], images(3, 2)
    sde = partial(solver, gaussian(schedule), schedule, x, times, torch.ones_like, eta=1.0)
    ends = [final(sde(noise_scale=scale)) for scale in (0.0, 1.0, 1.5)]
    assert (ends[1] - ends[0]).min() > 0.1
    torch.testing.assert_close(ends[2] - ends[0], 1.5 * (ends[1] - ends[0]))


# What a caller may rely on


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_one_evaluation_a_step_but_for_pndms_start(solver):
    schedule = edm.edm()
    more = {pndm: 9, plms: 1}.get(solver, 0)
    denoise = Counted(gaussian(schedule))
    assert len(list(solver(denoise, schedule, images(2, 2), karras(schedule, 18), keyed))) == 18
    assert denoise.evaluations == 18 + more


@pytest.mark.parametrize(
    ("solver", "schedule", "steps", "evaluations"),
    [
        (pndm, "flow", 18, 18 + 2 * 3),
        (plms, "flow", 18, 18),
        (pndm, "vp", 2, 4 + 1),
        (plms, "vp", 2, 2 + 1),
        (pndm, "vp", 1, 1),
        (plms, "vp", 1, 1),
    ],
)
def test_pndm_looks_ahead_neither_from_pure_noise_nor_below_t_min(
    solver, schedule, steps, evaluations
):
    schedule = CONTINUOUS[schedule]
    denoise = Counted(gaussian(schedule))
    final(solver(denoise, schedule, images(2, 2), trailing(schedule, steps), no_noise))
    assert denoise.evaluations == evaluations


def test_pndm_asks_only_about_steps_of_the_chain():
    schedule, asked = discrete.linear(steps=100), []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        asked.append(t)
        return gaussian(schedule)(x_t, t)

    final(pndm(denoise, schedule, images(2, 2), trailing(schedule, 20), no_noise))
    assert all(schedule.snap(t) == t for t in asked)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_state_is_finite_in_either_precision_also_where_alpha_or_sigma_is_0(solver, schedule):
    noise = no_noise if solver in DETERMINISTIC.values() else keyed
    for dtype in (torch.float32, torch.float64):
        x = (images(3, 2) * schedule(scalar(schedule.t_max)).sigma).to(dtype)
        for steps in (1, 2, 10):
            times = trailing(schedule, steps)
            states = list(solver(gaussian(schedule), schedule, x, times, noise))
            assert len(states) == steps
            assert all(state.isfinite().all() and state.dtype == dtype for state in states)


@pytest.mark.parametrize("solver", DETERMINISTIC.values(), ids=DETERMINISTIC)
@pytest.mark.parametrize("schedule", ["flow", "linear_zero_snr"])
def test_a_start_from_pure_noise_costs_no_accuracy(solver, schedule):
    schedule = SCHEDULES[schedule]
    times, x = trailing(schedule, 100), torch.ones(1, 1, dtype=torch.float64)
    exact = gaussian_flow(schedule, x, times[0], times[-1])
    found = final(solver(gaussian(schedule), schedule, x, times, no_noise))
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_an_image_does_not_depend_on_its_batch(solver):
    schedule, x = discrete.linear(), images(5, 3).float()
    times = trailing(schedule, 12)

    def walk(start: Tensor) -> Tensor:
        return final(solver(two_points(schedule), schedule, start, times, keyed))

    assert walk(x).equal(torch.cat((walk(x[:2]), walk(x[2:]))))
