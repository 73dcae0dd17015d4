"""Schedules: the laws that every clock keeps, and the published tables."""

import math
import warnings

import numpy as np
import pytest
import torch
from oracles import (
    CHAINS,
    CHAINS_OF_1000,
    CONTINUOUS,
    ZERO_SNR_1000,
    about,
    scalar,
    several_times,
)
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Scales, transition_variance
from rediffuse.schedules import cosine, discrete, edm, flow, learned, vp

CONTINUOUS = CONTINUOUS | {
    "cosine_shifted": cosine.cosine(shift=4.0),
    "flow_resolution": flow.resolution(image_size=96),
    "learned": learned.learned(),
}

CHAINS_OF_ANY_LENGTH = {
    f"{name}_{steps}{'_zero_snr' * zero}": chain(steps=steps, zero_terminal_snr=zero)
    for name, chain in CHAINS.items()
    for steps in (50, 1000, 4000)
    for zero in (False, True)
}
EVERY = CONTINUOUS | CHAINS_OF_ANY_LENGTH


def betas(chain: discrete.Discrete) -> Tensor:
    """β_1 .. β_T."""
    t = several_times(chain)
    return transition_variance(chain, t, t - 1)


def between_times(schedule) -> Tensor:
    """Times that lie between the steps of a chain as well."""
    return torch.linspace(schedule.t_min, schedule.t_max, 997, dtype=torch.float64)


@pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY)
def test_time_zero_is_data(schedule):
    assert schedule(scalar(0.0)) == Scales(scalar(1.0), scalar(0.0))


@pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY)
def test_log_snr_falls_strictly_from_t_min_to_t_max(schedule):
    for t in (several_times(schedule), between_times(schedule)):
        at = schedule(t)
        assert at.alpha.dtype == at.sigma.dtype == torch.float64
        assert (at.sigma > 0).all()
        assert (at.alpha[:-1] > 0).all()
        assert (at.half_log_snr.diff() < 0).all()


@pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY)
def test_time_inverts_the_log_snr(schedule):
    for t in (several_times(schedule), between_times(schedule)):
        torch.testing.assert_close(schedule.time(schedule(t).half_log_snr), t, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
def test_a_continuous_clock_inverts_to_the_last_digits(schedule):
    t = between_times(schedule)
    torch.testing.assert_close(schedule.time(schedule(t).half_log_snr), t, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY)
def test_a_known_time_stays_when_snapped(schedule):
    t = between_times(schedule)
    known = schedule.snap(t)
    assert schedule.snap(known).equal(known)
    assert (known >= schedule.t_min).all()
    assert (known <= schedule.t_max).all()
    assert schedule.snap(several_times(schedule)).equal(several_times(schedule))
    assert (known - t).abs().max() <= 0.5
    assert (schedule.snap(t[:3]).diff() >= 0).all()


@pytest.mark.parametrize(
    "schedule",
    [s for name, s in EVERY.items() if name != "edm" and "flow" not in name],
    ids=[name for name in EVERY if name != "edm" and "flow" not in name],
)
def test_a_variance_preserving_process_keeps_alpha_squared_plus_sigma_squared_at_one(schedule):
    at = schedule(torch.cat((between_times(schedule), several_times(schedule))))
    assert (at.alpha**2 + at.sigma**2 - 1).abs().max() < 1e-12


def test_flow_keeps_alpha_plus_sigma_at_one_and_edm_keeps_the_image():
    for schedule in (flow.flow(), flow.flow(shift=3.0)):
        at = schedule(between_times(schedule))
        assert (at.alpha + at.sigma - 1).abs().max() < 1e-15
    at = edm.edm()(between_times(edm.edm()))
    assert (at.alpha == 1).all()
    assert at.sigma.equal(between_times(edm.edm()))


@pytest.mark.parametrize("schedule", EVERY.values(), ids=EVERY)
def test_scales_of_one_time_are_those_of_a_batch_of_times(schedule):
    t = several_times(schedule)[::7]
    at = schedule(t)
    for n in (0, len(t) // 2, len(t) - 1):
        alone = schedule(t[n])
        assert alone.alpha.ndim == 0
        torch.testing.assert_close(alone.alpha, at.alpha[n], rtol=1e-14, atol=0)
        torch.testing.assert_close(alone.sigma, at.sigma[n], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("chain", "beta", "alpha_bar"),
    [
        (
            discrete.linear,
            (1e-4, 1.004004004004e-2, 2e-2),
            (5.214230306185e-1, 7.858724288178e-2, 4.035829765376e-5),
        ),
        (
            discrete.cosine,
            (4.128422482197e-5, 3.145886230478e-3, 0.999),
            (8.458879864969e-1, 4.938435904406e-1, 2.428766907035e-9),
        ),
        (
            discrete.scaled_linear,
            (8.5e-4, 4.803792980551e-3, 1.2e-2),
            (6.737926252333e-1, 2.776696504565e-1, 4.660098513077e-3),
        ),
    ],
)
def test_the_published_tables(chain, beta, alpha_bar):
    schedule = chain()
    assert betas(schedule)[[0, 499, 999]].tolist() == about(beta)
    found = schedule(torch.tensor([251.0, 500.0, 1000.0], dtype=torch.float64)).alpha ** 2
    assert found.tolist() == about(alpha_bar)


def test_the_published_zero_terminal_snr_rescaling_of_linear():
    schedule = discrete.linear(zero_terminal_snr=True)
    found = betas(schedule)
    assert found[[1, 499]].tolist() == about((1.2068663551e-4, 1.027104254955e-2))
    assert found[999] == 1
    assert schedule(scalar(500.0)).alpha.item() == about(0.2757331147089786)


@pytest.mark.parametrize("name", CHAINS)
def test_zero_terminal_snr_shifts_and_scales_alpha_to_end_at_zero_and_keeps_the_first(name):
    t = several_times(CHAINS_OF_1000[name + "_1000"])
    alpha, rescaled = (
        schedule(t).alpha
        for schedule in (CHAINS_OF_1000[name + "_1000"], ZERO_SNR_1000[name + "_zero_snr"])
    )
    assert rescaled[-1] == 0
    literal = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    torch.testing.assert_close(rescaled, literal, rtol=1e-9, atol=1e-12)
    assert rescaled[0].item() == about(alpha[0].item(), rel=1e-12)


@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_betas_of_the_linear_family_are_scaled_by_1000_over_the_number_of_steps(steps):
    linear = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    quadratic = np.linspace(1e-4**0.5, 0.02**0.5, steps) ** 2 * 1000 / steps
    latent = np.linspace(8.5e-4**0.5, 0.012**0.5, steps) ** 2 * 1000 / steps
    rise = 1 / (1 + np.exp(-np.linspace(-6, 6, steps)))
    sigmoid = (rise * (0.02 - 1e-4) + 1e-4) * 1000 / steps
    for chain, beta in (
        (discrete.linear, linear),
        (discrete.quadratic, quadratic),
        (discrete.scaled_linear, latent),
        (discrete.beta_sigmoid, sigmoid),
    ):
        found = chain(steps=steps)
        np.testing.assert_allclose(betas(found).numpy(), beta, rtol=1e-9)
        np.testing.assert_allclose(found.alpha_bar[1:].numpy(), np.cumprod(1 - beta), rtol=1e-9)


@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7)])
def test_alpha_sigmoid_is_jabri_et_al_algorithm_1(steps, start, end, tau):
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    v_start, v_end = sigmoid(start / tau), sigmoid(end / tau)
    gamma = [
        (-sigmoid((n / steps * (end - start) + start) / tau) + v_end) / (v_end - v_start)
        for n in range(steps + 1)
    ]
    found = discrete.alpha_sigmoid(steps=steps, start=start, end=end, tau=tau).alpha_bar
    # The last ᾱ, 0 in the paper, keeps a thousandth of the one before: β ≤ 0.999.
    assert found[:-1].tolist() == about(gamma[:-1])
    assert found[-1].item() == about(gamma[-2] / 1000)


