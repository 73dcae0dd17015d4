"""What training minimises: one loss per image, for a network that was shown x_t.

Weights multiply the loss as they stand; `weighting=unit` leaves each as its paper has it.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Float64
from torch import Tensor, nn

from rediffuse.denoiser import Denoiser
from rediffuse.errors import ConfigError
from rediffuse.likelihood import Level, bound_term, log_posterior_variance
from rediffuse.process import Prediction, Schedule, goes_in_steps
from rediffuse.ranges import Fraction, NonNegative, Positive
from rediffuse.targets import combine, solve
from rediffuse.tensors import sent
from rediffuse.weightings import Weighting


class Noised(NamedTuple):
    """A batch as the network meets it.

    `given` is the estimate of x_0 that a self-conditioned network is shown (Chen et al. 2023).
    """

    x_0: Float[Tensor, " batch *shape"]
    eps: Float[Tensor, " batch *shape"]
    x_t: Float[Tensor, " batch *shape"]
    t: Float64[Tensor, " batch"]
    cond: Tensor | None = None
    given: Tensor | None = None


Losses = Float[Tensor, " batch"]
Objective = Callable[[Denoiser, Weighting, Noised], Losses]


def simple(denoiser: Denoiser, weighting: Weighting, noised: Noised) -> Losses:
    """L_simple: the mean squared error of the network's own output (Ho et al. 2020, Eq. 14).

    With the target ε and weight 1 it is the paper's; other targets and weights change nothing else.
    """
    return _weighed(denoiser, weighting, noised, _error(denoiser, noised).square())


def l1(denoiser: Denoiser, weighting: Weighting, noised: Noised) -> Losses:
    """The mean absolute error of the network's own output (Chen et al. 2021, WaveGrad)."""
    return _weighed(denoiser, weighting, noised, _error(denoiser, noised).abs())


def huber(
    denoiser: Denoiser, weighting: Weighting, noised: Noised, *, delta: Positive = 1.0
) -> Losses:
    """Twice Huber's (1964) loss: the squared error up to `delta`, growing linearly beyond it."""
    error = _error(denoiser, noised).abs()
    near = error.clamp(max=delta)
    return _weighed(denoiser, weighting, noised, near * (2 * error - near))


def hybrid(
    denoiser: Denoiser,
    weighting: Weighting,
    noised: Noised,
    *,
    vlb_weight: NonNegative = 0.001,
    low: Level = -1.0,
    high: Level = 1.0,
) -> Losses:
    """L_simple + λ·L_vlb (Nichol & Dhariwal 2021, Eq. 16): the bound teaches the variance alone.

    L_vlb is in bits per dimension and counts T times its term, as `bound`; weights are on L_simple.

    Raises:
        ConfigError: if the network does not learn a variance, or the clock does not go in steps.
    """
    schedule, x_t = denoiser.schedule, noised.x_t
    at = schedule(noised.t)
    output, variance = denoiser.output(x_t, noised.t, at, noised.cond, noised.given)
    if variance is None:
        raise ConfigError(
            "objective 'hybrid' teaches a variance, and this network learns none; set "
            "learned_variance=true, or use objective=simple"
        )
    a, b = denoiser.target(at)
    error = output - combine(noised.x_0, noised.eps, a, b)
    fixed = Prediction(*solve(output.detach(), x_t, at, a, b), variance)
    vlb = _one_term_for_all(schedule, fixed, noised, low=low, high=high)
    return _weighed(denoiser, weighting, noised, error.square()) + vlb_weight * vlb


def bound(
    denoiser: Denoiser,
    weighting: Weighting,
    noised: Noised,
    *,
    variance: Fraction = 0.0,
    low: Level = -1.0,
    high: Level = 1.0,
) -> Losses:
    """The variational bound, in bits per dimension: T times its term at t (Ho et al. 2020, Eq. 5).

    Its mean over the steps 1 .. T is `likelihood.bound` without the prior, which learns nothing.
    `variance` is that of `solvers.ancestral`, for a network that does not learn it. `low` and
    `high` are black and white in the model's range: (0 - mean)/std and (1 - mean)/std.

    Raises:
        ConfigError: if the clock does not go in steps.
    """
    predicted = denoiser(noised.x_t, noised.t, noised.cond, noised.given)
    term = _one_term_for_all(
        denoiser.schedule, predicted, noised, variance=variance, low=low, high=high
    )
    return _weighed(denoiser, weighting, noised, term[:, None])


def _error(denoiser: Denoiser, noised: Noised) -> Tensor:
    at = denoiser.schedule(noised.t)
    output, _ = denoiser.output(noised.x_t, noised.t, at, noised.cond, noised.given)
    return output - combine(noised.x_0, noised.eps, *denoiser.target(at))


def _weighed(denoiser: Denoiser, weighting: Weighting, noised: Noised, per_pixel: Tensor) -> Tensor:
    """Weigh each image's mean; a weight that learns pays -ln w (Karras et al. 2024, Eq. 14)."""
    per_image = per_pixel.flatten(1).mean(dim=1)
    weight = weighting(denoiser.schedule, noised.t, denoiser.target)

    def there(value: Tensor) -> Tensor:
        return sent(value.to(per_image.dtype), per_image.device)

    weighed = there(weight) * per_image
    return weighed - there(weight.log()) if isinstance(weighting, nn.Module) else weighed


def _one_term_for_all(
    schedule: Schedule,
    predicted: Prediction,
    noised: Noised,
    *,
    variance: Fraction = 0.0,
    low: Level,
    high: Level,
) -> Tensor:
    """T times each image's term of the bound, from t to the step before it."""
    if schedule.t_max < 2 or not goes_in_steps(schedule):
        raise ConfigError(
            "the variational bound is a sum over 2 steps or more, and this schedule's clock has no "
            "steps; use a chain such as schedule=cosine, or weighting=vlb with objective=simple"
        )
    t = noised.t
    second = t.clamp(min=2)  # whose variance stands in for that of the first, which is 0
    return schedule.t_max * bound_term(
        schedule,
        predicted,
        noised.x_0,
        noised.x_t,
        t,
        t - 1,
        log_posterior_variance(schedule, second, second - 1),
        variance=variance,
        low=low,
        high=high,
    )
