"""Objectives: literal formulas, what each one teaches, and what each one refuses."""

import math
from functools import partial

import pytest
import torch
from oracles import CONTINUOUS, Says, SmallNetwork, about, images, scalar, several_times
from torch import Tensor, nn

from rediffuse import losses, targets, weightings
from rediffuse.denoiser import Denoiser
from rediffuse.errors import ConfigError
from rediffuse.grids import trailing
from rediffuse.likelihood import bound
from rediffuse.losses import Noised
from rediffuse.process import Schedule, diffuse
from rediffuse.randomness import ImageNoise
from rediffuse.schedules import discrete
from rediffuse.weightings import min_snr, unit

CHAIN = discrete.linear(steps=100)
PLAIN = {"simple": losses.simple, "l1": losses.l1, "huber": losses.huber}
OF_THE_BOUND = {"hybrid": losses.hybrid, "bound": losses.bound}
OBJECTIVES = PLAIN | OF_THE_BOUND


def noised(schedule: Schedule, t: Tensor, channels: int = 3) -> Noised:
    shape = (len(t), channels, 2, 2)
    x_0, eps = images(*shape, seed=1).clamp(-1, 1), images(*shape, seed=2)
    return Noised(x_0, eps, diffuse(schedule, x_0, eps, t), t)


def network(learned_variance: bool) -> nn.Module:
    """A real network with gradients, for 3 channels; its variance channels depend on x and t."""
    core = SmallNetwork()
    if learned_variance:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            core.last = nn.Linear(8, 6).double()
    return core.requires_grad_()


def denoiser(learned_variance: bool = False, target=targets.eps, schedule=CHAIN) -> Denoiser:
    return Denoiser(network(learned_variance), schedule, target)


