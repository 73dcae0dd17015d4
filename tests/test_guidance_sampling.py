"""Guidance and thresholds wrap a denoiser; sampling gives image j for (seed, j)."""

import math
from functools import partial

import pytest
import torch
from oracles import (
    SCHEDULES,
    Counted,
    Says,
    final,
    gaussian,
    images,
    scalar,
    several_times,
    two_points,
)
from torch import Tensor

from rediffuse import build
from rediffuse.config.schema import Part
from rediffuse.denoiser import Denoiser
from rediffuse.errors import ConfigError
from rediffuse.grids import karras, trailing
from rediffuse.guidance import Sides, apart, none, sides
from rediffuse.guidance.classifier import classifier_guided
from rediffuse.guidance.classifier_free import classifier_free
from rediffuse.guidance.clipping import clipping
from rediffuse.guidance.dynamic_thresholding import dynamic_thresholding
from rediffuse.guidance.inpainting import inpainting
from rediffuse.guidance.projected import projected
from rediffuse.process import Prediction
from rediffuse.randomness import ImageNoise, Stream, normal
from rediffuse.sampling import trajectory
from rediffuse.schedules import discrete, edm, flow
from rediffuse.solvers.ancestral import ancestral
from rediffuse.solvers.ddim import ddim
from rediffuse.solvers.dpmpp_2m import dpmpp_2m
from rediffuse.solvers.euler import euler
from rediffuse.solvers.heun import heun
from rediffuse.targets import v
from rediffuse.tensors import expand

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
LOW, HIGH, HALF = torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(0.5)
FEW = {"linear": discrete.linear(), "edm": edm.edm(), "flow": flow.flow()}


def learned(schedule, std: float, fraction: float):
    """A Gaussian denoiser that also answers with a variance fraction."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return gaussian(schedule, std)(x_t, t)._replace(variance=torch.full_like(x_t, fraction))

    return denoise


def counted(schedule) -> Sides:
    """Two sides that disagree, each of which counts its evaluations."""
    return apart(*(Counted(learned(schedule, std, f)) for std, f in ((0.5, 0.2), (0.7, 0.6))))


def asked(pair: Sides) -> list[int]:
    return [denoise.evaluations for denoise in (pair.conditional, pair.unconditional)]


def told(schedule, seed: int = 0):
    """A denoiser whose network mixes channels, sees its class and learns a variance."""
    mixing = images(6, 3, seed=seed)

    def network(x: Tensor, label: Tensor, cond: Tensor) -> Tensor:
        shifted = x + (cond + label / 1000).reshape(-1, 1, 1, 1)
        return torch.einsum("oc,bchw->bohw", mixing, shifted).tanh()

    return Denoiser(Says(network), schedule, v)


def mixture(schedule) -> Sides:
    """Data that is N(0.8, 0.3²) in the class, and N(0, 0.85²) in all."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        at = schedule(t)
        around = gaussian(schedule, 0.3)(x_t - 0.8 * expand(at.alpha, x_t), t)
        return Prediction(around.x_0 + 0.8, around.eps)

    return apart(denoise, gaussian(schedule, 0.85))


def of_two(schedule):
    """log p(x_0 ~ N(1, 1) | x_t), if it could be N(-1, 1) as well, of all pixels together."""

    def log_prob(x_t: Tensor, t: Tensor) -> Tensor:
        at = schedule(t)
        evidence = expand(2 * at.alpha / (at.alpha**2 + at.sigma**2), x_t) * x_t
        return torch.nn.functional.logsigmoid(evidence.flatten(1).sum(1))

    return log_prob


WRAPPERS = {
    "classifier_free": lambda pair, clock: classifier_free(pair, clock, scale=3.0),
    "rescaled": lambda pair, clock: classifier_free(pair, clock, scale=3.0, rescale=0.7),
    "limited": lambda pair, clock: classifier_free(
        pair, clock, scale=3.0, sigma_min=0.3, sigma_max=4.0
    ),
    "projected": lambda pair, clock: projected(
        pair, clock, scale=3.0, norm=0.5, momentum=-0.5, sigma_max=4.0
    ),
    "classifier": lambda pair, clock: classifier_guided(
        pair.unconditional, clock, of_two(clock), scale=2.0
    ),
    "clipping": lambda pair, clock: clipping(pair.conditional, clock, low=-HALF, high=HALF),
    "dynamic_thresholding": lambda pair, clock: dynamic_thresholding(
        pair.conditional, clock, low=-HALF, high=HALF, percentile=0.8
    ),
    "none": lambda pair, clock: none(pair.conditional, clock, low=-HALF, high=HALF),
    "inpainting": lambda pair, clock: inpainting(
        pair.conditional, clock, known=torch.tensor(0.25), mask=torch.tensor([1.0, 0.0, 0.0])
    ),
}


