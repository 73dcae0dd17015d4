"""Likelihoods: the bound against literal formulas and closed forms, the ODE against a density."""

import math

import pytest
import torch
from oracles import CHAINS, CONTINUOUS, SmallNetwork, about, gaussian, images, is_chain, scalar
from torch import Tensor

from rediffuse.denoiser import Denoiser
from rediffuse.errors import ConfigError
from rediffuse.grids import karras, trailing
from rediffuse.likelihood import (
    bits_per_dim,
    bound,
    dequantised,
    discretized_gaussian_log_likelihood,
    kl,
    ode_bits_per_dim,
    ode_log_likelihood,
    prior_term,
)
from rediffuse.process import Gaussian, Prediction
from rediffuse.randomness import ImageNoise, Stream
from rediffuse.schedules import discrete, edm
from rediffuse.targets import v

EXACT = CONTINUOUS | {"linear_1000": discrete.linear(), "cosine_1000": discrete.cosine()}


def levels(*shape: int, seed: int = 0) -> Tensor:
    """Images of N(0, 0.5²) whose values are among the 256 levels, as uint8 pixels are."""
    return (((images(*shape, seed=seed) / 2 + 1) * 127.5).round().clamp(0, 255)) / 127.5 - 1


def keyed(count: int) -> ImageNoise:
    return ImageNoise(0, torch.arange(count), Stream.LIKELIHOOD)


class Signs:
    """Noise of +1 and -1 in turn for two copies of each image: every quadratic mean is exact."""

    def __call__(self, like: Tensor) -> Tensor:
        sign = torch.ones_like(like)
        sign[1::2] = -1
        return sign


# The parts


def test_the_published_figures_of_the_discretized_gaussian():
    x = torch.tensor([[-1.0, -0.5, 0.0]], dtype=torch.float64)
    found = discretized_gaussian_log_likelihood(x, x + 0.01, scalar(-3.0))
    assert found[0].tolist() == about([-0.7953681086, -2.7883193577, -2.7883193577])


def test_the_published_figure_of_the_divergence_of_two_gaussians():
    p = Gaussian(scalar(0.3), scalar(-1.0))
    assert kl(p, Gaussian(scalar(0.1), scalar(-0.5))).item() == about(0.08623975527)
    assert kl(p, p).item() == 0


def test_the_published_prior_term_of_the_cosine_chain():
    x_0 = torch.linspace(-1, 1, 16, dtype=torch.float64)[None]
    found = prior_term(discrete.cosine(), x_0, scalar(1000.0))
    assert found.item() == about(6.6186e-10, rel=1e-5)  # published with five digits


def test_the_prior_is_where_sampling_starts_however_loud_that_is():
    x_0, sigma = images(2, 3), scalar(80.0)
    of_edm = (x_0 / sigma).square().mean(dim=1) / 2 / math.log(2)
    torch.testing.assert_close(prior_term(edm.edm(), x_0, sigma), of_edm, rtol=1e-9, atol=0)
    assert prior_term(CONTINUOUS["flow"], x_0, scalar(1.0)).tolist() == [0, 0]


@pytest.mark.parametrize("mean", [-1.3, 0.1, 0.998, 40.0])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 0.0, 4.0])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-2.0, 1.5)])
def test_the_256_levels_share_a_mass_of_1_and_the_tails_stay_finite(mean, log_scale, low, high):
    x = torch.linspace(low, high, 256, dtype=torch.float64)[None]
    found = discretized_gaussian_log_likelihood(
        x, scalar(mean), scalar(log_scale), low=low, high=high
    )
    assert found.isfinite().all()
    assert found.exp().sum().item() == about(1)


