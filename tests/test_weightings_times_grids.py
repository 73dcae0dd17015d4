"""How training weighs and draws t, and where a solver stops."""

import math
from fractions import Fraction

import pytest
import torch
from oracles import (
    CHAINS,
    CHAINS_OF_1000,
    CONTINUOUS,
    SCHEDULES,
    ZERO_SNR_1000,
    about,
    scalar,
    several_times,
)
from torch import Tensor

from rediffuse import targets
from rediffuse.errors import ConfigError
from rediffuse.grids import karras, log_snr, trailing
from rediffuse.schedules import discrete, edm, flow
from rediffuse.times import log_normal, logit_normal, uniform, uniform_steps
from rediffuse.weightings import min_snr, unit

GRIDS = {"trailing": trailing, "karras": karras, "log_snr": log_snr}
STEPS = (1, 2, 7, 13, 50, 300, 600, 999, 1000)
evenly = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


# Weightings


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_min_snr_of_x_0_is_the_clipped_snr_and_of_eps_that_over_snr(schedule):
    at = schedule(several_times(schedule)[:-1])
    snr = (at.alpha / at.sigma) ** 2
    clipped = snr.clamp(max=5)
    torch.testing.assert_close(min_snr(at, targets.x_0), clipped, rtol=1e-9, atol=0)
    torch.testing.assert_close(min_snr(at, targets.eps), clipped / snr, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", CHAINS_OF_1000.values(), ids=CHAINS_OF_1000)
def test_min_snr_of_v_is_the_clipped_snr_over_snr_plus_one_where_variance_is_preserved(schedule):
    at = schedule(several_times(schedule))
    snr = (at.alpha / at.sigma) ** 2
    literal = snr.clamp(max=5) / (snr + 1)
    torch.testing.assert_close(min_snr(at, targets.v), literal, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("t", "eps", "v", "x_0"),
    [(11.0, 0.0109917, 0.0109676, 5.0), (501.0, 1.0, 0.0777966, 0.0843595)],
)
def test_the_published_min_snr_weights_of_linear(t, eps, v, x_0):
    at = discrete.linear()(scalar(t))
    found = [min_snr(at, target).item() for target in (targets.eps, targets.v, targets.x_0)]
    # Published from float32 tables, where 1 - ᾱ near data has lost its last digits.
    assert found == about([eps, v, x_0], rel=5e-5)


def test_min_snr_of_linear_is_that_of_exact_fractions():
    alpha_bar = Fraction(1)
    for i in range(11):
        alpha_bar *= 1 - Fraction(1, 10_000) - Fraction(199, 10_000) * Fraction(i, 999)
    snr = alpha_bar / (1 - alpha_bar)
    at = discrete.linear()(scalar(11.0))
    assert min_snr(at, targets.eps).item() == about(float(5 / snr))
    assert min_snr(at, targets.v).item() == about(float(5 / (snr + 1)))


@pytest.mark.parametrize("schedule", ZERO_SNR_1000.values(), ids=ZERO_SNR_1000)
def test_min_snr_is_finite_where_no_image_is_left(schedule):
    at = schedule(several_times(schedule))
    assert min_snr(at, targets.v).isfinite().all()
    assert min_snr(at, targets.v)[-1] == 0


def test_unit_weighs_every_image_alike():
    at = edm.edm()(several_times(edm.edm()))
    assert unit(at, targets.edm).equal(torch.ones_like(at.sigma))


# Times


@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_uniform_steps_draws_every_step_equally_often(steps):
    drawn = uniform_steps(discrete.linear(steps=steps), evenly)
    assert drawn.dtype == torch.float64
    assert (
        torch.bincount(drawn.long(), minlength=steps + 1).tolist()
        == [0] + [100_000 // steps] * steps
    )


def test_the_first_step_begins_at_0_and_the_last_ends_below_1():
    u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert uniform_steps(discrete.linear(), u).tolist() == [1, 501, 1000]


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
def test_uniform_draws_every_time_of_a_continuous_clock_equally_often(schedule):
    drawn = uniform(schedule, evenly)
    even = schedule.t_min + evenly * (schedule.t_max - schedule.t_min)
    torch.testing.assert_close(drawn, even, rtol=1e-12, atol=0)


def test_log_normal_draws_the_noise_levels_of_edm():
    sigma = log_normal(edm.edm(), evenly)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=1e-9)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=1e-3)
    at_one_std = torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64)  # Φ(0), Φ(1)
    assert log_normal(edm.edm(), at_one_std).log().tolist() == pytest.approx([-1.2, 0], abs=1e-9)


def test_logit_normal_draws_the_middle_of_the_path_more_often():
    t = logit_normal(flow.flow(), evenly, mean=0.0, std=1.0)
    assert torch.logit(t)[1000:-1000].mean().item() == pytest.approx(0, abs=1e-9)
    inside = ((t > torch.sigmoid(scalar(-1.0))) & (t < torch.sigmoid(scalar(1.0)))).double().mean()
    assert inside.item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-4)
    shifted = logit_normal(flow.flow(), scalar(0.5)[None], mean=0.7, std=3.0)
    assert torch.logit(shifted).item() == about(0.7)


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
def test_uniform_steps_is_refused_on_a_clock_without_steps(schedule):
    with pytest.raises(ConfigError, match=r"whole steps.*use times=uniform"):
        uniform_steps(schedule, evenly)