# What every wrapper keeps


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_wrapper_keeps_alpha_x_0_plus_sigma_eps_at_x_t(schedule, wrap):
    t = several_times(schedule)[::7]
    x_t, at = 3 * images(len(t), 3), schedule(t)
    found = wrap(apart(two_points(schedule), gaussian(schedule)), schedule)(x_t, t)
    again = at.alpha[:, None] * found.x_0 + at.sigma[:, None] * found.eps
    torch.testing.assert_close(again, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
def test_times_of_each_image_and_one_time_for_all_say_the_same(schedule, wrap):
    t = several_times(schedule)[[10, 60, 120, 190]]
    x_t = images(4, 2, 3)
    together = wrap(mixture(schedule), schedule)(x_t, t)
    for n in range(4):
        alone = wrap(mixture(schedule), schedule)(x_t[n : n + 1], t[n])
        torch.testing.assert_close(together.x_0[n], alone.x_0[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.eps[n], alone.eps[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_no_wrapper_touches_a_learned_variance(wrap):
    schedule = discrete.linear()
    pair = apart(learned(schedule, 0.5, 0.2), learned(schedule, 0.7, 0.2))
    for t in (scalar(500.0), torch.tensor([900.0, 20.0], dtype=torch.float64)):
        found = wrap(pair, schedule)(3 * images(2, 3, 3), t)
        assert found.variance.equal(torch.full((2, 3, 3), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("solver", build.names("solver"))
@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
def test_every_wrapper_goes_with_every_solver(schedule, solver):
    walk = build.solver(Part.model_validate({"name": solver}))
    grid = trailing if schedule == FEW["flow"] else karras
    times, like = grid(schedule, 8), torch.empty(2, 3, 3, dtype=torch.float64)

    def sampled(denoise) -> Tensor:
        noise = ImageNoise(3, torch.tensor([5, 900]))
        return final(trajectory(denoise, schedule, walk, times, noise, like))

    plain = sampled(mixture(schedule).conditional)
    for name, wrap in WRAPPERS.items():
        found = sampled(wrap(mixture(schedule), schedule))
        assert found.isfinite().all(), name
        assert found.equal(plain) == (name == "none"), name


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_image_is_the_same_to_the_last_bit_in_batches_of_64_7_and_1(wrap):
    schedule = discrete.linear()
    times = trailing(schedule, 4)

    def sampled(numbers: Tensor) -> Tensor:
        noise, like = ImageNoise(3, numbers), torch.empty(len(numbers), 3, 5, 3)
        denoise = wrap(mixture(schedule), schedule)
        return final(trajectory(denoise, schedule, heun, times, noise, like))

    together = sampled(torch.arange(64))
    assert sampled(torch.arange(7)).equal(together[:7])
    assert sampled(torch.tensor([11])).equal(together[[11]])


# Sides


@pytest.mark.parametrize("t", [scalar(500.0), torch.tensor([1.0, 1000.0, 40.0]).double()])
def test_both_sides_in_one_forward_pass_equal_two_separate_calls(t):
    denoiser, x_t = told(discrete.linear()), images(3, 3, 4, 4)
    batches = []

    def watched(x: Tensor, t: Tensor, cond: Tensor) -> Prediction:
        batches.append(len(x))
        return denoiser(x, t, cond)

    pair = sides(watched, torch.tensor([2, 0, 1]), torch.tensor([3, 3, 3]))
    both = pair.both(x_t, t)
    assert batches == [6]
    for found, cond in zip(both, ([2, 0, 1], [3, 3, 3]), strict=True):
        for ours, theirs in zip(found, denoiser(x_t, t, torch.tensor(cond)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for side, cond in ((pair.conditional, [2, 0, 1]), (pair.unconditional, [3, 3, 3])):
        assert side(x_t, t).x_0.equal(denoiser(x_t, t, torch.tensor(cond)).x_0)


def test_both_sides_of_a_network_without_learned_variance_have_none():
    schedule = discrete.linear()
    cond = torch.zeros(2)
    both = sides(lambda x, t, cond: gaussian(schedule)(x, t), cond, cond).both(
        images(2, 3), scalar(9.0)
    )
    assert [side.variance for side in both] == [None, None]


# Classifier-free guidance


@pytest.mark.parametrize("guidance", [classifier_free, projected])
def test_scale_1_is_the_conditional_bit_for_bit_with_one_forward(guidance):
    schedule, x, t = discrete.linear(), images(2, 4, 3, 3), scalar(500.0)
    pair = counted(schedule)
    found = guidance(pair, schedule, scale=1.0)(x, t)
    assert asked(pair) == [1, 0]
    assert all(a.equal(b) for a, b in zip(found, pair.conditional(x, t), strict=True))


def test_scale_0_is_the_unconditional_bit_for_bit_with_one_forward():
    schedule, x, t = discrete.linear(), images(2, 4, 3, 3), scalar(500.0)
    pair = counted(schedule)
    found = classifier_free(pair, schedule, scale=0.0)(x, t)
    assert asked(pair) == [0, 1]
    assert all(a.equal(b) for a, b in zip(found, pair.unconditional(x, t), strict=True))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 7.5])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guidance_moves_every_channel_of_image_and_noise_from_unconditional_to_conditional(
    scale, channels
):
    schedule, x, t = discrete.linear(), images(2, channels, 3, 3), scalar(500.0)
    pair = counted(schedule)
    found = classifier_free(pair, schedule, scale=scale)(x, t)
    c, u = pair.both(x, t)
    w = scale - 1  # Ho & Salimans 2022, Eq. 6
    torch.testing.assert_close(found.x_0, (1 + w) * c.x_0 - w * u.x_0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.eps, (1 + w) * c.eps - w * u.eps, rtol=1e-12, atol=1e-12)
    assert found.variance.equal(c.variance)


@pytest.mark.parametrize("guidance", [classifier_free, projected])
def test_outside_its_interval_guidance_is_the_conditional_with_one_forward(guidance):
    schedule, x = edm.edm(), images(2, 3)
    for sigma, inside in ((0.2, False), (0.3, True), (5.0, True), (5.1, False)):
        pair, t = counted(schedule), scalar(sigma)
        found = guidance(pair, schedule, scale=3.0, sigma_min=0.2, sigma_max=5.0)(x, t)
        assert asked(pair) == [1, int(inside)]
        full = guidance(counted(schedule), schedule, scale=3.0)(x, t)
        assert found.x_0.equal(full.x_0 if inside else pair.conditional(x, t).x_0)


def test_the_interval_holds_for_each_image_where_images_have_times_of_their_own():
    schedule, x, pair = edm.edm(), images(3, 2), counted(edm.edm())
    t = torch.tensor([0.1, 1.0, 50.0], dtype=torch.float64)
    found = classifier_free(pair, schedule, scale=3.0, sigma_min=0.2, sigma_max=5.0)(x, t)
    full = classifier_free(pair, schedule, scale=3.0)(x, t)
    plain = pair.conditional(x, t)
    for part in ("x_0", "eps"):
        ours, all_guided, unguided = (getattr(p, part) for p in (found, full, plain))
        assert ours.equal(torch.stack((unguided[0], all_guided[1], unguided[2])))


def test_scale_0_stays_within_its_interval():
    schedule, x, pair = edm.edm(), images(2, 3), counted(edm.edm())
    guided = classifier_free(pair, schedule, scale=0.0, sigma_max=5.0)
    assert guided(x, scalar(10.0)).x_0.equal(pair.conditional(x, scalar(10.0)).x_0)
    assert guided(x, scalar(1.0)).x_0.equal(pair.unconditional(x, scalar(1.0)).x_0)


def test_rescaling_brings_each_images_standard_deviation_back_to_the_conditionals():
    """Lin et al. 2023, Sec. 3.4: their mean is rescaled with the image, not kept."""
    schedule, x, t = discrete.linear(), images(4, 3, 5, 5), scalar(400.0)
    pair = mixture(schedule)
    c, u = pair.both(x, t)
    plain = u.x_0 + 5 * (c.x_0 - u.x_0)

    def std(x_0: Tensor) -> Tensor:
        return x_0.flatten(1).std(1)

    for phi in (0.3, 1.0):
        found = classifier_free(pair, schedule, scale=5.0, rescale=phi)(x, t).x_0
        expected = phi * std(c.x_0) + (1 - phi) * std(plain)
        torch.testing.assert_close(std(found), expected, rtol=1e-12, atol=0)
        factor = (std(found) / std(plain)).reshape(4, 1, 1, 1)
        torch.testing.assert_close(found, factor * plain, rtol=1e-12, atol=1e-12)


# Projected guidance


def test_projected_guidance_that_keeps_the_parallel_part_is_classifier_free():
    schedule, x, t = discrete.linear(), images(4, 3, 5, 5), scalar(400.0)
    pair = mixture(schedule)
    found = projected(pair, schedule, scale=5.0, parallel=1.0)(x, t)
    expected = classifier_free(pair, schedule, scale=5.0)(x, t)
    torch.testing.assert_close(found.x_0, expected.x_0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.eps, expected.eps, rtol=1e-12, atol=1e-12)


def test_projected_guidance_is_sadat_et_al_algorithm_1():
    """For three evaluations in turn, image by image."""
    schedule, pair = discrete.linear(), mixture(discrete.linear())
    scale, eta, r, beta = 4.0, 0.3, 1.5, -0.5
    guided = projected(pair, schedule, scale=scale, parallel=eta, norm=r, momentum=beta)
    running, clipped = torch.zeros(4, 12, dtype=torch.float64), []
    for n, time in enumerate((600.0, 500.0, 300.0)):
        x, t = images(4, 3, 2, 2, seed=n), scalar(time)
        c, u = (side.x_0.flatten(1) for side in pair.both(x, t))
        running = (c - u) + beta * running
        found = guided(x, t).x_0.flatten(1)
        for j in range(4):
            length = running[j].norm()
            clipped.append(bool(length > r))
            difference = running[j] * min(1.0, r / length.item())
            direction = c[j] / c[j].norm()
            along = (difference @ direction) * direction
            expected = c[j] + (scale - 1) * (difference - along + eta * along)
            torch.testing.assert_close(found[j], expected, rtol=1e-12, atol=1e-12)
    assert {True, False} == set(clipped)  # both cases of the norm were met


def test_projected_guidance_of_an_image_without_direction_is_classifier_free():
    """As an average of 0 is, which is what a network may say of pure noise."""
    schedule, x, t = flow.flow(), images(4, 3), scalar(1.0)
    pair = apart(gaussian(schedule), mixture(schedule).conditional)
    assert pair.conditional(x, t).x_0.equal(torch.zeros_like(x))
    found, expected = (
        guide(pair, schedule, scale=3.0)(x, t) for guide in (projected, classifier_free)
    )
    torch.testing.assert_close(found.x_0, expected.x_0, rtol=1e-12, atol=1e-12)


# Classifier guidance


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_guiding_the_unconditional_by_an_exact_classifier_is_the_exact_conditional(schedule):
    """Two classes, N(±1, 0.5²): by Bayes' rule the scores of p(x | y) and p(x)·p(y | x) agree."""

    def total(t: Tensor) -> Tensor:
        at = schedule(t)
        return (0.5 * at.alpha) ** 2 + at.sigma**2

    def of_class(x_t: Tensor, t: Tensor, mean: int) -> Tensor:
        at = schedule(t)
        return mean + at.alpha * 0.25 / total(t) * (x_t - mean * at.alpha)

    def log_prob(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(2 * schedule(t).alpha * x_t / total(t)).flatten()

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        at, p = schedule(t), log_prob(x_t, t).exp()[:, None]
        x_0 = p * of_class(x_t, t, 1) + (1 - p) * of_class(x_t, t, -1)
        return Prediction(x_0, (x_t - at.alpha * x_0) / at.sigma)

    guided = classifier_guided(denoise, schedule, log_prob, scale=1.0)
    for t in several_times(schedule)[:-1:11]:
        x_t = schedule(t).alpha * images(50, 1).sign() + schedule(t).sigma * images(50, 1, seed=1)
        with torch.inference_mode():
            found = guided(x_t, t)
        torch.testing.assert_close(found.x_0, of_class(x_t, t, 1), rtol=1e-7, atol=1e-7)
        assert not found.x_0.requires_grad


def test_classifier_guidance_leaves_pure_noise_as_it_is():
    schedule, x = flow.flow(), images(2, 3)
    guided = classifier_guided(
        two_points(schedule), schedule, lambda x, t: x.flatten(1).sum(1), scale=9.0
    )
    found, plain = guided(x, scalar(1.0)), two_points(schedule)(x, scalar(1.0))
    assert found.x_0.equal(plain.x_0)
    assert found.eps.equal(plain.eps)


# Thresholds


@pytest.mark.parametrize("threshold", [clipping, dynamic_thresholding])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_thresholds_hold_x_0_in_range(schedule, threshold):
    t = several_times(schedule)[::7]
    denoise = gaussian(schedule, std=2.0)
    found = threshold(denoise, schedule, low=LOW, high=HIGH)(3 * images(len(t), 3), t)
    assert found.x_0.abs().max() == 1


@pytest.mark.parametrize("threshold", [clipping, dynamic_thresholding])
def test_thresholds_change_nothing_inside_the_range(threshold):
    schedule, x_t, t = discrete.linear(), images(5, 3), scalar(300.0)
    denoise = gaussian(schedule, 0.1)
    found, plain = threshold(denoise, schedule, low=LOW, high=HIGH)(x_t, t), denoise(x_t, t)
    assert found.x_0.equal(plain.x_0)
    torch.testing.assert_close(found.eps, plain.eps, rtol=1e-12, atol=1e-12)


def test_clipping_has_a_range_for_each_channel():
    """As pixels that were normalised by each channel's own mean and standard deviation."""
    schedule, x_t, t = discrete.linear(), 5 * images(4, 3, 2, 2), scalar(10.0)
    low = torch.tensor([-1.0, -2.0, -0.5]).reshape(3, 1, 1)
    high = torch.tensor([1.0, 0.5, 2.0]).reshape(3, 1, 1)
    denoise = gaussian(schedule, std=2.0)
    found = clipping(denoise, schedule, low=low, high=high)(x_t, t).x_0
    for n, plain in enumerate(denoise(x_t, t).x_0.unbind(1)):
        assert found[:, n].equal(plain.clamp(low[n].item(), high[n].item()))


def test_dynamic_thresholding_is_saharia_et_al_section_2_3_in_each_channels_range():
    """Pixels v in [-1, 1], normalised per channel: clip v to ±s, divide by s, s = max(1, |v|_p)."""
    schedule, x_t, t = discrete.linear(), 3 * images(4, 3, 4, 4), scalar(10.0)
    mean = torch.tensor([0.1, -0.3, 0.5], dtype=torch.float64).reshape(3, 1, 1)
    std = torch.tensor([0.9, 0.5, 1.5], dtype=torch.float64).reshape(3, 1, 1)
    x_t[3] = 0  # one image that lies in range
    denoise = gaussian(schedule, std=2.0)
    found = dynamic_thresholding(
        denoise, schedule, low=(-1 - mean) / std, high=(1 - mean) / std, percentile=0.9
    )(x_t, t).x_0
    pixels = denoise(x_t, t).x_0 * std + mean
    for n in range(4):
        s = max(1.0, pixels[n].abs().quantile(0.9).item())
        assert (s > 1) == (n < 3)
        expected = (pixels[n].clamp(-s, s) / s - mean) / std
        torch.testing.assert_close(found[n], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (partial(classifier_free, rescale=1.5), "rescale in 0 .. 1, not 1.5"),
        (partial(projected, norm=0.0), "not norm=0, momentum=0"),
        (partial(projected, momentum=1.0), "not norm=inf, momentum=1"),
    ],
)
def test_guidance_refuses_options_that_mean_nothing(wrap, message):
    with pytest.raises(ConfigError, match=message):
        wrap(counted(edm.edm()), edm.edm(), scale=3.0)


@pytest.mark.parametrize("percentile", [0.0, 99.5, math.nan])
def test_dynamic_thresholding_refuses_a_percentile_that_is_no_fraction(percentile):
    with pytest.raises(ConfigError, match=f"at most 1, not {percentile:g}"):
        dynamic_thresholding(
            gaussian(edm.edm()), edm.edm(), low=LOW, high=HIGH, percentile=percentile
        )


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
        inside.append(torch.is_inference_mode_enabled() and x_t.is_inference())
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