def test_levels_of_several_channels_may_lie_at_several_places():
    x = torch.tensor([-1.0, -2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    low, high = x[0], torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(2, 1, 1)
    of = discretized_gaussian_log_likelihood
    both = of(x, x, scalar(-3.0), low=low, high=high)
    each = [
        of(x[:, [c]], x[:, [c]], scalar(-3.0), low=low[c].item(), high=high[c].item())
        for c in (0, 1)
    ]
    assert both.equal(torch.cat(each, dim=1))


def test_the_gradient_of_the_decoder_is_finite_however_wrong_the_mean():
    x = torch.linspace(-1, 1, 6)[None]
    mean = (
        torch.tensor([-80.0, -1.0, 0.0, 1.0, 80.0])[:, None].expand(5, 6).clone().requires_grad_()
    )
    log_scale = torch.full_like(x, -5.0).requires_grad_()
    discretized_gaussian_log_likelihood(x.expand(5, 6), mean, log_scale).sum().backward()
    assert mean.grad.isfinite().all()
    assert log_scale.grad.isfinite().all()


# The bound


def literal_chain(betas: Tensor) -> dict[str, Tensor]:
    """The tables of Nichol & Dhariwal's chain, 0-based."""
    alpha_bar = (1 - betas).cumprod(0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    variance = betas * (1 - before) / (1 - alpha_bar)
    return {
        "alpha_bar": alpha_bar,
        "beta": betas,
        "log_beta": betas.log(),
        "log_beta_tilde": torch.cat((variance[1:2], variance[1:])).log(),
        "on_x_0": betas * before.sqrt() / (1 - alpha_bar),
        "on_x_t": (1 - before) * (1 - betas).sqrt() / (1 - alpha_bar),
    }


def literal_term(of: dict[str, Tensor], i: int, x_0, x_t, predicted_x_0, fraction) -> Tensor:
    """Bits per dimension of L_i, by Nichol & Dhariwal 2021, Eq. 4-6 and 15."""
    mean = of["on_x_0"][i] * predicted_x_0 + of["on_x_t"][i] * x_t
    log_var = fraction * of["log_beta"][i] + (1 - fraction) * of["log_beta_tilde"][i]
    if i == 0:
        deviation = (0.5 * log_var).exp()

        def cdf(x: Tensor) -> Tensor:
            z = (x - mean) / deviation
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        upper = torch.where(x_0 > 0.999, 1.0, cdf(x_0 + 1 / 255))
        lower = torch.where(x_0 < -0.999, 0.0, cdf(x_0 - 1 / 255))
        nats = -(upper - lower).log()
    else:
        true = of["on_x_0"][i] * x_0 + of["on_x_t"][i] * x_t
        gap = of["log_beta_tilde"][i] - log_var
        nats = 0.5 * (-1 - gap + gap.exp() + (true - mean) ** 2 * (-log_var).exp())
    return nats.mean(dim=1) / math.log(2)


@pytest.mark.parametrize("variance", [0.0, 0.3, 1.0, "learned"])
def test_the_bound_is_nichol_and_dhariwals(variance):
    schedule, x_0, fraction = discrete.linear(steps=100), levels(4, 3), images(4, 3).sigmoid()
    fraction = fraction if variance == "learned" else torch.full_like(fraction, variance)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        predicted = gaussian(schedule)(x_t, t)
        return predicted._replace(variance=fraction) if variance == "learned" else predicted

    # What counts where the network learned the fraction is the network's.
    given = 0.5 if variance == "learned" else variance
    found = bound(denoise, schedule, x_0, trailing(schedule, 100), keyed(4), variance=given)

    of, noise = literal_chain(10 * torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)), keyed(4)
    for n, i in enumerate(range(99, -1, -1)):
        at = of["alpha_bar"][i]
        x_t = at.sqrt() * x_0 + (1 - at).sqrt() * noise(x_0)
        predicted = denoise(x_t, scalar(i + 1.0)).x_0
        literal = literal_term(of, i, x_0, x_t, predicted, fraction)
        torch.testing.assert_close(found.terms[n], literal, rtol=1e-7, atol=1e-9)
    assert found.decoder.equal(found.terms[-1])
    torch.testing.assert_close(found.total, found.prior + found.terms.sum(dim=0))


def test_the_bound_on_a_strided_grid_is_that_of_the_respaced_chain():
    x_0, chain = levels(4, 3), discrete.cosine(steps=100)
    kept = chain.alpha_bar[::10]
    respaced = discrete.from_betas(1 - kept[1:] / kept[:-1])
    strided, whole = (
        bound(gaussian(schedule), schedule, x_0, trailing(schedule, 10), keyed(4))
        for schedule in (chain, respaced)
    )
    torch.testing.assert_close(strided.terms, whole.terms, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", EXACT.values(), ids=EXACT)
def test_the_expected_bound_of_an_exact_gaussian_is_its_closed_form(schedule):
    """E over ε of (x_0 - x̂_0)² is (1 - c·α)²·x_0² + c²·σ², c = 0.25·α/(0.25·α² + σ²)."""
    times = trailing(schedule, 20)
    x_0 = levels(1, 6).expand(2, 6)
    found = bound(gaussian(schedule), schedule, x_0, times, Signs())
    pairs = zip(times[:-2].tolist(), times[1:-1].tolist(), strict=True)
    for n, (t, s) in enumerate(pairs):
        (alpha, sigma), (alpha_s, sigma_s) = (
            (at.alpha.item(), at.sigma.item()) for at in (schedule(scalar(t)), schedule(scalar(s)))
        )
        c = 0.25 * alpha / (0.25 * alpha**2 + sigma**2)
        error = (1 - c * alpha) ** 2 * x_0[0].square().mean().item() + (c * sigma) ** 2
        # ½·(SNR(s) - SNR(t))·error (Kingma et al. 2021, Eq. 14)
        nats = 0.5 * ((alpha_s / sigma_s) ** 2 - (alpha / sigma) ** 2) * error
        assert found.terms[n].mean().item() == about(nats / math.log(2), rel=1e-7)


def test_the_bound_of_an_exact_gaussian_nears_its_code_length_as_1_over_the_steps():
    """Its reverse steps are Gaussian, so nothing is lost in the limit."""
    schedule, x_0 = edm.edm(sigma_min=0.03), torch.tensor([[127.0], [153.0], [229.0]]).double()
    x_0 = x_0.repeat_interleave(2, dim=0) / 127.5 - 1
    coarse, fine = (
        bound(
            gaussian(schedule), schedule, x_0, karras(schedule, steps), Signs(), variance=1.0
        ).total
        for steps in (250, 500)
    )
    density = torch.distributions.Normal(0.0, 0.5).log_prob(x_0[::2, 0])
    code_length = -(density + math.log(2 / 255)) / math.log(2)
    limit = (2 * fine - coarse).reshape(3, 2).mean(dim=1)
    assert (fine.reshape(3, 2).mean(dim=1) > code_length + 0.04).all()
    torch.testing.assert_close(limit, code_length, rtol=0, atol=0.01)


def test_the_bound_needs_a_second_step():
    schedule = discrete.linear(steps=100)
    with pytest.raises(ConfigError, match="2 steps or more"):
        bound(gaussian(schedule), schedule, levels(1, 2), trailing(schedule, 1), keyed(1))


@pytest.mark.parametrize("name", CHAINS)
def test_the_bound_is_finite_on_every_chain_to_zero_signal(name):
    schedule = CHAINS[name](steps=50, zero_terminal_snr=True)
    found = bound(gaussian(schedule), schedule, levels(2, 3), trailing(schedule, 50), keyed(2))
    assert found.total.isfinite().all()
    assert found.prior.tolist() == [0, 0]


# The probability-flow ODE


@pytest.mark.parametrize("schedule", EXACT.values(), ids=EXACT)
def test_the_ode_finds_the_density_of_a_gaussian(schedule):
    x_0 = torch.stack((torch.zeros(6), torch.linspace(-1.5, 1.5, 6))).double()
    times = trailing(schedule, 50) if is_chain(schedule) else karras_or_trailing(schedule)
    found = ode_log_likelihood(gaussian(schedule), schedule, x_0, times, keyed(2))
    exact = torch.distributions.Normal(0.0, 0.5).log_prob(x_0).sum(dim=1)
    assert bits_per_dim((found - exact)[:, None] / 6).abs().max() < 1e-3


def test_the_ode_finds_the_density_of_what_it_would_sample():
    """From N(0, 1) at σ = 1 the exact flow of N(0, 0.5²) ends at N(0, 0.25/1.25)."""
    schedule, x_0 = edm.edm(sigma_max=1.0), images(3, 4) / 2
    found = ode_log_likelihood(gaussian(schedule), schedule, x_0, karras(schedule, 50), keyed(3))
    sampled = torch.distributions.Normal(0.0, 0.2**0.5).log_prob(x_0).sum(dim=1)
    torch.testing.assert_close(found, sampled, rtol=0, atol=1e-3)


def karras_or_trailing(schedule) -> Tensor:
    grid = karras if schedule(scalar(schedule.t_max)).alpha > 0 else trailing
    return grid(schedule, 50)


def test_dequantised_bits_are_the_density_at_uniformly_moved_pixels():
    schedule, x_0 = edm.edm(), levels(3, 5)
    times = karras(schedule, 50)
    found = ode_bits_per_dim(gaussian(schedule), schedule, x_0, times, keyed(3))
    moved = dequantised(x_0, keyed(3))
    assert (moved - x_0).abs().max() < 1 / 255
    density = torch.distributions.Normal(0.0, 0.5).log_prob(moved)
    exact = -(density + math.log(2 / 255)).mean(dim=1) / math.log(2)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


def test_dequantisation_is_uniform_over_one_level():
    part = dequantised(torch.zeros(4000, 1).double(), keyed(4000), low=0.0, high=255.0)[:, 0]
    ranks = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 0.5
    assert (part.sort().values - ranks).abs().max() < 1.63 / math.sqrt(4000)  # 1 % of seeds fail


def test_bits_do_not_depend_on_the_range_that_pixels_are_scaled_to():
    """Twice the range is twice the width and half the density."""
    schedule, x_0 = discrete.cosine(), levels(2, 5)
    times = trailing(schedule, 50)
    plain = ode_bits_per_dim(gaussian(schedule), schedule, x_0, times, keyed(2))
    low, high = torch.full((5,), -2.0).double(), torch.full((5,), 2.0).double()
    wide = ode_bits_per_dim(
        gaussian(schedule, 1.0), schedule, 2 * x_0, times, keyed(2), low=low, high=high
    )
    torch.testing.assert_close(wide, plain, rtol=0, atol=1e-3)


def mixed(schedule, root: Tensor):
    """The exact denoiser of N(0, root·rootᵀ): its Jacobian is not diagonal."""
    covariance = root @ root.T

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        at = schedule(t)
        total = at.alpha**2 * covariance + at.sigma**2 * torch.eye(len(root)).double()
        score = torch.linalg.solve(total, x_t.T).T
        return Prediction(at.alpha * score @ covariance, at.sigma * score)

    return denoise


def test_signs_are_exact_on_a_diagonal_jacobian_and_unbiased_on_any():
    schedule = edm.edm()
    times, x_0 = karras(schedule, 20), images(4, 2) / 2
    one, other = (
        ode_log_likelihood(
            gaussian(schedule), schedule, x_0, times, ImageNoise(seed, torch.arange(4))
        )
        for seed in (0, 1)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    root = torch.tensor([[0.5, 0.0], [0.3, 0.2]], dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2).double(), scale_tril=root)
    x_0, times = images(4, 2) @ root.T, karras(schedule, 60)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)  # all but the opposite two

    def found(drawn: Tensor) -> Tensor:
        rows = iter(drawn)
        return ode_log_likelihood(
            mixed(schedule, root),
            schedule,
            x_0,
            times,
            lambda like: next(rows).expand_as(like),
            probes=len(drawn),
        )

    torch.testing.assert_close(found(signs), exact.log_prob(x_0), rtol=0, atol=1e-3)
    torch.testing.assert_close(found(signs), (found(signs[:1]) + found(signs[1:])) / 2)
    assert (found(signs[:1]) - found(signs)).abs().min() > 0.1


def test_the_ode_is_integrated_to_fourth_order():
    schedule, x_0 = CONTINUOUS["cosine"], images(4, 3) / 2
    limit, coarse, fine = (
        ode_log_likelihood(gaussian(schedule), schedule, x_0, trailing(schedule, steps), keyed(4))
        for steps in (320, 20, 40)
    )
    order = ((coarse - limit).norm() / (fine - limit).norm()).log2()
    assert order.item() == pytest.approx(4, abs=0.15)


def small_model() -> Denoiser:
    return Denoiser(SmallNetwork().requires_grad_(), CONTINUOUS["cosine"], v)


@pytest.mark.parametrize("measure", [ode_bits_per_dim, lambda *given: bound(*given).total])
def test_a_likelihood_does_not_depend_on_the_batch(measure):
    model, x_0, index = small_model(), levels(8, 3, 2, 2).float(), torch.arange(8)
    model.network.float()
    times = trailing(model.schedule, 5)

    def of(rows: Tensor) -> Tensor:
        noise = ImageNoise(0, rows, Stream.LIKELIHOOD)
        return measure(model, model.schedule, x_0[rows], times, noise)

    assert of(index).equal(torch.cat((of(index[:3]), of(index[3:]))))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_ode_finds_its_gradients_in_any_mode_and_leaves_none_behind(mode):
    model, x_0 = (
        small_model(),
        levels(2, 3, 2, 2),
    )
    expected = ode_bits_per_dim(model, model.schedule, x_0, trailing(model.schedule, 3), keyed(2))
    with mode():
        times = trailing(model.schedule, 3)
        found = ode_bits_per_dim(model, model.schedule, x_0 + 0, times, keyed(2))
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert found.equal(expected)
    assert not found.requires_grad
    assert all(p.grad is None for p in model.network.parameters())


def test_probes_that_are_more_cost_no_evaluation():
    schedule, x_0 = edm.edm(), images(2, 3)
    asked = []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        asked.append(t.item())
        return gaussian(schedule)(x_t, t)

    ode_log_likelihood(denoise, schedule, x_0, karras(schedule, 6), keyed(2), probes=3)
    assert len(asked) == 4 * 5
    assert min(asked) == about(schedule.t_min)
    assert max(asked) == about(schedule.t_max)
