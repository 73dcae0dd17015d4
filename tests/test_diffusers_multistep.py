"""The multistep solvers against diffusers' schedulers, step by step on one network and noise.

Their tables are overwritten by ours in float64, so that what remains is the method; their clock is
0-based, so that our t is their t + 1.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from oracles import SmallNetwork, images, no_noise
from torch import Tensor

from rediffuse import targets
from rediffuse.denoiser import Denoiser
from rediffuse.grids import trailing
from rediffuse.schedules import discrete
from rediffuse.solvers.deis import deis
from rediffuse.solvers.dpmpp_2m_sde import dpmpp_2m_sde
from rediffuse.solvers.dpmpp_3m import dpmpp_3m
from rediffuse.solvers.lms import lms
from rediffuse.solvers.pndm import pndm
from rediffuse.solvers.unipc import unipc

# They hand tensors to np.array and np.log, which numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
)

NETWORK = SmallNetwork()
CHAINS = {"linear": discrete.linear(), "cosine": discrete.cosine()}
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
TARGETS = {"epsilon": targets.eps, "v_prediction": targets.v}
# Cosine leaves 1/20291 of the image: to read x_0 from ε there would magnify the last digits.
CASES = [("linear", "epsilon"), ("linear", "v_prediction"), ("cosine", "v_prediction")]


def both(
    solver, reference, chain: str, prediction: str, steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Take our steps and theirs from the same x: our next one, theirs, and x."""
    schedule = CHAINS[chain]
    times = trailing(schedule, steps)
    reference.set_timesteps(steps)
    assert reference.timesteps.tolist() == (times[:-1] - 1).tolist()
    alpha, sigma = schedule(times)
    reference.sigmas = sigma / alpha
    reference.is_scale_input_called = True  # LMS would warn; all our states are scaled

    x, noise = images(2, 3, 4, 4), images(steps, 2, 3, 4, 4, seed=1)
    draws = iter(noise)
    denoise = Denoiser(NETWORK, schedule, TARGETS[prediction])
    walk = solver(denoise, schedule, x, times, lambda _: next(draws))
    stochastic = solver is dpmpp_2m_sde
    # LMS walks on x/α
    of_ours = alpha if isinstance(reference, LMSDiscreteScheduler) else torch.ones_like(alpha)
    for n, after in enumerate(walk):
        drawn = {"variance_noise": noise[n]} if stochastic else {}
        t, output = reference.timesteps[n], NETWORK(x, times[n])
        to = reference.step(output, t, x / of_ours[n], **drawn).prev_sample
        yield after, to * of_ours[n + 1], x
        x = after


def differences(steps: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[float]:
    """How far their steps are from ours, against the size of x."""
    return [((a - b).abs().max() / x.abs().max()).item() for a, b, x in steps]


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("chain", "prediction"), CASES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_theirs(order, chain, prediction, steps):
    for bh in (1, 2):
        reference = UniPCMultistepScheduler(
            solver_order=order,
            solver_type=f"bh{bh}",
            prediction_type=prediction,
            beta_schedule=BETAS[chain],
            timestep_spacing="trailing",
        )
        solver = partial(unipc, order=order, bh=bh)
        *inner, last = differences(both(solver, reference, chain, prediction, steps))
        assert max(inner) < 1e-9
        assert last < 1e-9 if bh == 2 else math.isnan(last)  # theirs ends on NaN with B(h) = h


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("chain", "prediction"), CASES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_theirs(order, chain, prediction, steps):
    reference = DEISMultistepScheduler(
        solver_order=order,
        prediction_type=prediction,
        beta_schedule=BETAS[chain],
        lower_order_final=False,
        timestep_spacing="trailing",
    )
    walk = both(partial(deis, order=order), reference, chain, prediction, steps)
    assert max(differences(islice(walk, steps - 1))) < 1e-9  # theirs would end before data


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_theirs_which_walks_on_x_over_alpha(order, steps):
    reference = LMSDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    reference.step = partial(reference.step, order=order)
    walk = both(partial(lms, order=order), reference, "linear", "epsilon", steps)
    assert max(differences(walk)) < 1e-9


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("chain", "prediction"), CASES)
@pytest.mark.parametrize(
    ("solver", "order", "kind", "algorithm"),
    [
        (dpmpp_3m, 3, "heun", "dpmsolver++"),
        (partial(dpmpp_2m_sde, eta=0.0), 2, "midpoint", "dpmsolver++"),
        (dpmpp_2m_sde, 2, "midpoint", "sde-dpmsolver++"),
    ],
)
def test_dpmpp_2m_sde_and_dpmpp_3m_are_theirs(
    solver, order, kind, algorithm, chain, prediction, steps
):
    reference = DPMSolverMultistepScheduler(
        solver_order=order,
        solver_type=kind,
        algorithm_type=algorithm,
        prediction_type=prediction,
        beta_schedule=BETAS[chain],
        lower_order_final=False,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    walk = both(solver, reference, chain, prediction, steps)
    assert max(differences(walk)) < 2e-6  # they step in float32


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("runge_kutta", [False, True])
def test_pndm_is_theirs(runge_kutta, steps):
    """Their evaluations are ours in another order: only the states between steps are compared."""
    schedule, x = CHAINS["linear"], images(2, 3, 4, 4)
    reference = PNDMScheduler(
        skip_prk_steps=not runge_kutta, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    reference.set_timesteps(steps)
    reference.alphas_cumprod = schedule.alpha_bar[1:]
    reference.final_alpha_cumprod = schedule.alpha_bar[0]
    theirs = []
    for t in reference.timesteps:
        x = reference.step(NETWORK(x, t + 1.0), int(t), x).prev_sample
        theirs.append(x)
    theirs = theirs[3:12:4] + theirs[12:] if runge_kutta else theirs[1:]

    times = trailing(schedule, steps)
    denoise = Denoiser(NETWORK, schedule, targets.eps)
    ours = list(
        pndm(denoise, schedule, images(2, 3, 4, 4), times, no_noise, runge_kutta=runge_kutta)
    )
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-9, atol=1e-9)
