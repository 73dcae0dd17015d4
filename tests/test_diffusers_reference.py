"""The chains and the solvers against diffusers' schedulers, step by step on one network and noise.

Each of their steps starts from our state, so that nothing accumulates. Their tables and coefficients are
float32, which alone sets the tolerances; their clock is 0-based, ours t is their t + 1.
"""

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

NETWORK = SmallNetwork()
CHAINS = {
    "linear": (discrete.linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        discrete.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
    ),
    "cosine": (discrete.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}
TARGETS = {"epsilon": targets.eps, "v_prediction": targets.v, "sample": targets.x_0}


class Recorded:
    """Noise that is remembered, so that the reference adds the same."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def __call__(self, like: Tensor) -> Tensor:
        self.drawn.append(images(*like.shape, seed=100 + len(self.drawn)))
        return self.drawn[-1]


def walk(solver, schedule, target, steps: int, noise=None):
    """Yield (n, t, x, x after our step) along a walk of our solver; t is diffusers'."""
    times = trailing(schedule, steps)
    x = images(2, 3, 8, 8)
    states = solver(Denoiser(NETWORK, schedule, target), schedule, x, times, noise)
    for n, after in enumerate(states):
        yield n, int(times[n]) - 1, x, after
        x = after


@pytest.mark.parametrize("name", CHAINS)
def test_the_tables_agree(name):
    schedule, config = CHAINS[name]
    reference = DDPMScheduler(num_train_timesteps=1000, **config).alphas_cumprod.double()
    ours = schedule.alpha_bar[1:]
    # float32: half a unit in the last place of each of up to 1000 factors.
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours, reference, rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", [100, 50])
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize(("variance_type", "variance"), [("fixed_small", 0.0), ("fixed_large", 1.0)])
def test_ancestral_is_their_ddpm(monkeypatch, variance_type, variance, prediction, steps):
    schedule, config = CHAINS["linear"]
    reference = DDPMScheduler(
        **config,
        variance_type=variance_type,
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    reference.set_timesteps(steps)
    assert reference.timesteps.tolist() == (trailing(schedule, steps)[:-1] - 1).tolist()
    noise = Recorded()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise.drawn[-1])

    def solver(*arguments):
        return ancestral(*arguments, variance=variance)

    worst = 0
    for n, t, x, after in walk(solver, schedule, TARGETS[prediction], steps, noise):
        if n == steps - 1 and variance_type == "fixed_large" and t > 0:
            break  # they add noise of variance β on the way to data wherever their last t is not 0
        theirs = reference.step(NETWORK(x, torch.tensor([t + 1.0])), t, x).prev_sample
        worst = max(worst, (after - theirs).abs().max().item() / x.abs().max().item())
    print("WORST", worst)
    assert 0


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_theirs(eta, name, steps):
    schedule, config = CHAINS[name]
    reference = DDIMScheduler(
        **config, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    reference.set_timesteps(steps)
    noise = Recorded()
    worst = 0
    for _, t, x, after in walk(
        lambda *arguments: ddim(*arguments, eta=eta), schedule, targets.eps, steps, noise
    ):
        theirs = reference.step(
            NETWORK(x, torch.tensor([t + 1.0])), t, x, eta=eta,
            variance_noise=noise.drawn[-1] if noise.drawn else None,
        ).prev_sample  # fmt: skip
        worst = max(worst, (after - theirs).abs().max().item() / x.abs().max().item())
    print("WORST", worst)
    assert 0


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", CHAINS)
def test_dpmpp_2m_is_their_second_order_midpoint_solver(name, steps):
    schedule, config = CHAINS[name]
    reference = DPMSolverMultistepScheduler(
        **config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=False,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    reference.set_timesteps(steps)
    assert reference.timesteps.tolist() == (trailing(schedule, steps)[:-1] - 1).tolist()
    worst = 0
    for _, t, x, after in walk(dpmpp_2m, schedule, targets.eps, steps):
        theirs = reference.step(NETWORK(x, torch.tensor([t + 1.0])), t, x).prev_sample
        worst = max(worst, (after - theirs).abs().max().item() / x.abs().max().item())
    print("WORST", worst)
    assert 0


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", CHAINS)
def test_euler_is_theirs_which_walks_in_x_over_alpha(name, steps):
    schedule, config = CHAINS[name]
    reference = EulerDiscreteScheduler(**config, timestep_spacing="trailing")
    reference.set_timesteps(steps)
    worst = 0
    times = trailing(schedule, steps)
    for n, t, x, after in walk(euler, schedule, targets.eps, steps):
        now, then = schedule(times[n]).alpha, schedule(times[n + 1]).alpha
        theirs = reference.step(NETWORK(x, torch.tensor([t + 1.0])), reference.timesteps[n], x / now).prev_sample
        worst = max(worst, (after - theirs * then).abs().max().item() / x.abs().max().item())
    print("WORST", worst)
    assert 0