class Learned(nn.Module):
    """A weighting with one parameter."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(scalar(weight))

    def forward(self, schedule: Schedule, t: Tensor, target: targets.Target) -> Tensor:
        return self.weight.expand(t.shape)


@pytest.mark.parametrize(
    ("objective", "of_error"),
    [
        (losses.simple, lambda e: e**2),
        (losses.l1, abs),
        (losses.huber, lambda e: e**2 if abs(e) <= 1 else 2 * (abs(e) - 0.5)),
        (
            partial(losses.huber, delta=0.3),
            lambda e: 2 * (e**2 / 2 if abs(e) <= 0.3 else 0.3 * (abs(e) - 0.15)),
        ),
    ],
    ids=["simple", "l1", "huber", "huber_0.3"],
)
def test_a_plain_objective_is_its_formula_on_the_error_of_the_output(objective, of_error):
    batch = noised(CHAIN, several_times(CHAIN)[::30])
    found = objective(denoiser(target=targets.v), unit, batch)
    at = CHAIN(batch.t)
    alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in at)
    errors = network(False)(batch.x_t, batch.t) - (alpha * batch.eps - sigma * batch.x_0)
    literal = [sum(of_error(e) for e in row) / 12 for row in errors.flatten(1).tolist()]
    assert (errors.abs() > 1).any()
    assert (errors.abs() < 0.3).any()
    assert found.tolist() == about(literal)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_loss_of_an_image_does_not_depend_on_the_batch(objective):
    batch = noised(CHAIN, torch.tensor([1.0, 2.0, 50.0, 100.0] * 4, dtype=torch.float64))
    model = denoiser(learned_variance=True)
    whole = objective(model, min_snr, batch)
    halves = [
        objective(model, min_snr, Noised(*(part[rows] for part in batch[:4])))
        for rows in (slice(0, 8), slice(8, 16))
    ]
    assert whole.shape == (16,)
    assert whole.equal(torch.cat(halves))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_tells_the_network_its_class_and_its_last_estimate(objective):
    heard = []

    def spy(x: Tensor, label: Tensor, cond: Tensor) -> Tensor:
        heard.append((cond, x[:, 3:]))
        return 0 * x

    batch = noised(CHAIN, several_times(CHAIN)[::30])
    batch = batch._replace(cond=torch.arange(4), given=images(4, 3, 2, 2, seed=9))
    model = Denoiser(
        Says(spy), CHAIN, targets.eps, estimate_range=(torch.tensor(-9.0), torch.tensor(9.0))
    )
    objective(model, unit, batch)
    ((cond, given),) = heard
    assert cond.equal(batch.cond)
    assert given.equal(batch.given)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_weighting_that_learns_pays_for_a_small_weight(objective):
    """w·L - ln w is least at w = 1/L, where it is 1 + ln L."""
    batch = noised(CHAIN, torch.tensor([40.0], dtype=torch.float64))
    model = denoiser(learned_variance=True)
    rest = losses.hybrid(model, unit, batch).item() - losses.simple(model, unit, batch).item()
    rest = rest if objective is losses.hybrid else 0.0
    plain = objective(model, unit, batch).item() - rest
    best = Learned(1 / plain)
    found = objective(model, best, batch)
    found.sum().backward()
    assert found.item() == about(1 + math.log(plain) + rest)
    assert best.weight.grad.item() == pytest.approx(0, abs=1e-9 * plain)


@pytest.mark.parametrize("objective", PLAIN.values(), ids=PLAIN)
def test_a_weighting_without_a_parameter_multiplies(objective):
    batch, model = noised(CHAIN, several_times(CHAIN)[::30]), denoiser()
    plain, weighed = (objective(model, weighting, batch) for weighting in (unit, min_snr))
    torch.testing.assert_close(weighed, min_snr(CHAIN, batch.t, targets.eps) * plain)


# The bound


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_mean_of_the_bound_over_all_steps_is_the_likelihoods(learned_variance):
    chain, x_0 = discrete.cosine(steps=20), images(1, 3, 2, 2).clamp(-1, 1)
    model = denoiser(learned_variance, targets.v, chain)
    noise = ImageNoise(0, torch.arange(1))
    terms = bound(model, chain, x_0, trailing(chain, 20), noise, variance=0.3).terms

    noise, t = ImageNoise(0, torch.arange(1)), torch.arange(20, 0, -1, dtype=torch.float64)
    eps = torch.cat([noise(x_0) for _ in range(20)])
    all_x_0 = x_0.expand(20, 3, 2, 2)
    batch = Noised(all_x_0, eps, diffuse(chain, all_x_0, eps, t), t)
    found = losses.bound(model, unit, batch, variance=0.3)
    torch.testing.assert_close(found / 20, terms[:, 0], rtol=1e-9, atol=1e-9)
    assert found.mean().item() == about(terms.sum().item())


@pytest.mark.parametrize("target", [targets.eps, targets.x_0, targets.v])
def test_with_beta_as_variance_the_bound_teaches_what_the_vlb_weighting_does(target):
    """Ho et al. 2020, Eq. 12, in bits instead of nats; the first step has the decoder instead."""
    model, batch = denoiser(target=target), noised(CHAIN, several_times(CHAIN)[1::14])
    gradients = []
    for losses_of in (
        losses.bound(model, unit, batch, variance=1.0),
        losses.simple(model, weightings.vlb, batch) / math.log(2),
    ):
        model.network.zero_grad()
        losses_of.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.network.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_levels_that_lie_elsewhere_change_the_decoder_alone():
    model, batch = denoiser(), noised(CHAIN, torch.tensor([1.0, 2.0], dtype=torch.float64))
    plain, wide = (losses.bound(model, unit, batch, high=high) for high in (1.0, 3.0))
    assert plain[1] == wide[1]
    assert plain[0] > wide[0]  # wider levels are easier to hit


@pytest.mark.parametrize("objective", OF_THE_BOUND.values(), ids=OF_THE_BOUND)
def test_gradients_of_the_bound_are_finite_at_both_ends_in_float32(objective):
    chain = discrete.linear()
    model = denoiser(True, targets.v, chain)
    model.network.float()
    batch = noised(chain, torch.tensor([1.0, 2.0, 1000.0], dtype=torch.float64))
    batch = batch._replace(**{name: getattr(batch, name).float() for name in ("x_0", "eps", "x_t")})
    found = objective(model, unit, batch)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.network.parameters())


# The hybrid


def test_the_hybrid_is_the_simple_loss_and_a_thousandth_of_the_bound():
    model, batch = denoiser(learned_variance=True), noised(CHAIN, several_times(CHAIN)[::9])
    simple, bits = (objective(model, min_snr, batch) for objective in (losses.simple, losses.bound))
    bits = bits / min_snr(CHAIN, batch.t, targets.eps)
    torch.testing.assert_close(losses.hybrid(model, min_snr, batch), simple + 0.001 * bits)
    heavy = losses.hybrid(model, unit, batch, vlb_weight=2.0)
    torch.testing.assert_close(heavy, losses.simple(model, unit, batch) + 2 * bits)


def test_the_bound_of_the_hybrid_teaches_the_variance_and_nothing_else():
    """The output is a leaf here, so its gradient is seen before the network mixes the two."""
    batch = noised(CHAIN, several_times(CHAIN)[::9])
    said = images(len(batch.t), 6, 2, 2, seed=3).requires_grad_()
    model = Denoiser(Says(lambda *_: said), CHAIN, targets.eps)

    def gradient(objective) -> tuple[Tensor, Tensor]:
        (found,) = torch.autograd.grad(objective(model, unit, batch).sum(), said)
        return found.chunk(2, dim=1)

    hybrid, simple = gradient(losses.hybrid), gradient(losses.simple)
    assert hybrid[0].equal(simple[0])
    torch.testing.assert_close(hybrid[1], 0.001 * gradient(losses.bound)[1])
    assert (hybrid[1] != 0).all()


def test_the_hybrid_needs_a_network_that_learns_its_variance():
    batch = noised(CHAIN, several_times(CHAIN)[::30])
    with pytest.raises(ConfigError, match="learned_variance=true, or use objective=simple"):
        losses.hybrid(denoiser(), unit, batch)


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
@pytest.mark.parametrize("objective", OF_THE_BOUND.values(), ids=OF_THE_BOUND)
def test_the_bound_is_refused_where_there_are_no_steps(objective, schedule):
    batch = noised(schedule, several_times(schedule)[1::60])
    with pytest.raises(ConfigError, match="weighting=vlb with objective=simple"):
        objective(denoiser(True, targets.v, schedule), unit, batch)
