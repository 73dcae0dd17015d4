"""Guidance wraps a denoiser and gives a denoiser back; sampling gives image j for (seed, j)."""

from functools import partial

import pytest
import torch
from oracles import (
    SCHEDULES,
    Counted,
    final,
    gaussian,
    images,
    scalar,
    several_times,
    two_points,
)
from torch import Tensor

from rediffuse.grids import karras, trailing
from rediffuse.guidance.classifier_free import classifier_free
from rediffuse.guidance.clipping import clipping
from rediffuse.process import Prediction
from rediffuse.randomness import ImageNoise, Stream, normal
from rediffuse.sampling import trajectory
from rediffuse.schedules import discrete, edm
from rediffuse.solvers.ancestral import ancestral
from rediffuse.solvers.ddim import ddim
from rediffuse.solvers.dpmpp_2m import dpmpp_2m
from rediffuse.solvers.euler import euler
from rediffuse.solvers.heun import heun

SOLVERS = {
    "ancestral": ancestral,
    "ancestral_beta": partial(ancestral, variance=1.0),
    "ddim": ddim,
    "ddim_eta_1": partial(ddim, eta=1.0),
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
    "heun_churn": partial(heun, churn=40.0),
}
LOW, HIGH = torch.tensor(-1.0), torch.tensor(1.0)


def learned(schedule, std: float, fraction: float):
    """A Gaussian denoiser that also answers with a variance fraction."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return gaussian(schedule, std)(x_t, t)._replace(variance=torch.full_like(x_t, fraction))

    return denoise


# Guidance


@pytest.mark.parametrize(("scale", "same"), [(1.0, 0), (0.0, 1)])
def test_scale_1_is_the_conditional_and_0_the_unconditional_bit_for_bit_with_one_forward(
    scale, same
):
    schedule, x, t = discrete.linear(), images(2, 4, 3, 3), scalar(500.0)
    both = [Counted(learned(schedule, std, fraction)) for std, fraction in ((0.5, 0.2), (0.7, 0.6))]
    found = classifier_free(*both, scale=scale)(x, t)
    assert [denoise.evaluations for denoise in both] == [1 - same, same]
    for ours, theirs in zip(found, both[same].denoise(x, t), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 7.5])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guidance_moves_every_channel_of_image_and_noise_from_unconditional_to_conditional(
    scale, channels
):
    schedule, x, t = discrete.linear(), images(2, channels, 3, 3), scalar(500.0)
    conditional, unconditional = learned(schedule, 0.5, 0.2), learned(schedule, 0.7, 0.6)
    found = classifier_free(conditional, unconditional, scale=scale)(x, t)
    c, u = conditional(x, t), unconditional(x, t)
    w = scale - 1  # Ho & Salimans 2022, Eq. 6
    torch.testing.assert_close(found.x_0, (1 + w) * c.x_0 - w * u.x_0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.eps, (1 + w) * c.eps - w * u.eps, rtol=1e-12, atol=1e-12)
    assert found.variance.equal(c.variance)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_guidance_keeps_alpha_x_0_plus_sigma_eps_at_x_t(schedule):
    t = several_times(schedule)[::7]
    x_t, at = images(len(t), 3), schedule(t)
    guided = classifier_free(two_points(schedule), gaussian(schedule), scale=4.0)
    found = guided(x_t, t)
    again = at.alpha[:, None] * found.x_0 + at.sigma[:, None] * found.eps
    torch.testing.assert_close(again, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_clipping_holds_x_0_in_range_and_keeps_alpha_x_0_plus_sigma_eps_at_x_t(schedule):
    t = several_times(schedule)[::7]
    x_t, at = 3 * images(len(t), 3), schedule(t)
    clipped = clipping(gaussian(schedule, std=2.0), schedule, low=LOW, high=HIGH)
    found = clipped(x_t, t)
    assert found.x_0.abs().max() == 1
    again = at.alpha[:, None] * found.x_0 + at.sigma[:, None] * found.eps
    torch.testing.assert_close(again, x_t, rtol=1e-9, atol=1e-9)


def test_clipping_changes_nothing_inside_the_range_and_keeps_the_variance():
    schedule, x_t, t = discrete.linear(), images(5, 3), scalar(300.0)
    denoise = learned(schedule, 0.1, 0.3)
    found, plain = clipping(denoise, schedule, low=LOW, high=HIGH)(x_t, t), denoise(x_t, t)
    assert found.x_0.equal(plain.x_0)
    torch.testing.assert_close(found.eps, plain.eps, rtol=1e-12, atol=1e-12)
    assert found.variance.equal(plain.variance)


def test_clipping_has_a_range_for_each_channel():
    """As pixels that were normalised by each channel's own mean and standard deviation."""
    schedule, x_t, t = discrete.linear(), 5 * images(4, 3, 2, 2), scalar(10.0)
    low = torch.tensor([-1.0, -2.0, -0.5]).reshape(3, 1, 1)
    high = torch.tensor([1.0, 0.5, 2.0]).reshape(3, 1, 1)
    denoise = gaussian(schedule, std=2.0)
    found = clipping(denoise, schedule, low=low, high=high)(x_t, t).x_0
    for n, plain in enumerate(denoise(x_t, t).x_0.unbind(1)):
        assert found[:, n].equal(plain.clamp(low[n].item(), high[n].item()))


