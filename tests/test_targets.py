"""What a network learns: targets, their inversion, the denoiser and the loss."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    CHAINS_OF_1000,
    CONTINUOUS,
    SCHEDULES,
    ZERO_SNR_1000,
    Says,
    SmallNetwork,
    about,
    images,
    scalar,
    several_times,
)

from rediffuse import targets
from rediffuse.denoiser import Denoiser
from rediffuse.errors import ConfigError
from rediffuse.losses import Noised, simple
from rediffuse.process import diffuse
from rediffuse.schedules import cosine, discrete, edm, flow, vp
from rediffuse.targets import check_target, combine, solve
from rediffuse.weightings import min_snr, unit

TARGETS = {
    "eps": targets.eps,
    "x_0": targets.x_0,
    "v": targets.v,
    "flow": targets.flow,
    "edm": targets.edm,
    "edm_of_unit_data": partial(targets.edm, sigma_data=1.0),
}
NO_IMAGE_LEFT = ZERO_SNR_1000 | {name: CONTINUOUS[name] for name in ("flow", "flow_shifted")}
law = settings(deadline=None, derandomize=True, database=None, max_examples=100)
close = {"rtol": 1e-9, "atol": 1e-9}
numbers = st.floats(-10, 10, width=32)


def simple_loss(denoiser, weighting, x_0, eps, t):
    x_t = diffuse(denoiser.schedule, x_0, eps, t)
    return simple(denoiser, weighting, Noised(x_0, eps, x_t, t))


def allowed(target: str, schedule: str) -> bool:
    return not (target == "eps" and schedule in NO_IMAGE_LEFT)


PAIRS = [(t, s) for t in TARGETS for s in SCHEDULES if allowed(t, s)]


@law
@given(pair=st.sampled_from(PAIRS), u=st.floats(0, 1), x_0=numbers, eps=numbers)
def test_solve_recovers_image_and_noise_from_what_a_perfect_network_says(pair, u, x_0, eps):
    target, schedule = TARGETS[pair[0]], SCHEDULES[pair[1]]
    at = schedule(schedule.snap(scalar(schedule.t_min + u * (schedule.t_max - schedule.t_min))))
    x_0, eps = scalar(x_0)[None], scalar(eps)[None]
    x_t = at.alpha * x_0 + at.sigma * eps
    a, b = target(at)
    found_x_0, found_eps = solve(combine(x_0, eps, a, b), x_t, at, a, b)
    torch.testing.assert_close(found_x_0, x_0, **close)
    torch.testing.assert_close(found_eps, eps, **close)


@pytest.mark.parametrize(("target", "schedule"), PAIRS)
def test_a_denoiser_with_a_perfect_network_returns_image_and_noise(target, schedule):
    target, schedule = TARGETS[target], SCHEDULES[schedule]
    t = schedule.snap(several_times(schedule, 40)[-40:])
    x_0, eps = images(len(t), 1, 2, 2, seed=1), images(len(t), 1, 2, 2, seed=2)
    x_t = diffuse(schedule, x_0, eps, t)
    perfect = Says(lambda *_: combine(x_0, eps, *target(schedule(t))))
    found = Denoiser(perfect, schedule, target)(x_t, t)
    torch.testing.assert_close(found.x_0, x_0, **close)
    torch.testing.assert_close(found.eps, eps, **close)
    assert found.variance is None


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
def test_targets_are_the_pairs_that_their_papers_define(schedule):
    x_0, eps = images(50, 1, seed=1), images(50, 1, seed=2)
    at = schedule(several_times(schedule, 50))
    alpha, sigma = at.alpha[:, None], at.sigma[:, None]
    for target, literal in (
        (targets.eps, eps),
        (targets.x_0, x_0),
        (targets.v, alpha * eps - sigma * x_0),
        (targets.flow, eps - x_0),
    ):
        assert combine(x_0, eps, *target(at)).equal(literal)


def test_the_flow_target_is_the_velocity_of_the_straight_path():
    t, step = scalar(0.4), 1e-6
    x_0, eps = images(1, 5, seed=1), images(1, 5, seed=2)
    moved = diffuse(flow.flow(), x_0, eps, t + step) - diffuse(flow.flow(), x_0, eps, t - step)
    velocity = combine(x_0, eps, *targets.flow(flow.flow()(t)))
    torch.testing.assert_close(moved / (2 * step), velocity, rtol=1e-8, atol=1e-8)


def test_v_is_the_velocity_of_the_quarter_circle():
    t, step = scalar(0.4), 1e-6
    x_0, eps = images(1, 5, seed=1), images(1, 5, seed=2)
    circle = cosine.cosine()
    moved = diffuse(circle, x_0, eps, t + step) - diffuse(circle, x_0, eps, t - step)
    velocity = combine(x_0, eps, *targets.v(circle(t)))
    torch.testing.assert_close(moved / (math.pi * step), velocity, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_edm_target_has_unit_variance_at_every_noise_level(sigma_data):
    for schedule in (edm.edm(), vp.vp(), flow.flow()):
        a, b = targets.edm(schedule(several_times(schedule)), sigma_data=sigma_data)
        torch.testing.assert_close(
            (a * sigma_data) ** 2 + b**2, torch.ones_like(a), rtol=1e-12, atol=0
        )


def test_the_edm_target_is_minus_v_for_unit_data_in_a_variance_preserving_process():
    at = vp.vp()(several_times(vp.vp()))
    for ours, v in zip(targets.edm(at, sigma_data=1.0), targets.v(at), strict=True):
        torch.testing.assert_close(ours, -v, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NO_IMAGE_LEFT)
def test_eps_is_refused_where_no_image_is_left(name):
    schedule = NO_IMAGE_LEFT[name]
    taught = (
        rf"'eps' cannot give x_0 at t = {schedule.t_max:g}.*α = 0 and σ = 1; use target=v, flow"
    )
    with pytest.raises(ConfigError, match=taught):
        check_target(targets.eps, schedule, "eps")
    with pytest.raises(ConfigError, match="cannot give x_0"):
        Denoiser(SmallNetwork(), schedule, targets.eps)


@pytest.mark.parametrize("name", CHAINS_OF_1000)
def test_x_0_and_eps_are_both_allowed_where_some_image_is_left(name):
    check_target(targets.eps, CHAINS_OF_1000[name])
    check_target(targets.x_0, CHAINS_OF_1000[name])


def karras_table_1(sigma: float, sigma_data: float = 0.5) -> tuple[float, float, float, float]:
    """c_skip, c_out, c_in and c_noise (Karras et al. 2022, Table 1)."""
    total = sigma**2 + sigma_data**2
    return (
        sigma_data**2 / total,
        sigma * sigma_data / math.sqrt(total),
        1 / math.sqrt(total),
        math.log(sigma) / 4,
    )


@pytest.mark.parametrize(
    ("sigma", "published"),
    [
        (1.0, (0.2, 0.4472135954999579, 0.8944271909999159, 0.0)),
        (80.0, (3.906097418069607e-5, None, None, 1.0955066586684703)),
        (0.002, (None,) * 4),
    ],
)
def test_an_edm_denoiser_has_the_preconditioning_of_karras_et_al(sigma, published):
    heard = {}

    def network(x, label, cond):
        heard["x"], heard["label"] = x, label
        return heard["answer"] * torch.ones_like(x)

    denoiser = Denoiser(Says(network), edm.edm(), targets.edm, sigma_data=0.5)
    one, t = torch.ones(1, 1, dtype=torch.float64), scalar(sigma)
    heard["answer"] = 0.0
    c_skip = denoiser(one, t).x_0.item()
    c_in, c_noise = heard["x"].item(), heard["label"].item()
    heard["answer"] = 1.0
    c_out = denoiser(0 * one, t).x_0.item()

    found = (c_skip, c_out, c_in, c_noise)
    accuracies = (1e-9, 1e-9, 1e-9, 1e-6)  # a label is float32
    for one, literal, table, rel in zip(
        found, karras_table_1(sigma), published, accuracies, strict=True
    ):
        assert one == about(literal, rel=rel)
        assert table is None or one == about(table, rel=rel)


def test_a_network_hears_its_label_once_per_image_and_what_it_is_told():
    def network(x, label, cond):
        assert label.dtype == torch.float32
        return (label + cond).reshape(-1, 1).expand(x.shape).to(x)

    denoiser = Denoiser(Says(network), discrete.linear(), targets.x_0)
    x_t, cond = images(3, 2), torch.tensor([1, 2, 3])
    assert denoiser(x_t, scalar(10.0), cond).x_0[:, 0].tolist() == [11, 12, 13]
    each = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    assert denoiser(x_t, each, cond).x_0[:, 0].tolist() == [11, 22, 33]


def test_twice_the_channels_are_a_prediction_and_a_variance_fraction():
    def network(x, label, cond):
        return torch.cat((2 * x, torch.full_like(x, -0.5)), dim=1)

    x_t = images(2, 3, 4, 4)
    found = Denoiser(Says(network), discrete.linear(), targets.x_0)(x_t, scalar(10.0))
    assert found.x_0.equal(2 * x_t)
    assert (found.variance == 0.25).all()


@pytest.mark.parametrize(("target", "schedule"), PAIRS)
def test_whatever_the_network_says_alpha_x_0_plus_sigma_eps_is_x_t(target, schedule):
    target, schedule = TARGETS[target], SCHEDULES[schedule]
    t = several_times(schedule)[::9]
    at = schedule(t)
    x_t = images(len(t), 1, 2, 2)
    found = Denoiser(SmallNetwork(channels=1), schedule, target)(x_t, t)
    again = at.alpha.reshape(-1, 1, 1, 1) * found.x_0 + at.sigma.reshape(-1, 1, 1, 1) * found.eps
    torch.testing.assert_close(again, x_t, **close)


@pytest.mark.parametrize(("target", "schedule"), PAIRS)
@pytest.mark.parametrize("weighting", [unit, min_snr])
def test_the_loss_of_a_perfect_network_is_0_for_every_target(target, schedule, weighting):
    target, schedule = TARGETS[target], SCHEDULES[schedule]
    t = schedule.snap(several_times(schedule, 40)[-40:])
    x_0, eps = images(len(t), 1, 2, 2, seed=1), images(len(t), 1, 2, 2, seed=2)
    perfect = Says(lambda *_: combine(x_0, eps, *target(schedule(t))))
    loss = simple_loss(Denoiser(perfect, schedule, target), weighting, x_0, eps, t)
    assert loss.equal(torch.zeros(len(t), dtype=torch.float64))


def test_the_simple_loss_of_eps_is_ho_et_al_equation_14():
    network, schedule = SmallNetwork(), discrete.linear()
    x_0, eps = images(5, 3, 8, 8, seed=1), images(5, 3, 8, 8, seed=2)
    t = torch.tensor([1.0, 10.0, 250.0, 500.0, 1000.0], dtype=torch.float64)

    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    at = alpha_bar[t.long() - 1].reshape(-1, 1, 1, 1)
    error = eps - network(at.sqrt() * x_0 + (1 - at).sqrt() * eps, t)
    literal = (error**2).mean(dim=(1, 2, 3))

    found = simple_loss(Denoiser(network, schedule, targets.eps), unit, x_0, eps, t)
    torch.testing.assert_close(found, literal, rtol=1e-9, atol=0)


def test_the_loss_of_edm_is_lambda_times_the_squared_error_of_the_denoised_image():
    network, sigma_data = SmallNetwork(), 0.5
    y, n = images(6, 3, 8, 8, seed=1), images(6, 3, 8, 8, seed=2)
    sigma = torch.tensor([0.002, 0.05, 0.5, 1.0, 5.0, 80.0], dtype=torch.float64)
    denoiser = Denoiser(
        network, edm.edm(), partial(targets.edm, sigma_data=sigma_data), sigma_data=sigma_data
    )

    each = sigma.reshape(-1, 1, 1, 1)
    table = torch.tensor([karras_table_1(s) for s in sigma.tolist()], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = table.T[..., None, None, None]
    d = c_skip * (y + each * n) + c_out * network(c_in * (y + each * n), c_noise.float())
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    literal = weight * ((d - y) ** 2).mean(dim=(1, 2, 3))

    found = simple_loss(denoiser, unit, y, n, sigma)
    torch.testing.assert_close(found, literal, rtol=1e-9, atol=0)


def test_a_weighting_multiplies_the_loss_of_its_image():
    schedule = discrete.linear()
    x_0, eps = images(3, 3, 8, 8, seed=1), images(3, 3, 8, 8, seed=2)
    t = torch.tensor([11.0, 501.0, 900.0], dtype=torch.float64)
    denoiser = Denoiser(SmallNetwork(), schedule, targets.v)
    plain = simple_loss(denoiser, unit, x_0, eps, t)
    weighted = simple_loss(denoiser, min_snr, x_0, eps, t)
    weight = min_snr(schedule, t, targets.v)
    torch.testing.assert_close(weighted, plain * weight, rtol=1e-12, atol=0)


def test_a_denoiser_answers_in_the_precision_of_the_image():
    x_t = images(2, 3, 4, 4).float()
    found = Denoiser(SmallNetwork().float(), discrete.linear(), targets.eps)(x_t, scalar(3.0))
    assert found.x_0.dtype == found.eps.dtype == torch.float32
