"""How likely a model finds given images, in bits per dimension: -log2 p / number of pixel values.

Images hold 256 levels from `low`, where black is in the model's range, to `high`, where white is:
(0 - mean)/std and (1 - mean)/std, each a number or, per channel, a tensor `[channels, 1, 1]` of the
images' dtype.

`bound` is the variational bound on the probability of those levels, one term per step of a grid;
`ode_bits_per_dim` follows the probability-flow ODE, and bounds it only by its dequantisation.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import logsigmoid

from rediffuse.denoiser import Denoise, turning
from rediffuse.errors import ConfigError
from rediffuse.process import (
    Gaussian,
    Images,
    Prediction,
    Schedule,
    Time,
    diffuse,
    posterior,
    transition_variance,
)
from rediffuse.solvers import Noise
from rediffuse.tensors import expand

PerImage = Float[Tensor, " batch"]
Level = float | Tensor


class Bound(NamedTuple):
    """-log2 p(x_0) per dimension is at most `total`; every figure is per image.

    `terms` are in the order of the grid, from the noise to the decoder.
    """

    prior: PerImage
    terms: Float[Tensor, "steps batch"]

    @property
    def decoder(self) -> Tensor:
        """-log2 p(x_0 | x_t) of the last step."""
        return self.terms[-1]

    @property
    def total(self) -> Tensor:
        """The bound."""
        return sum(self.terms, start=self.prior)  # torch's sum over steps depends on the batch


@torch.no_grad()
def bound(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Images,
    times: Time,
    noise: Noise,
    *,
    variance: float = 0.0,
    low: Level = -1.0,
    high: Level = 1.0,
) -> Bound:
    """Ho et al. 2020, Eq. 5, on any grid, one draw of x_t per term.

    `trailing(schedule, T)` is the whole chain of T steps, a shorter grid that of the respaced one.
    `variance` is that of `solvers.ancestral`; the decoder's β̃ is 0 and taken from the step before
    it, which is too little on a fine grid of a continuous clock: 1 suits that.

    Raises:
        ConfigError: for a grid of one step, whose decoder has no variance.
    """
    steps = list(pairwise(times))
    if len(steps) < 2:
        raise ConfigError("the bound needs a grid of 2 steps or more; this one has 1")
    terms = []
    for (t, s), finite in zip(steps, [*steps[:-1], steps[-2]], strict=True):
        x_t = diffuse(schedule, x_0, noise(x_0), t)
        smallest = log_posterior_variance(schedule, *finite)
        step = (schedule, denoise(x_t, t), x_0, x_t, t, s, smallest)
        terms.append(bound_term(*step, variance=variance, low=low, high=high))
    return Bound(prior_term(schedule, x_0, times[0]), torch.stack(terms))


def prior_term(schedule: Schedule, x_0: Images, t: Time) -> PerImage:
    """KL(q(x_t | x_0) ‖ N(0, σ_t²)), where sampling starts (L_T of Ho et al. 2020, Eq. 5)."""
    at = schedule(t)
    log_var = expand(2 * at.sigma.log(), x_0)
    mean = expand(at.alpha, x_0) * x_0
    return bits_per_dim(kl(Gaussian(mean, log_var), Gaussian(torch.zeros_like(x_0), log_var)))


def bound_term(
    schedule: Schedule,
    predicted: Prediction,
    x_0: Images,
    x_t: Images,
    t: Time,
    s: Time,
    log_smallest: Time,
    *,
    variance: float = 0.0,
    low: Level = -1.0,
    high: Level = 1.0,
) -> PerImage:
    """KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)), or -ln p(x_0 | x_t) at s = 0 (Ho et al. 2020, Eq. 5).

    `log_smallest` is `log_posterior_variance` of t and s; where s = 0 that is -inf, and it is of
    the step before (Nichol & Dhariwal 2021's code).
    """
    log_beta_tilde = expand(log_smallest, x_t)
    log_beta = expand(transition_variance(schedule, t, s).log(), x_t)
    fraction = variance if predicted.variance is None else predicted.variance
    log_var = fraction * log_beta + (1 - fraction) * log_beta_tilde
    p = Gaussian(posterior(schedule, x_t, predicted.x_0, t, s).mean, log_var)
    q = Gaussian(posterior(schedule, x_t, x_0, t, s).mean, log_beta_tilde)
    decoder = -discretized_gaussian_log_likelihood(x_0, p.mean, log_var / 2, low=low, high=high)
    return bits_per_dim(torch.where(expand(s, x_t) > 0, kl(q, p), decoder))


def log_posterior_variance(schedule: Schedule, t: Time, s: Time) -> Time:
    """The natural logarithm of β̃, the variance of q(x_s | x_t, x_0)."""
    ratio = schedule(s).sigma / schedule(t).sigma
    return (transition_variance(schedule, t, s) * ratio**2).log()


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p ‖ q) of each pixel value, in nats."""
    gap = p.log_var - q.log_var
    return (gap.expm1() - gap + (p.mean - q.mean) ** 2 * (-q.log_var).exp()) / 2


def discretized_gaussian_log_likelihood(
    x: Images, mean: Tensor, log_scale: Tensor, *, low: Level = -1.0, high: Level = 1.0
) -> Images:
    """ln of a normal distribution's mass within half a level of x (Ho et al. 2020, Eq. 13).

    Black and white take the tails, so that the 256 levels share a mass of 1. The distribution
    function is Page's (1977), as in the paper's code: sigmoid(2u), u = √(2/π)·(z + 0.044715·z³).
    """
    low, high = (torch.as_tensor(level).to(x) for level in (low, high))
    width = (high - low) / 255
    per_scale = (-log_scale).exp()
    above, below = (x + width / 2 - mean) * per_scale, (x - width / 2 - mean) * per_scale
    # sigmoid(a) - sigmoid(b) = sigmoid(a)·sigmoid(-b)·(1 - exp(b - a)) with a - b in factors: no
    # difference of nearly equal numbers, and no logarithm of 0.
    cubic = 1 + 0.044715 * (above**2 + above * below + below**2)
    apart = (-(-_TWICE_ROOT * width * per_scale * cubic).expm1()).log()
    black, white = x < low + width / 2, x > high - width / 2
    return (
        logsigmoid(_page(above)).masked_fill(white, 0)
        + logsigmoid(-_page(below)).masked_fill(black, 0)
        + apart.masked_fill(black | white, 0)
    )


_TWICE_ROOT = 2 * math.sqrt(2 / math.pi)


def _page(z: Tensor) -> Tensor:
    return _TWICE_ROOT * (z + 0.044715 * z**3)


def ode_bits_per_dim(
    denoise: Denoise,
    schedule: Schedule,
    x_0: Images,
    times: Time,
    noise: Noise,
    *,
    probes: int = 1,
    low: Level = -1.0,
    high: Level = 1.0,
) -> PerImage:
    """`ode_log_likelihood` of the dequantised images, as bits per dimension of their 256 levels."""
    x = dequantised(x_0, noise, low=low, high=high)
    nats = -ode_log_likelihood(denoise, schedule, x, times, noise, probes=probes)
    log_width = torch.as_tensor((high - low) / 255).double().log().mean()
    return (nats / x_0[0].numel() - log_width.to(nats)) / math.log(2)


def dequantised(x_0: Images, noise: Noise, *, low: Level = -1.0, high: Level = 1.0) -> Images:
    """Add uniform noise, one level wide: its mean log density bounds a level's log probability.

    Theis et al. 2016, Sec. 3.1.
    """
    width = torch.as_tensor((high - low) / 255).to(x_0)
    return x_0 + width * (torch.special.ndtr(noise(x_0)) - 0.5)


def ode_log_likelihood(
    denoise: Denoise, schedule: Schedule, x_0: Images, times: Time, noise: Noise, *, probes: int = 1
) -> Float64[Tensor, " batch"]:
    """ln p(x_0) of a density over images, in nats (Song et al. 2021b, Eq. 39-40).

    The ODE is followed from t_min to the noise, one Runge-Kutta step (fourth order, 4 evaluations)
    between the stops of a solver's grid, which asks a chain's network between its steps, too; below
    t_min, x_0 only shrinks to α·x_0. The divergence is Hutchinson's estimate from `probes` random
    signs: unbiased, and exact where pixels do not mix. Gradients are switched on inside.
    """
    with torch.inference_mode(False), torch.no_grad():  # no inference tensor may meet autograd
        x_0 = x_0.clone()
        stops = schedule(times.clone().clamp(min=schedule.t_min).unique())
        angles = torch.atan2(stops.sigma, stops.alpha)
        signs = [torch.where(noise(x_0) < 0, -1.0, 1.0).to(x_0) for _ in range(probes)]
        y = expand(angles[0].cos(), x_0) * x_0
        log_p = x_0[0].numel() * angles[0].cos().log().to(x_0.device)
        for start, end in pairwise(angles):
            y, spread = _runge_kutta(denoise, schedule, y, start, end, signs)
            log_p = log_p + spread
        z = y.double() / expand(angles[-1].sin(), y.double())
        density = -(z**2 + math.log(2 * math.pi)) / 2 - expand(angles[-1].sin().log(), z)
        return log_p + density.flatten(1).sum(dim=1)


def _runge_kutta(
    denoise: Denoise, schedule: Schedule, y: Tensor, start: Tensor, end: Tensor, signs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Move y from one angle to the next; also return the integral of its flow's divergence."""
    h = end - start
    to, spread, slope = y, torch.zeros((), device=y.device), torch.zeros_like(y)
    for part, share in ((0.0, 1 / 6), (0.5, 1 / 3), (0.5, 1 / 3), (1.0, 1 / 6)):
        middle = y + expand(part * h, y) * slope
        slope, divergence = _flow(denoise, schedule, middle, start + part * h, signs)
        to = to + expand(share * h, y) * slope
        spread = spread + share * h.to(divergence) * divergence
    return to, spread


def _flow(
    denoise: Denoise, schedule: Schedule, y: Tensor, angle: Tensor, signs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """`turning`, and its divergence."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        slope = turning(denoise, schedule, y, angle)
        along = [sign * torch.autograd.grad(slope, y, sign, retain_graph=True)[0] for sign in signs]
    return slope.detach(), torch.stack(along).mean(dim=0).double().flatten(1).sum(dim=1)


def bits_per_dim(nats: Tensor) -> PerImage:
    """The mean over each image's pixel values, in bits."""
    return nats.flatten(1).mean(dim=1) / math.log(2)
