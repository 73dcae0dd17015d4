"""How training weighs and draws t, and where a solver stops."""

import math
from collections import deque
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules
from oracles import (
    CHAINS,
    CHAINS_OF_1000,
    CONTINUOUS,
    SCHEDULES,
    ZERO_SNR_1000,
    about,
    images,
    scalar,
    several_times,
)
from torch import Tensor

from rediffuse import grids, targets, weightings
from rediffuse.errors import ConfigError
from rediffuse.grids import karras, log_snr, stops, trailing
from rediffuse.schedules import cosine, discrete, edm, flow, learned, vp
from rediffuse.times import (
    LossAware,
    log_normal,
    logit_normal,
    loss_aware,
    uniform,
    uniform_steps,
)
from rediffuse.weightings import min_snr, p2, unit, vlb

GRIDS = {
    "trailing": trailing,
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "karras": karras,
    "log_snr": log_snr,
    "stops": stops,
}
MOVING = CONTINUOUS | {
    "cosine_shifted": cosine.cosine(shift=3.0),
    "learned": learned.learned().requires_grad_(False),
}
STEPS = (1, 2, 7, 13, 50, 300, 600, 999, 1000)
evenly = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


# Weightings


def on_x_0(weighting, schedule, t: Tensor) -> Tensor:
    """The weight that a target of x_0 gets, whose error is that of x_0."""
    return weighting(schedule, t, targets.x_0)


