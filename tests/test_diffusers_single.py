"""The single-step and stochastic solvers against diffusers' schedulers, step by step.

Both are given the same network and noise, and their tables are overwritten by ours in float64, so
that what remains is the method; their clock is 0-based, so that our t is their t + 1.
"""

from itertools import pairwise

import pytest
import torch
from diffusers import (
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    ScoreSdeVeScheduler,
)
from oracles import SmallNetwork, images, no_noise
from torch import Tensor

from rediffuse import targets
from rediffuse.denoiser import Denoiser
from rediffuse.grids import karras, trailing
from rediffuse.process import Schedule, between
from rediffuse.schedules import discrete, edm
from rediffuse.solvers.dpmpp_2s import dpmpp_2s
from rediffuse.solvers.euler_ancestral import euler_ancestral
from rediffuse.solvers.euler_maruyama import euler_maruyama
from rediffuse.solvers.heun import heun
from rediffuse.solvers.midpoint import midpoint
from rediffuse.solvers.predictor_corrector import predictor_corrector

# Their `set_timesteps` hands tensors to np.array, which numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types=dpmsolver. is deprecated:FutureWarning"),
]

NETWORK = SmallNetwork()
CHAIN, VE = discrete.linear(), edm.edm()


def ratio(schedule: Schedule, times: Tensor) -> Tensor:
    alpha, sigma = schedule(times)
    return sigma / alpha


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 40, 300])
@pytest.mark.parametrize(
    ("solver", "algorithm"), [(midpoint, "dpmsolver"), (dpmpp_2s, "dpmsolver++")]
)
def test_midpoint_and_dpmpp_2s_are_theirs_also_where_a_chain_has_no_exact_middle(
    solver, algorithm, prediction, steps
):
    target = {"epsilon": targets.eps, "v_prediction": targets.v}[prediction]
    times = trailing(CHAIN, steps)[:-1]  # both end with a step of first order
    middles = [between(CHAIN, t, s) for t, s in pairwise(times)]
    asked = torch.stack([t for pair in zip(times[:-1], middles, strict=True) for t in pair])
    asked = torch.cat((asked, times[-1:]))
    reference = DPMSolverSinglestepScheduler(
        solver_order=2,
        algorithm_type=algorithm,
        prediction_type=prediction,
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    reference.set_timesteps(2 * len(middles))
    reference.sigmas, reference.timesteps = ratio(CHAIN, asked), asked
    reference.order_list = [1, 2] * len(middles)

    x, compared = images(2, 3, 4, 4), 0
    walk = solver(Denoiser(NETWORK, CHAIN, target), CHAIN, x, times, no_noise)
    for n, found in enumerate(walk):
        theirs = x
        for t in asked[2 * n : 2 * n + 2]:
            theirs = reference.step(NETWORK(theirs, t), t, theirs).prev_sample
        torch.testing.assert_close(found, theirs, rtol=1e-8, atol=1e-9)
        x, compared = found, compared + 1
    assert compared == steps - 1


def test_heun_is_theirs():
    sigma = karras(VE, 12)
    reference = HeunDiscreteScheduler()
    reference.set_timesteps(12)
    reference.sigmas = torch.cat((sigma[:1], sigma[1:-1].repeat_interleave(2), sigma[-1:]))
    denoise, x = Denoiser(NETWORK, VE, targets.eps, 0.5), images(2, 3, 4, 4) * 80
    walk = heun(denoise, VE, x, sigma, no_noise)
    for n, found in enumerate(walk):
        t = reference.timesteps[2 * n]
        theirs = reference.step(denoise(x, sigma[n]).eps, t, x).prev_sample
        if n < 11:  # the step onto data is Euler's, theirs too
            eps = denoise(theirs, sigma[n + 1]).eps
            theirs = reference.step(eps, reference.timesteps[2 * n + 1], theirs).prev_sample
        torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-9)
        x = found
    assert n == 11


