"""Variations, inpainting and interpolation: their ends, their laws, and an exact Gaussian."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from oracles import Counted, final, gaussian, images, scalar, two_points
from torch import Tensor

from rediffuse import build
from rediffuse.config.schema import Part
from rediffuse.editing import Interpolated, image_to_image, inpaint, slerp
from rediffuse.errors import ConfigError
from rediffuse.grids import karras, trailing
from rediffuse.process import Prediction, diffuse
from rediffuse.randomness import ImageNoise
from rediffuse.sampling import trajectory
from rediffuse.schedules import discrete, edm, flow
from rediffuse.solvers.ancestral import ancestral
from rediffuse.solvers.ddim import ddim
from rediffuse.solvers.dpmpp_2m import dpmpp_2m
from rediffuse.solvers.euler import euler
from rediffuse.solvers.heun import heun

FEW = {"linear": discrete.linear(), "edm": edm.edm(), "flow": flow.flow()}
NUMBERS = torch.tensor([5, 900])
SOLVERS = build.names("solver")


def keyed(numbers: Tensor = NUMBERS) -> ImageNoise:
    return ImageNoise(3, numbers)


def setting(schedule, solver: str, steps: int = 8, numbers: Tensor = NUMBERS):
    """Everything but the image, in the order of the functions' arguments."""
    grid = trailing if schedule == FEW["flow"] else karras
    walk = build.solver(Part.model_validate({"name": solver}))
    return two_points(schedule), schedule, walk, grid(schedule, steps), keyed(numbers)


def half(shape: tuple[int, ...]) -> Tensor:
    """A mask that gives the first two columns."""
    mask = torch.zeros(shape)
    mask[..., :2] = 1
    return mask


# Image to image


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
def test_strength_1_is_plain_sampling_bit_for_bit(schedule, solver):
    x_0 = images(2, 3, 3)
    plain = list(trajectory(*setting(schedule, solver), torch.empty_like(x_0)))
    found = list(image_to_image(*setting(schedule, solver), x_0, strength=1.0))
    assert all(one.equal(other) for one, other in zip(found, plain, strict=True))


def test_strength_0_is_the_image_itself():
    x_0 = images(2, 3, 3)
    (found,) = image_to_image(*setting(edm.edm(), "heun"), x_0, strength=0.0)
    assert found.equal(x_0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
@pytest.mark.parametrize(("strength", "left"), [(0.24, 2), (0.5, 4), (0.9, 7)])
def test_strength_is_the_share_of_steps_that_solve_from_the_noised_image(
    schedule, solver, strength, left
):
    x_0 = images(2, 3, 3).clamp(-1, 1)
    denoise, clock, walk, times, noise = setting(schedule, solver)
    found = final(image_to_image(denoise, clock, walk, times, noise, x_0, strength=strength))
    again, rest = keyed(), times[8 - left :]
    x = diffuse(schedule, x_0, again(x_0), rest[0])
    assert found.equal(final(walk(denoise, schedule, x, rest, again)))


def test_less_strength_stays_closer_to_the_image():
    schedule, x_0 = discrete.linear(), images(64, 1, 3).sign()
    times, numbers = trailing(schedule, 20), torch.arange(64)

    def kept(strength: float) -> float:
        at = two_points(schedule), schedule, ancestral, times, keyed(numbers)
        return (final(image_to_image(*at, x_0, strength=strength)) == x_0).double().mean().item()

    weak, middle, strong = (kept(strength) for strength in (0.1, 0.3, 1.0))
    assert weak > 0.95 > middle > strong
    assert strong == pytest.approx(0.5, abs=4 * 0.5 / 192**0.5)  # nothing is left of the image


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ConfigError, match=f"from 0 to 1, not {strength:g}"):
        next(image_to_image(*setting(edm.edm(), "heun"), images(2, 3), strength=strength))


# Inpainting


@pytest.mark.parametrize(
    "options", [{}, {"resamplings": 2}, {"resamplings": 2, "jump": 3}], ids=str
)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
def test_given_pixels_end_equal_to_the_last_bit_and_the_rest_is_painted(schedule, solver, options):
    known = 0.3 * images(2, 3, 4)
    mask = half((3, 4))
    found = final(inpaint(*setting(schedule, solver), known, mask, **options))
    assert found[..., :2].equal(known[..., :2])
    assert found.isfinite().all()
    assert (found[..., 2:] - known[..., 2:]).abs().min() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