@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_discrete_cosine_is_nichol_and_dhariwal_equation_17_with_one_beta_clipped(steps):
    f = [math.cos((n / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(steps + 1)]
    beta = [min(1 - f[n] / f[n - 1], 0.999) for n in range(1, steps + 1)]
    found = discrete.cosine(steps=steps)
    assert sum(one == 0.999 for one in beta) == 1
    assert betas(found).tolist() == about(beta)
    assert found.alpha_bar[1:].tolist() == about(np.cumprod(1 - np.array(beta)).tolist())


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_a_linear_chain_of_20_steps_or_fewer_warns_and_is_cut_at_0_999(steps):
    with pytest.warns(UserWarning, match=rf"{steps} steps are too few.*0.999.*schedule=cosine"):
        chain = discrete.linear(steps=steps)
    assert betas(chain).max().item() == about(0.999)
    assert (chain.alpha_bar.diff() < 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discrete.linear(steps=21)
        discrete.cosine(steps=steps)
        discrete.alpha_sigmoid(steps=steps)


@pytest.mark.parametrize("bad", [[0.1, 0.0], [0.1, 1.0], [-0.1, 0.1], [[0.1, 0.2]], [float("nan")]])
def test_betas_outside_zero_to_one_are_refused(bad):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        discrete.from_betas(torch.tensor(bad, dtype=torch.float64))


@pytest.mark.parametrize("schedule", CHAINS_OF_ANY_LENGTH.values(), ids=CHAINS_OF_ANY_LENGTH)
def test_a_chain_has_whole_steps_from_1_to_t(schedule):
    assert schedule.t_min == 1
    assert schedule(several_times(schedule)).alpha.equal(schedule.alpha_bar[1:].sqrt())
    assert schedule.snap(torch.tensor([-3.0, 0.2, 1.4, 7.6, 1e6]).double()).tolist() == [
        1, 1, 1, 8, schedule.t_max,
    ]  # fmt: skip
    assert schedule.label(several_times(schedule)).equal(several_times(schedule))


@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_the_first_variance_of_a_chain_is_beta_1_to_the_last_digit(steps):
    """As 1 - ᾱ_1 it would be a difference of near-equal numbers."""
    first = discrete.linear(steps=steps).one_minus_alpha_bar[1].item()
    assert first == about(1e-4 * 1000 / steps, rel=1e-15)


def test_the_variance_preserving_sde_is_song_et_al_with_its_integral_in_closed_form():
    schedule = vp.vp()
    at = schedule(scalar(0.5))
    assert (at.sigma / at.alpha).item() == about(3.41291830906912)
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + t * 19.9, t)  # β(t) is linear, so the trapezoid rule is exact
    assert schedule(scalar(1.0)).alpha.item() == about(math.exp(-integral / 2))
    near_data = schedule(scalar(1e-12)).sigma ** 2
    assert near_data.item() == about(1e-13)


def test_the_shift_of_flow_is_esser_et_al_equation_23():
    schedule = flow.flow(shift=3.0)
    assert schedule(scalar(0.1)).sigma.item() == about(0.25, rel=1e-12)
    assert schedule(scalar(0.5)).sigma.item() == about(0.75, rel=1e-12)
    assert flow.flow()(scalar(0.3)).sigma.item() == about(0.3, rel=1e-15)
    for shift in (0.0, -1.0):
        with pytest.raises(ConfigError, match="shift must be above 0"):
            flow.flow(shift=shift)


def test_the_continuous_cosine_is_a_quarter_circle_cut_at_its_log_snr():
    schedule = cosine.cosine(max_log_snr=15.0)
    ends = schedule(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    torch.testing.assert_close(
        2 * ends.half_log_snr, torch.tensor([15.0, -15.0]).double(), rtol=1e-9, atol=0
    )
    at = schedule(scalar(1 / 3))
    assert at.alpha.item() == about(math.cos(math.pi / 6), rel=1e-12)
    assert at.sigma.item() == about(math.sin(math.pi / 6), rel=1e-12)


def test_labels_are_what_the_papers_tell_their_networks():
    assert edm.edm().label(scalar(1.0)) == 0
    assert edm.edm().label(scalar(80.0)).item() == about(1.0955066586684703)
    for schedule in (vp.vp(), flow.flow(), cosine.cosine()):
        assert schedule.label(scalar(0.25)) == 250


def test_edm_runs_from_0_002_to_80_by_default():
    assert (edm.edm().t_min, edm.edm().t_max) == (0.002, 80.0)


@pytest.mark.parametrize(("image_d", "noise_d"), [(256, 64), (32, 64), (64, 64)])
def test_the_shifted_cosine_is_that_of_simple_diffusion(image_d, noise_d):
    schedule = cosine.cosine(shift=image_d / noise_d)
    t = between_times(schedule)
    literal = -2 * (t * math.pi / 2).tan().log() + 2 * math.log(noise_d / image_d)
    torch.testing.assert_close(2 * schedule(t).half_log_snr, literal, rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match="shift must be above 0"):
        cosine.cosine(shift=0.0)


def test_the_resolution_of_flow_shifts_by_the_root_of_the_ratio_of_pixels():
    n, m = 32 * 32, 64 * 64
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    ratio = math.sqrt(m / n)
    literal = ratio * t / (1 + (ratio - 1) * t)
    found = flow.resolution(image_size=64, base_size=32)(t).sigma
    torch.testing.assert_close(found, literal, rtol=1e-12, atol=0)


def test_any_list_of_betas_is_a_chain():
    wanted = (0.01, 0.5, 0.02, 0.9)
    assert betas(discrete.betas(betas=wanted)).tolist() == about(wanted)
    rescaled = discrete.betas(betas=wanted, zero_terminal_snr=True)
    assert (rescaled(scalar(4.0)).alpha, betas(rescaled)[0].item()) == (0, about(0.01))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        discrete.betas(betas=(0.1, 1.5))


def moved(seed: int, size: float) -> learned.Learned:
    """A learned schedule after some training: every parameter went somewhere."""
    schedule = learned.learned(width=16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in schedule.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += size * noise
    return schedule


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_a_learned_schedule_rises_between_fixed_ends_whatever_it_learned(seed, size):
    schedule = moved(seed, size)
    t = between_times(schedule)
    log_snr = 2 * schedule(t).half_log_snr.detach()
    assert log_snr[[0, -1]].tolist() == about([13.3, -5.0])
    assert (log_snr.diff() < 0).all()
    found = schedule.time(log_snr / 2)
    torch.testing.assert_close(
        2 * schedule(found).half_log_snr.detach(), log_snr, rtol=0, atol=1e-9
    )
    labels = schedule.label(t).detach()
    torch.testing.assert_close(labels, 1000 * (13.3 - log_snr) / 18.3, rtol=1e-9, atol=1e-9)


def test_a_learned_schedule_starts_almost_even_in_log_snr():
    schedule = learned.learned(max_log_snr=10.0, min_log_snr=-10.0)
    even = 10 - 20 * torch.linspace(0, 1, 997, dtype=torch.float64)
    assert (2 * schedule(between_times(schedule)).half_log_snr - even).abs().max() < 0.6


def test_below_t_min_a_learned_schedule_falls_to_data_and_inverts():
    schedule = learned.learned()
    t = torch.linspace(0, 1e-3, 50, dtype=torch.float64)[1:]
    half_log_snr = schedule(t).half_log_snr.detach()
    assert (half_log_snr.diff() < 0).all()
    torch.testing.assert_close(schedule.time(half_log_snr), t, rtol=1e-9, atol=0)


def test_every_parameter_of_a_learned_schedule_has_a_gradient():
    schedule = moved(0, 0.3)
    t = between_times(schedule)[1:-1]
    gradients = torch.autograd.grad(schedule(t).sigma.sin().sum(), list(schedule.parameters()))
    assert all((gradient != 0).all() for gradient in gradients)
    assert all(gradient.dtype == torch.float64 for gradient in gradients)


def test_a_learned_schedule_without_a_range_is_refused():
    with pytest.raises(ConfigError, match="needs min_log_snr below max_log_snr, not 3 and 2"):
        learned.learned(max_log_snr=2.0, min_log_snr=3.0)