def test_midpoint_is_their_kdpm2():
    sigma = karras(VE, 12)
    reference = KDPM2DiscreteScheduler()
    reference.set_timesteps(12)
    middle = sigma.log().lerp(sigma.roll(1).log(), 0.5).exp()
    doubled = [
        torch.cat((table[:1], table[1:].repeat_interleave(2), table[-1:]))
        for table in (sigma, middle)
    ]
    reference.sigmas, reference.sigmas_interpol = doubled
    denoise, x = Denoiser(NETWORK, VE, targets.eps, 0.5), images(2, 3, 4, 4) * 80
    walk = midpoint(denoise, VE, x, sigma, no_noise)
    for n, found in enumerate(walk):
        if n == 11:  # theirs asks at σ = 0 where we go straight to data
            break
        t, inner = reference.timesteps[2 * n : 2 * n + 2]
        theirs = reference.step(denoise(x, sigma[n]).eps, t, x).prev_sample
        theirs = reference.step(denoise(theirs, middle[n + 1]).eps, inner, theirs).prev_sample
        torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-9)
        x = found
    assert n == 11


@pytest.mark.parametrize("steps", [10, 50])
def test_euler_ancestral_is_theirs_which_walks_on_x_over_alpha(steps):
    times = trailing(CHAIN, steps)
    alpha = CHAIN(times).alpha
    reference = EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    reference.set_timesteps(steps)
    assert reference.timesteps.tolist() == (times[:-1] - 1).tolist()
    reference.sigmas, reference.is_scale_input_called = ratio(CHAIN, times), True
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=ours, dtype=like.dtype)

    x = images(2, 3, 4, 4)
    denoise = Denoiser(NETWORK, CHAIN, targets.eps)
    for n, found in enumerate(euler_ancestral(denoise, CHAIN, x, times, noise)):
        output = NETWORK(x, times[n])
        t, at = reference.timesteps[n], (alpha[n], alpha[n + 1])
        expected = at[1] * reference.step(output, t, x / at[0], generator=theirs).prev_sample
        assert (found - expected).abs().max() < 2e-6 * x.abs().max()  # they step in float32
        x = found


def test_the_corrector_is_that_of_their_ve_sde():
    """Theirs takes norms' means over the batch: for one image that is the same."""
    sigma, x = karras(VE, 12)[:-1], images(1, 3, 4, 4) * 80
    reference, denoise = ve_sde(sigma), Denoiser(NETWORK, VE, targets.eps, 0.5)
    for n, step in enumerate(pairwise(sigma)):
        ends = []
        for corrections in (0, 1):
            draws = iter((images(1, 3, 4, 4, seed=n), drawn(x, n, torch.float32).double()))
            walk = predictor_corrector(
                denoise,
                VE,
                x,
                torch.stack(step),
                lambda _, d=draws: next(d),
                corrections=corrections,
            )
            ends.append(next(walk))
        predicted, x = ends
        score = -denoise(predicted, step[1]).eps / step[1]
        theirs = reference.step_correct(score, predicted, seeded(n)).prev_sample
        torch.testing.assert_close(x, theirs, rtol=1e-6, atol=1e-6)  # its norm is in float32


def test_euler_maruyama_is_their_ve_sde_but_for_h_squared_of_the_drift():
    """Of -(σ_t² - σ_s²)·ε/σ_t we take one half as (σ_s - σ_t)·ε, which lands on data exactly."""
    denoise, x = Denoiser(NETWORK, VE, targets.eps, 0.5), images(1, 3, 4, 4) * 2
    sigma, z = torch.tensor([2.0, 1.5], dtype=torch.float64), drawn(x, 0, x.dtype)
    eps = denoise(x, sigma[0]).eps
    found = next(euler_maruyama(denoise, VE, x, sigma, lambda _: z))
    theirs = ve_sde(sigma).step_pred(-eps / 2, torch.tensor(1.0), x, generator=seeded(0))
    torch.testing.assert_close(
        found, theirs.prev_sample - 0.5**2 / (2 * 2) * eps, rtol=1e-9, atol=1e-9
    )


def ve_sde(sigma: Tensor) -> ScoreSdeVeScheduler:
    reference = ScoreSdeVeScheduler(snr=0.16)
    reference.set_timesteps(len(sigma))
    reference.discrete_sigmas = sigma.flip(0)
    return reference


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(like: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(like.shape, generator=seeded(seed), dtype=dtype)