@pytest.mark.parametrize("draw", [uniform, log_normal, logit_normal])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_drawn_time_is_finite_and_known_to_the_network(draw, schedule):
    u = torch.cat((torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), evenly[::97]))
    t = draw(schedule, u)
    assert t.isfinite().all()
    assert (t > 0).all()
    assert schedule.snap(t).equal(t)
    at = schedule(t)
    assert (at.sigma > 0).all()
    assert at.alpha.isfinite().all()


# Grids


def legal(grid: str, schedule: str) -> bool:
    return grid == "trailing" or not (schedule in ZERO_SNR_1000 or "flow" in schedule)


def is_lawful(times: Tensor, schedule, steps: int) -> bool:
    return (
        times.dtype == torch.float64
        and times.shape == (steps + 1,)
        and times[0] == schedule.t_max
        and times[-1] == 0
        and bool((times.diff() < 0).all())
        and bool((times[:-1] >= schedule.t_min).all())
        and schedule.snap(times[:-1]).equal(times[:-1])
    )


@pytest.mark.parametrize(
    ("grid", "schedule"), [(g, s) for g in GRIDS for s in SCHEDULES if legal(g, s)]
)
def test_a_grid_falls_from_t_max_to_data_through_times_that_the_network_knows(grid, schedule):
    for steps in STEPS:
        assert is_lawful(GRIDS[grid](SCHEDULES[schedule], steps), SCHEDULES[schedule], steps), steps


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_can_be_walked_in_any_number_of_steps_up_to_its_own(name, grid):
    chain = CHAINS[name](steps=50)
    for steps in range(1, 51):
        assert is_lawful(GRIDS[grid](chain, steps), chain, steps), steps
    assert GRIDS[grid](chain, 50).equal(torch.arange(50, -1, -1, dtype=torch.float64))
    with pytest.raises(ConfigError, match="51 sampling steps on a schedule of 50; use fewer"):
        GRIDS[grid](chain, 51)


@pytest.mark.parametrize("schedule", [n for n in SCHEDULES if not legal("karras", n)])
@pytest.mark.parametrize("grid", ["karras", "log_snr"])
def test_a_grid_in_log_snr_is_refused_where_no_image_is_left(grid, schedule):
    with pytest.raises(ConfigError, match=rf"grid '{grid}'.*infinite at t = .*use grid=trailing"):
        GRIDS[grid](SCHEDULES[schedule], 10)


@pytest.mark.parametrize("ends", [(0.002, 80.0), (0.01, 50.0), (0.003, 80.0), (0.03, 14.6)])
@pytest.mark.parametrize("grid", ["karras", "log_snr"])
def test_the_last_stop_before_data_is_t_min_itself(grid, ends):
    """Heun's second evaluation hangs on `s >= t_min`, so a last digit below would cost one."""
    schedule = edm.edm(sigma_min=ends[0], sigma_max=ends[1])
    for steps in range(2, 60):
        times = GRIDS[grid](schedule, steps)
        assert (times[0].item(), times[-2].item()) == (ends[1], ends[0])


def test_the_trailing_grid_of_ten_steps():
    assert trailing(discrete.linear(), 10).tolist() == list(range(1000, -1, -100))
    assert trailing(flow.flow(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_the_published_karras_grid():
    expected = [
        80, 42.4151893185, 21.1086767362, 9.72320135526, 4.06612360295, 1.50174197907,
        0.469979057998, 0.116638563525, 0.0204353345534, 0.002, 0,
    ]  # fmt: skip
    assert karras(edm.edm(), 10).tolist() == about(expected)


def test_karras_spaces_the_noise_to_image_ratio_of_any_process_by_its_seventh_root():
    schedule = CONTINUOUS["vp"]
    ratio = (-schedule(karras(schedule, 20)[:-1]).half_log_snr).exp()
    spacing = (ratio ** (1 / 7)).diff()
    torch.testing.assert_close(spacing, spacing.mean().expand(19), rtol=1e-9, atol=0)


def test_log_snr_is_even_in_nats():
    for schedule in (CONTINUOUS["vp"], CONTINUOUS["cosine"], CONTINUOUS["edm"]):
        spacing = schedule(log_snr(schedule, 20)[:-1]).half_log_snr.diff()
        torch.testing.assert_close(spacing, spacing.mean().expand(19), rtol=1e-9, atol=0)


@pytest.mark.parametrize("grid", ["karras", "log_snr"])
def test_stops_on_a_chain_are_the_nearest_whole_steps_and_shift_only_where_these_coincide(grid):
    chain = discrete.cosine()
    first, last = chain(torch.tensor([1000.0, 1.0], dtype=torch.float64)).half_log_snr.tolist()
    for steps in (5, 10, 20, 200):
        wish = torch.linspace(first, last, steps, dtype=torch.float64)
        if grid == "karras":
            root = torch.linspace(
                math.exp(-first / 7), math.exp(-last / 7), steps, dtype=torch.float64
            )
            wish = -7 * root.log()
        nearest = chain.time(wish).round()
        found = GRIDS[grid](chain, steps)[:-1]
        assert found.equal(nearest) == (len(nearest.unique()) == steps)
        alone = (nearest[1:-1] < nearest[:-2] - steps) & (nearest[1:-1] > nearest[2:] + steps)
        assert found[1:-1][alone].equal(nearest[1:-1][alone])
