"""The chains and the solvers against diffusers' schedulers, step by step on one network and noise.

Each of their steps starts from our state, so that nothing accumulates. Their tables are float32,
which alone sets the tolerances; their clock is 0-based, so that our t is their t + 1.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from diffusers.schedulers import scheduling_ddpm
from oracles import SmallNetwork, images
from torch import Tensor

from rediffuse import targets
from rediffuse.denoiser import Denoiser
from rediffuse.grids import trailing
from rediffuse.schedules import discrete
from rediffuse.solvers.ancestral import ancestral
from rediffuse.solvers.ddim import ddim
from rediffuse.solvers.dpmpp_2m import dpmpp_2m
from rediffuse.solvers.euler import euler

# Their `set_timesteps` hands tensors to np.array, which numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NETWORK = SmallNetwork()
CHAINS = {
    "linear": (discrete.linear(), {"beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        discrete.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
    ),
    "cosine": (discrete.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}
TARGETS = {"epsilon": targets.eps, "v_prediction": targets.v, "sample": targets.x_0}
# Cosine leaves 1/20291 of the image: to read x_0 from ε there would magnify float32's last digit.
CASES = [("linear", "epsilon"), ("scaled_linear", "epsilon"), ("cosine", "v_prediction")]


class Step(NamedTuple):
    """One step of our walk, and what their scheduler needs to take it too; t is theirs."""

    n: int
    t: int
    x: Tensor
    output: Tensor
    drawn: Tensor
    after: Tensor


def walk(solver, reference, chain: str, prediction: str, steps: int) -> Iterator[Step]:
    """Take our steps, on the times that both agree about."""
    schedule = CHAINS[chain][0]
    times = trailing(schedule, steps)
    reference.set_timesteps(steps)
    assert reference.timesteps.tolist() == (times[:-1] - 1).tolist()

    x, noise = images(2, 3, 4, 4), images(steps, 2, 3, 4, 4, seed=1)
    draws = iter(noise)
    denoise = Denoiser(NETWORK, schedule, TARGETS[prediction])
    walked = solver(denoise, schedule, x, times, lambda _: next(draws))
    for n, after in enumerate(walked):
        yield Step(n, int(times[n]) - 1, x, NETWORK(x, times[n]), noise[n], after)
        x = after


def assert_same_step(ours: Tensor, theirs: Tensor, x: Tensor, tolerance: float = 2e-6) -> None:
    assert (ours - theirs).abs().max() <= tolerance * x.abs().max()


@pytest.mark.parametrize("name", CHAINS)
def test_the_tables_agree(name):
    schedule, config = CHAINS[name]
    reference = DDPMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(schedule.alpha_bar[1:], reference, rtol=0, atol=2e-6)
    # 1 - β in float32 has four digits left where cosine's last β is 0.999.
    torch.testing.assert_close(schedule.alpha_bar[1:], reference, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("chain", "prediction", "steps"),
    [("linear", "epsilon", 1000)] + [(*case, 50) for case in [*CASES, ("linear", "sample")]],
)
@pytest.mark.parametrize(
    ("variance_type", "variance"), [("fixed_small", 0.0), ("fixed_large", 1.0)]
)
def test_ancestral_is_their_ddpm(monkeypatch, variance_type, variance, chain, prediction, steps):
    reference = DDPMScheduler(
        **CHAINS[chain][1],
        variance_type=variance_type,
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    # β_t = 1 - ᾱ_t/ᾱ_s is a difference of near-equal numbers, the more so the shorter the step.
    tolerance = 1e-4 if steps == 1000 else 5e-6
    for step in walk(partial(ancestral, variance=variance), reference, chain, prediction, steps):
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda *_, drawn=step.drawn, **__: drawn
        )
        to = reference.step(step.output, step.t, step.x)
        # They add noise of variance β on the way to data, unless their last t is 0.
        noisy_end = variance_type == "fixed_large" and step.n == steps - 1 and steps < 1000
        theirs = to.pred_original_sample if noisy_end else to.prev_sample
        assert_same_step(step.after, theirs, step.x, tolerance)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("chain", "prediction"), CASES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_theirs(eta, chain, prediction, steps):
    reference = DDIMScheduler(
        **CHAINS[chain][1],
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    # With η = 1 and almost no image at T, 1 - ᾱ_s - σ² is a difference of near-equal numbers.
    tolerance = 1e-4 if (chain, eta) == ("cosine", 1.0) else 2e-6
    for step in walk(partial(ddim, eta=eta), reference, chain, prediction, steps):
        to = reference.step(step.output, step.t, step.x, eta=eta, variance_noise=step.drawn)
        assert_same_step(step.after, to.prev_sample, step.x, tolerance)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("chain", "prediction"), CASES)
def test_dpmpp_2m_is_their_second_order_midpoint_solver(chain, prediction, steps):
    reference = DPMSolverMultistepScheduler(
        **CHAINS[chain][1],
        prediction_type=prediction,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=False,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    for step in walk(dpmpp_2m, reference, chain, prediction, steps):
        to = reference.step(step.output, step.t, step.x)
        assert_same_step(step.after, to.prev_sample, step.x)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("chain", "prediction"), CASES)
def test_euler_is_theirs_which_walks_on_x_over_alpha(chain, prediction, steps):
    reference = EulerDiscreteScheduler(
        **CHAINS[chain][1], prediction_type=prediction, timestep_spacing="trailing"
    )
    schedule = CHAINS[chain][0]
    alpha = schedule(trailing(schedule, steps)).alpha
    tolerance = 2e-4 if chain == "cosine" else 2e-6  # their state there is 20291 times ours
    for step in walk(euler, reference, chain, prediction, steps):
        t = reference.timesteps[step.n]
        to = reference.step(step.output, t, step.x / alpha[step.n])
        assert_same_step(step.after, to.prev_sample * alpha[step.n + 1], step.x, tolerance)