def test_inpainting_without_given_pixels_is_plain_sampling(schedule, solver):
    """The rounding of ε, which is computed anew, is all that differs."""
    known = images(2, 3, 4)
    plain = list(trajectory(*setting(schedule, solver), known))
    found = list(inpaint(*setting(schedule, solver), known, torch.zeros(3, 4)))
    assert len(found) == len(plain) == 8
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("resamplings", "jump"), [(2, 1), (3, 1), (3, 2), (2, 3), (2, 4), (2, 99)])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_resampling_walks_all_steps_but_the_last_that_often(steps, resamplings, jump):
    denoise, schedule, walk, times, noise = setting(discrete.linear(), "euler", steps)
    counted, known = Counted(denoise), images(2, 3, 4)
    painted = inpaint(
        *(counted, schedule, walk, times, noise),
        *(known, half((3, 4))),
        resamplings=resamplings,
        jump=jump,
    )
    states = len(list(painted))
    assert counted.evaluations == states == resamplings * (steps - 1) + 1


def test_a_jump_is_walked_down_and_up_again_as_one():
    denoise, schedule, walk, times, noise = setting(discrete.linear(), "euler", 8)
    known, asked = images(2, 3, 4), []

    def watched(x_t: Tensor, t: Tensor) -> Prediction:
        asked.append(times.tolist().index(t.item()))
        return denoise(x_t, t)

    at = watched, schedule, walk, times, noise
    final(inpaint(*at, known, half((3, 4)), resamplings=2, jump=3))
    assert asked == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 6, 7]


@pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)
def test_repaint_is_lugmayr_et_al_algorithm_1(schedule):
    """With ancestral sampling's own step in the place of their lines 5 and 6."""
    _, _, _, times, noise = setting(schedule, "ancestral", 4)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        """Every painted pixel depends on a given one."""
        x_0 = (x_t + x_t.flip(-1)).tanh()
        return Prediction(x_0, (x_t - schedule(t).alpha * x_0) / schedule(t).sigma)

    known, mask, drawn = images(2, 3, 4).sign(), half((3, 4)), keyed()
    at = denoise, schedule, ancestral, times, noise
    found = final(inpaint(*at, known, mask, resamplings=3))

    x = schedule(times[0]).sigma * drawn(known)
    for t, s in pairwise(times[:-1]):
        now, then = schedule(t), schedule(s)
        kept = now.alpha / then.alpha
        for u in range(3):
            unknown = final(ancestral(denoise, schedule, x, torch.stack((t, s)), drawn))
            x = mask * (then.alpha * known + then.sigma * drawn(known)) + (1 - mask) * unknown
            if u < 2:
                beta = now.sigma**2 - kept**2 * then.sigma**2
                x = kept * x + beta.sqrt() * drawn(known)
    x = mask * known + (1 - mask) * denoise(x, times[-2]).x_0
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def correlated(schedule, covariance: Tensor):
    """E[x_0 | x_t] for two pixels of one Gaussian."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        at = schedule(t)
        total = at.alpha**2 * covariance + at.sigma**2 * torch.eye(2, dtype=torch.float64)
        x_0 = x_t @ torch.linalg.solve(total, at.alpha * covariance)
        return Prediction(x_0, (x_t - at.alpha * x_0) / at.sigma)

    return denoise


def test_resampling_brings_inpainting_to_the_exact_conditional_of_a_gaussian():
    """x = (a, b) with correlation 0.9: given a = 1.5, b has mean 1.35 and variance 0.19."""
    schedule, n = edm.edm(), 2000
    denoise = correlated(schedule, torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64))
    known = torch.tensor([[1.5, 0.0]], dtype=torch.float64).expand(n, 2)

    def painted(resamplings: int) -> Tensor:
        at = denoise, schedule, heun, karras(schedule, 25), keyed(torch.arange(n))
        mask = torch.tensor([1.0, 0.0])
        return final(inpaint(*at, known, mask, resamplings=resamplings))[:, 1]

    once, some, many = (painted(resamplings) for resamplings in (1, 4, 40))
    assert once.mean() < 0.7  # replacement alone does not make the two pixels fit together
    assert 0.9 < some.mean() < 1.25
    # 3 standard errors of 2,000 images
    assert many.mean().item() == pytest.approx(1.35, abs=3 * (0.19 / n) ** 0.5)
    assert many.var().item() == pytest.approx(0.19, abs=3 * 0.19 * (2 / n) ** 0.5)


@pytest.mark.parametrize(("resamplings", "jump"), [(0, 1), (1, 0)])
def test_inpainting_that_never_walks_is_refused(resamplings, jump):
    at, known = setting(edm.edm(), "heun"), images(2, 3)
    with pytest.raises(ConfigError, match=f"not resamplings={resamplings}, jump={jump}"):
        next(inpaint(*at, known, half((3,)), resamplings=resamplings, jump=jump))


# Interpolation


def test_slerp_is_shoemakes_formula_image_by_image():
    a, b = images(3, 2, 4), images(3, 2, 4, seed=1)
    weight = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    found = slerp(a, b, weight)
    for n, w in enumerate(weight):
        one, other = a[n].flatten(), b[n].flatten()
        angle = (one @ other / (one.norm() * other.norm())).acos()
        expected = (((1 - w) * angle).sin() * a[n] + (w * angle).sin() * b[n]) / angle.sin()
        torch.testing.assert_close(found[n], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slerp(a, b, w.item())[n], expected, rtol=1e-12, atol=1e-12)


def test_slerp_keeps_the_length_of_equally_long_images_and_divides_the_angle():
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (images(5, 8), images(5, 8, seed=1)))
    third = slerp(a, b, scalar(1 / 3))
    torch.testing.assert_close(third.norm(dim=1), torch.ones(5).double(), rtol=1e-12, atol=0)
    angle, part = ((a * x).sum(1).acos() for x in (b, third))
    torch.testing.assert_close(part, angle / 3, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_ends_on_its_ends_to_the_last_bit(dtype):
    a, b = images(50, 3, 8).to(dtype), images(50, 3, 8, seed=1).to(dtype)
    a[:10] = b[:10]
    a[10:20] = 1.7 * b[10:20]
    b[20:30] = 0
    assert slerp(a, b, 0.0).equal(a)
    assert slerp(a, b, 1.0).equal(b)


def test_slerp_is_straight_between_parallel_images():
    a = images(4, 6)
    b = torch.stack((a[0], 2 * a[1], -a[2], torch.zeros(6, dtype=torch.float64)))
    torch.testing.assert_close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [*SOLVERS, partial(ddim, eta=1.0), partial(heun, churn=40.0)])
def test_interpolation_ends_on_the_plain_samples_bit_for_bit(solver):
    """At every draw, or stochastic solvers would end somewhere else."""
    schedule = discrete.linear()
    walk = (
        build.solver(Part.model_validate({"name": solver})) if isinstance(solver, str) else solver
    )
    times, like = trailing(schedule, 6), torch.empty(3, 2, 4)

    def sampled(noise) -> Tensor:
        return final(trajectory(gaussian(schedule), schedule, walk, times, noise, like))

    def of(number: int) -> ImageNoise:
        return keyed(torch.full((3,), number))

    weight = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    found = sampled(Interpolated(of(5), of(900), weight))
    first, last = sampled(of(5))[0], sampled(of(900))[0]
    assert found[0].equal(first)
    assert found[2].equal(last)
    assert not found[1].allclose(first)
    assert not found[1].allclose(last)


# All of them


WAYS = {
    "image_to_image": lambda at, x: image_to_image(*at, x, strength=0.5),
    "inpaint": lambda at, x: inpaint(*at, x, half((3, 4))),
    "repaint": lambda at, x: inpaint(*at, x, half((3, 4)), resamplings=2, jump=2),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("solver", [ancestral, dpmpp_2m, partial(heun, churn=40.0)])
def test_an_edited_image_is_the_same_to_the_last_bit_in_batches_of_64_7_and_1(way, solver):
    schedule, given = discrete.linear(), images(64, 3, 4).float()

    def edited(numbers: Tensor) -> Tensor:
        at = gaussian(schedule), schedule, solver, trailing(schedule, 5), keyed(numbers)
        return final(way(at, given[numbers]))

    together = edited(torch.arange(64))
    assert together.dtype == torch.float32
    assert edited(torch.arange(7)).equal(together[:7])
    assert edited(torch.tensor([11])).equal(together[[11]])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_editing_computes_in_inference_mode_and_never_leaks_it(way):
    schedule, inside = discrete.linear(), []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        inside.append(torch.is_inference_mode_enabled())
        return gaussian(schedule)(x_t, t)

    at = denoise, schedule, euler, trailing(schedule, 6), keyed()
    for state in way(at, images(2, 3, 4).requires_grad_()):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert not state.requires_grad
    assert set(inside) == {True}