def snr_of(schedule, t: Tensor) -> Tensor:
    at = schedule(t)
    return ((at.alpha / at.sigma) ** 2).detach()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_weights_on_x_0_are_those_of_the_papers(schedule):
    t = several_times(schedule)
    snr = snr_of(schedule, t)
    for weighting, literal in (
        (weightings.snr, snr),
        (weightings.truncated_snr, torch.maximum(snr, torch.ones_like(snr))),
        (weightings.min_snr, torch.minimum(snr, 5 * torch.ones_like(snr))),
        (weightings.soft_min_snr, 1 / (1 / snr + 1 / 4)),
        (weightings.edm, (1 / snr + 0.25) / (1 / snr * 0.25)),
    ):
        # At SNR = 0 the literal λ(σ) is ∞/∞; its limit is 1/σ_data².
        literal = literal.nan_to_num(nan=4.0)
        torch.testing.assert_close(on_x_0(weighting, schedule, t), literal, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_p2_and_snr_are_on_the_error_of_eps(schedule):
    t = several_times(schedule)[:-1]
    snr = snr_of(schedule, t)
    found = p2(schedule, t, targets.eps, k=0.7, gamma=0.5)
    torch.testing.assert_close(found, (0.7 + snr) ** -0.5, rtol=1e-9, atol=0)
    ones = weightings.snr(schedule, t, targets.eps)
    torch.testing.assert_close(ones, torch.ones_like(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_min_snr_of_x_0_is_the_clipped_snr_and_of_eps_that_over_snr(schedule):
    t = several_times(schedule)[:-1]
    snr = snr_of(schedule, t)
    clipped = snr.clamp(max=5)
    torch.testing.assert_close(min_snr(schedule, t, targets.x_0), clipped, rtol=1e-9, atol=0)
    torch.testing.assert_close(min_snr(schedule, t, targets.eps), clipped / snr, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", CHAINS_OF_1000.values(), ids=CHAINS_OF_1000)
def test_min_snr_of_v_is_the_clipped_snr_over_snr_plus_one_where_variance_is_preserved(schedule):
    t = several_times(schedule)
    snr = snr_of(schedule, t)
    literal = snr.clamp(max=5) / (snr + 1)
    torch.testing.assert_close(min_snr(schedule, t, targets.v), literal, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("t", "eps", "v", "x_0"),
    [(11.0, 0.0109917, 0.0109676, 5.0), (501.0, 1.0, 0.0777966, 0.0843595)],
)
def test_the_published_min_snr_weights_of_linear(t, eps, v, x_0):
    asked = discrete.linear(), scalar(t)
    found = [min_snr(*asked, target).item() for target in (targets.eps, targets.v, targets.x_0)]
    # Published from float32 tables, where 1 - ᾱ near data has lost its last digits.
    assert found == about([eps, v, x_0], rel=5e-5)


def test_min_snr_of_linear_is_that_of_exact_fractions():
    alpha_bar = Fraction(1)
    for i in range(11):
        alpha_bar *= 1 - Fraction(1, 10_000) - Fraction(199, 10_000) * Fraction(i, 999)
    snr = alpha_bar / (1 - alpha_bar)
    asked = discrete.linear(), scalar(11.0)
    assert min_snr(*asked, targets.eps).item() == about(float(5 / snr))
    assert min_snr(*asked, targets.v).item() == about(float(5 / (snr + 1)))


@pytest.mark.parametrize("schedule", ZERO_SNR_1000.values(), ids=ZERO_SNR_1000)
def test_min_snr_is_finite_where_no_image_is_left(schedule):
    found = min_snr(schedule, several_times(schedule), targets.v)
    assert found.isfinite().all()
    assert found[-1] == 0


def test_unit_weighs_every_image_alike():
    t = several_times(edm.edm())
    assert unit(edm.edm(), t, targets.edm).equal(torch.ones_like(t))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edms_weight_is_1_on_the_output_that_edm_preconditions(schedule, sigma_data):
    t = several_times(schedule)
    target = partial(targets.edm, sigma_data=sigma_data)
    found = weightings.edm(schedule, t, target, sigma_data=sigma_data)
    torch.testing.assert_close(found, torch.ones_like(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", CHAINS)
def test_the_bound_of_a_chain_weighs_like_ho_et_al_equation_12(name):
    chain = CHAINS[name](steps=50)
    alpha_bar = [float(a) for a in chain.alpha_bar]
    literal = []
    for t in range(1, 51):
        alpha = alpha_bar[t] / alpha_bar[t - 1]
        beta = 1 - alpha
        literal.append(50 * beta**2 / (2 * beta * alpha * (1 - alpha_bar[t])))
    # The literal 1 - ᾱ loses digits near data.
    assert vlb(chain, several_times(chain), targets.eps).tolist() == about(literal, rel=1e-7)


@pytest.mark.parametrize("schedule", MOVING.values(), ids=MOVING)
def test_the_bound_of_a_continuous_clock_weighs_by_the_fall_of_the_log_snr(schedule):
    h = 1e-6 * schedule.t_max
    t = several_times(schedule)[1:-1]
    t = t[(t > 3e-2 * schedule.t_max) & (t < 0.97 * schedule.t_max)]
    fall = (schedule(t - h).half_log_snr - schedule(t + h).half_log_snr) / h  # -d ln SNR/dt
    literal = 0.5 * fall * (schedule.t_max - schedule.t_min)
    # A central difference is good to h² and to what rounding leaves of 1/h.
    torch.testing.assert_close(vlb(schedule, t, targets.eps), literal, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", MOVING.values(), ids=MOVING)
def test_the_bound_depends_on_a_schedule_only_by_its_ends(schedule):
    """Kingma et al. 2021, Eq. 18: for an error f(λ) of ε it is ½·∫ f dλ on every clock."""
    first, last = 2.0, -2.0  # nats of ln(α/σ)
    early, late = schedule.time(torch.tensor([first, last], dtype=torch.float64)).tolist()
    # Simpson's rule in ln t, as EDM's clock is not even in anything else.
    log_t = torch.linspace(math.log(early), math.log(late), 4001, dtype=torch.float64)
    t = log_t.exp()
    error = torch.sigmoid(schedule(t).half_log_snr)
    share = vlb(schedule, t, targets.eps) * error * t / (schedule.t_max - schedule.t_min)
    part = torch.full_like(t, 2.0)
    part[1::2], part[[0, -1]] = 4.0, 1.0
    bound = (share * part).sum() * (log_t[1] - log_t[0]) / 3
    exact = math.log1p(math.exp(first)) - math.log1p(math.exp(last))  # ∫ sigmoid, λ = 2·ln(α/σ)
    assert bound.item() == about(exact, rel=1e-8)


def test_the_bound_of_a_fine_chain_is_that_of_the_variance_preserving_sde():
    chain, t = discrete.linear(steps=20_000), scalar(0.4)
    fine = vlb(chain, t * 20_000, targets.eps)
    continuous = vlb(vp.vp(t_min=0.0), t, targets.eps)
    assert fine.item() == about(continuous.item(), rel=1e-3)  # the chain's steps are 1/20 000 long


@pytest.mark.parametrize("schedule", MOVING.values(), ids=MOVING)
def test_sigmoid_weighs_the_bound_by_its_log_snr(schedule):
    t = several_times(schedule)[1:-1]
    snr = snr_of(schedule, t)
    literal = vlb(schedule, t, targets.v) / (1 + math.exp(-1.5) * snr)
    found = weightings.sigmoid(schedule, t, targets.v, bias=1.5)
    torch.testing.assert_close(found, literal, rtol=1e-9, atol=0)


def test_the_weight_of_the_bound_has_the_gradient_of_a_learned_schedule():
    schedule, t = learned.learned(width=4), torch.tensor([0.2, 0.7], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(vlb(schedule, t, targets.eps).prod(), [schedule.bias])
    h = 1e-5
    for i, exact in enumerate(gradient.tolist()):
        ends = []
        for moved in (h, -h):
            other = learned.learned(width=4).requires_grad_(False)
            other.bias[i] += moved
            ends.append(vlb(other, t, targets.eps).prod().item())
        assert (ends[0] - ends[1]) / (2 * h) == about(exact, rel=1e-7)  # good to h²


def test_an_uncertainty_starts_as_1_and_has_a_gradient():
    weighting, t = weightings.uncertainty(channels=16), several_times(flow.flow())
    found = weighting(flow.flow(), t, targets.flow)
    assert found.detach().equal(torch.ones_like(t))
    (gradient,) = torch.autograd.grad(found.log().sum(), list(weighting.parameters()))
    assert gradient.dtype == torch.float64
    assert (gradient != 0).all()


def test_an_uncertainty_learns_one_over_the_loss_at_each_noise_level():
    weighting = weightings.uncertainty()
    t = torch.linspace(math.log(0.01), math.log(20), 200, dtype=torch.float64).exp()
    loss = 0.2 + t / (1 + t)
    descent = torch.optim.LBFGS(weighting.parameters(), line_search_fn="strong_wolfe", max_iter=60)

    def objective() -> Tensor:
        descent.zero_grad()
        weights = weighting(edm.edm(), t, targets.edm)
        total = (weights * loss - weights.log()).mean()
        total.backward()
        return total

    descent.step(objective)
    found = weighting(edm.edm(), t, targets.edm).detach()
    torch.testing.assert_close(found, 1 / loss, rtol=0.02, atol=0)  # as far as 60 steps of descent


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


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_uniform_draws_every_step_of_a_chain_equally_often(steps):
    each = 100
    places = (torch.arange(steps * each, dtype=torch.float64) + 0.5) / (steps * each)
    drawn = uniform(discrete.cosine(steps=steps), places)
    assert drawn.long().bincount().tolist() == [0, *[each] * steps]
    assert drawn.equal(uniform_steps(discrete.cosine(steps=steps), places))


def test_logit_normal_gives_each_step_of_a_chain_its_part_of_the_clock():
    drawn = logit_normal(discrete.cosine(steps=10), evenly, std=3.0)
    ends = torch.special.ndtr(torch.logit(torch.arange(11, dtype=torch.float64) / 10) / 3)
    shares = drawn.long().bincount(minlength=11)[1:] / len(evenly)
    torch.testing.assert_close(shares.double(), ends.diff(), rtol=0, atol=2e-5)


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


@pytest.fixture
def trained() -> LossAware:
    """Loss-aware times of ten bins that have seen losses of every size."""
    times = loss_aware(bins=10, history=3, uniform=0.01)
    t = torch.arange(1, 1001, dtype=torch.float64)
    times.update(discrete.linear(), t, images(1000, seed=1).abs() + t / 300)
    return times


CLOCKS = {name: SCHEDULES[name] for name in ("linear_1000", "cosine_zero_snr", "vp", "edm", "flow")}


@pytest.mark.parametrize("schedule", CLOCKS.values(), ids=CLOCKS)
def test_loss_aware_times_leave_the_mean_loss_unbiased(trained, schedule):
    middles = trained.evenly(schedule, (torch.arange(10, dtype=torch.float64) + 0.5) / 10)
    loss_of_bin = images(10, seed=2) ** 2
    shares, weights = trained.shares(), trained.weight(schedule, middles)
    assert shares.sum().item() == about(1)
    assert shares.max() > 1.5 * shares.min()
    mean = (shares * weights * loss_of_bin).sum()
    assert mean.item() == about(loss_of_bin.mean().item())


@pytest.mark.parametrize("schedule", CLOCKS.values(), ids=CLOCKS)
def test_loss_aware_times_fall_into_each_bin_in_proportion_to_its_share(trained, schedule):
    t = trained(schedule, evenly)
    assert (t >= schedule.t_min).all()
    assert (t <= schedule.t_max).all()
    assert schedule.snap(t).equal(t)
    share_of_t = 1 / (10 * trained.weight(schedule, t))
    bin_of = (share_of_t[:, None] - trained.shares()).abs().argmin(dim=1)
    found = torch.bincount(bin_of, minlength=10) / len(t)
    torch.testing.assert_close(found.double(), trained.shares(), rtol=0, atol=2e-5)  # 100 000 draws
    assert (t.diff() >= 0).all()


def test_inside_a_bin_every_step_is_drawn_equally_often(trained):
    drawn = trained(discrete.linear(), evenly)
    counts = torch.bincount(drawn.long(), minlength=1001)[1:].reshape(10, 100)
    assert (counts.amax(dim=1) - counts.amin(dim=1)).max() <= 2
    assert counts.min() > 0


def test_shares_are_those_of_improved_ddpm_with_one_bin_for_each_step():
    chain, times = discrete.linear(steps=50), loss_aware(bins=50)
    losses = images(10, 50, seed=3).abs()
    for row in losses:
        assert times.shares().equal(torch.full((50,), 1 / 50, dtype=torch.float64))
        times.update(chain, several_times(chain), row)
    p = np.sqrt((losses.numpy() ** 2).mean(axis=0))
    p = p / p.sum() * (1 - 0.001) + 0.001 / 50
    assert times.shares().tolist() == about(p.tolist())


@pytest.mark.parametrize("schedule", CLOCKS.values(), ids=CLOCKS)
def test_until_every_bin_has_its_history_times_are_even(schedule):
    times = loss_aware(bins=10, history=3)
    t = times.evenly(schedule, evenly[:90_000:100])
    times.update(schedule, t, images(len(t)))
    assert times.counts[-1] == 0
    torch.testing.assert_close(
        times(schedule, evenly), times.evenly(schedule, evenly), rtol=1e-12, atol=0
    )
    assert times.weight(schedule, t).tolist() == about([1.0] * len(t))


def test_a_bin_remembers_its_newest_losses_however_steps_divide_them():
    chain = discrete.cosine(steps=20)
    t = several_times(chain)[torch.randint(20, (300,), generator=torch.Generator().manual_seed(4))]
    losses = images(300, seed=5).float()  # as they come from the network
    remembered = [deque(maxlen=7) for _ in range(5)]
    for at, loss in zip(t.tolist(), losses.tolist(), strict=True):
        remembered[int((at - 1) // 4)].append(loss)
    for sizes in ([300], [1] * 300, [128, 128, 44], [7, 93, 200]):
        times = loss_aware(bins=5, history=7)
        for some_t, some_losses in zip(t.split(sizes), losses.split(sizes), strict=True):
            times.update(chain, some_t, some_losses)
        assert [sorted(row) for row in times.losses.tolist()] == [sorted(r) for r in remembered]


def test_saved_and_loaded_loss_aware_times_draw_the_same(trained):
    loaded = loss_aware(bins=10, history=3, uniform=0.01)
    loaded.load_state_dict({name: value.clone() for name, value in trained.state_dict().items()})
    for times in (trained, loaded):
        times.update(discrete.linear(), torch.tensor([7.0, 998.0]).double(), images(2, seed=6))
    assert loaded(vp.vp(), evenly).equal(trained(vp.vp(), evenly))


def test_losses_of_0_are_all_alike():
    chain, times = discrete.linear(steps=50), loss_aware(bins=5, history=1)
    times.update(chain, several_times(chain), torch.zeros(50))
    assert times.shares().tolist() == about([0.2] * 5)


def test_loss_aware_times_refuse_bins_that_do_not_divide_a_chain():
    with pytest.raises(ConfigError, match="1000 steps into 300 equal bins"):
        loss_aware(bins=300)(discrete.linear(), evenly)
    for bad in ({"bins": 0}, {"history": 0}, {"uniform": 0.0}, {"uniform": 1.1}):
        with pytest.raises(ConfigError, match="needs at least one bin"):
            loss_aware(**bad)


# Grids


def legal(grid: str, schedule: str) -> bool:
    in_log_snr = grid in {"karras", "log_snr"}
    return not (in_log_snr and (schedule in ZERO_SNR_1000 or "flow" in schedule))


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
    ("grid", "schedule"),
    [(g, s) for g in GRIDS for s in SCHEDULES | {"learned": None} if legal(g, s)],
)
def test_a_grid_falls_from_t_max_to_data_through_times_that_the_network_knows(grid, schedule):
    clock = (SCHEDULES | MOVING)[schedule]
    for steps in STEPS:
        assert is_lawful(GRIDS[grid](clock, steps), clock, steps), steps


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
@pytest.mark.parametrize("grid", ["karras", "log_snr", "uniform"])
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


def test_the_uniform_grid_is_even_down_to_t_min():
    assert grids.uniform(discrete.linear(), 4).tolist() == [1000, 667, 334, 1, 0]
    expected = [1, 0.667, 0.334, 0.001, 0]
    assert grids.uniform(flow.flow(), 4).tolist() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("steps", [5, 10, 20, 25])
def test_the_quadratic_grid_is_that_of_ddim(steps):
    expected = [1000 * i**2 / steps**2 for i in range(steps, -1, -1)]
    found = grids.quadratic(discrete.linear(), steps)
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 0.5
    even = grids.quadratic(vp.vp(t_min=1e-5), steps).sqrt().diff()
    torch.testing.assert_close(even, even.mean().expand(steps), rtol=1e-9, atol=0)


def test_a_long_quadratic_grid_goes_down_to_t_min():
    for schedule in (vp.vp(), vp.vp(t_min=0.003), edm.edm(), discrete.linear()):
        for steps in (200, 300):
            assert grids.quadratic(schedule, steps)[-2] == schedule.t_min
    for sigma_min in (0.01, 0.03, 0.05, 0.07):
        assert grids.quadratic(edm.edm(sigma_min=sigma_min), 300)[-2] == sigma_min


def test_the_stops_of_align_your_steps_are_the_published_ones_and_interpolated_log_linearly():
    published = AysSchedules["StableDiffusionSigmas"][:-1]
    schedule = edm.edm(sigma_max=published[0])
    assert stops(schedule, 10).tolist() == about([*published, 0.0])
    listed = [*published, 0.029]  # what the authors interpolate towards
    for steps in (5, 10, 17, 40):
        places = np.linspace(0, 1, steps + 1)
        literal = np.exp(np.interp(places, np.linspace(0, 1, 11), np.log(listed)))
        assert stops(schedule, steps).tolist() == about([*literal[:-1], 0.0])


def test_the_published_timesteps_of_align_your_steps_are_those_of_the_latent_chain():
    published = AysSchedules["StableDiffusionTimesteps"]  # counted from 0
    found = stops(discrete.scaled_linear(), 10)[:-1] - 1
    assert (found - torch.tensor(published)).abs().max() <= 2  # the σ are rounded to 3 digits


def test_stops_read_any_list_as_the_ratio_of_noise_to_image_on_any_clock():
    for schedule in (vp.vp(), flow.flow(), edm.edm(), ZERO_SNR_1000["linear_zero_snr"]):
        times = stops(schedule, 3, ratios=(9.0, 2.0, 0.5, 0.1))
        inside = schedule(times[1:-1])
        # On a chain to the nearest whole step.
        assert (inside.sigma / inside.alpha).tolist() == pytest.approx([2.0, 0.5], rel=0.02)


@pytest.mark.parametrize("bad", [(), (1.0,), (1.0, 2.0), (1.0, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_stops_that_do_not_fall_are_refused(bad):
    with pytest.raises(ConfigError, match="two or more falling ratios"):
        stops(vp.vp(), 10, ratios=bad)


def test_stops_that_are_noisier_than_the_schedule_are_refused():
    with pytest.raises(ConfigError, match=r"from the second on below 5, where this schedule ends"):
        stops(edm.edm(sigma_max=5.0), 10)
    assert stops(edm.edm(sigma_max=6.5), 10)[:2].tolist() == about([6.5, 6.475])


def test_stops_that_fall_on_an_end_of_a_continuous_clock_are_refused():
    wanted = r"10 sampling steps .* between t = 80 and 0.3, where .* trained; use fewer"
    with pytest.raises(ConfigError, match=wanted):
        stops(edm.edm(sigma_min=0.3), 10, ratios=(80.0, 1.0, 0.1, 0.01))
    with pytest.raises(ConfigError, match=r"2000 sampling steps .* between t = 1 and 0.001"):
        trailing(flow.flow(), 2000)


def test_a_clock_that_begins_at_data_is_refused_with_the_time_where_it_fails():
    clock = vp.vp(t_min=0.0)
    assert is_lawful(trailing(clock, 7), clock, 7)
    assert is_lawful(grids.quadratic(clock, 7), clock, 7)
    assert is_lawful(stops(clock, 7), clock, 7)
    for grid in (karras, log_snr):
        with pytest.raises(ConfigError, match=r"infinite at t = 0 of this schedule \(σ = 0\)"):
            grid(clock, 7)
    with pytest.raises(ConfigError, match="t_min = 0 is data itself; use grid=trailing"):
        grids.uniform(clock, 7)