# Sampling


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4)])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_an_image_is_the_same_to_the_last_bit_in_batches_of_64_7_and_1(solver, shape):
    schedule = discrete.linear()
    times = trailing(schedule, 6)

    def sampled(numbers: Tensor) -> Tensor:
        like = torch.empty(len(numbers), *shape)
        noise = ImageNoise(3, numbers)
        return final(trajectory(gaussian(schedule), schedule, solver, times, noise, like))

    together = sampled(torch.arange(64))
    assert together.dtype == torch.float32
    for size in (7, 1):
        parts = torch.arange(64).split(size)[:10]
        split = torch.cat([sampled(part) for part in parts])
        assert split.equal(together[: len(split)])
    assert sampled(torch.tensor([11, 3])).equal(together[[11, 3]])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_sampling_starts_from_the_keyed_noise_of_t_max(schedule):
    started = []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        started.append(x_t)
        return gaussian(schedule)(x_t, t)

    numbers = torch.tensor([5, 900])
    like = torch.empty(2, 1, 3, 3, dtype=torch.float64)
    times = trailing(schedule, 3)
    states = list(trajectory(denoise, schedule, euler, times, ImageNoise(3, numbers), like))
    assert len(states) == 3
    drawn = normal(3, Stream.SAMPLING, numbers, (1, 3, 3)).double()
    torch.testing.assert_close(started[0], schedule(times[0]).sigma * drawn, rtol=1e-15, atol=0)


def test_a_stochastic_solver_goes_on_with_the_second_draw():
    schedule, numbers = discrete.linear(), torch.tensor([5, 900])
    times, like = trailing(schedule, 3), torch.empty(2, 2, dtype=torch.float64)
    found = next(
        trajectory(two_points(schedule), schedule, ancestral, times, ImageNoise(3, numbers), like)
    )
    first, second = (normal(3, Stream.SAMPLING, numbers, (2,), draw).double() for draw in (0, 1))
    x = first * schedule(times[0]).sigma
    expected = next(ancestral(two_points(schedule), schedule, x, times, lambda _: second))
    assert found.equal(expected)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_inference_mode_covers_the_denoiser_and_never_the_caller(solver):
    schedule = discrete.linear()
    inside, outside = [], []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        inside.append(torch.is_inference_mode_enabled())
        return gaussian(schedule)(x_t, t)

    times, noise, like = trailing(schedule, 4), ImageNoise(3, torch.arange(2)), torch.empty(2, 2)
    for state in trajectory(denoise, schedule, solver, times, noise, like):
        outside.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        assert not state.requires_grad
    assert set(inside) == {True}
    assert set(outside) == {(False, True)}


def test_inference_mode_never_leaks_when_a_caller_stops_or_a_denoiser_fails():
    schedule = discrete.linear()
    times, like = trailing(schedule, 4), torch.empty(2, 2)

    def failing(x_t: Tensor, t: Tensor) -> Prediction:
        raise KeyError

    walk = trajectory(
        gaussian(schedule), schedule, euler, times, ImageNoise(3, torch.arange(2)), like
    )
    next(walk)
    walk.close()
    assert not torch.is_inference_mode_enabled()
    with pytest.raises(KeyError):
        next(trajectory(failing, schedule, euler, times, ImageNoise(3, torch.arange(2)), like))
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_samples_of_an_exact_denoiser_have_the_distribution_of_its_data():
    """1,000 images of N(0, 0.5²) and of two points, from Heun on EDM's noise levels."""
    schedule, numbers = edm.edm(), torch.arange(1000)
    times, like = karras(schedule, 40), torch.empty(1000, 3, dtype=torch.float64)

    def sampled(denoise) -> Tensor:
        return final(trajectory(denoise, schedule, heun, times, ImageNoise(3, numbers), like))

    normals = sampled(gaussian(schedule))
    assert normals.mean().item() == pytest.approx(0, abs=4 * 0.5 / 3000**0.5)
    assert normals.std().item() == pytest.approx(
        0.505, abs=4 * 0.5 / 6000**0.5
    )  # 1 % of it is Heun's
    points = sampled(two_points(schedule))
    torch.testing.assert_close(points.abs(), torch.ones_like(points), rtol=0, atol=1e-6)
    assert (points > 0).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 3000**0.5)
