"""PNDM: pseudo numerical methods, which take classical slopes along DDIM's step."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Prediction, Scales, Schedule, travel
from rediffuse.solvers import Noise
from rediffuse.tensors import expand

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    runge_kutta: bool = True,
) -> Iterator[Tensor]:
    """Liu et al. 2022, F-PNDM: classical methods that step as DDIM does.

    Of second order, and of fourth where the grid is even in σ/α. The first three steps are
    Runge-Kutta's, of four evaluations each; without `runge_kutta` the first is Heun's, of two, and
    Adams-Bashforth's order rises from there (PLMS).
    """
    past: list[Tensor] = []  # ε, newest first
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        first = denoise(x, t)
        can_look_ahead = now.alpha > 0 and s >= schedule.t_min
        if runge_kutta and len(past) < 3 and can_look_ahead:
            eps = _runge_kutta(denoise, schedule, first, x, t, s)
        elif not past and can_look_ahead:
            eps = (first.eps + denoise(travel(first, x, now, then), s).eps) / 2
        else:
            weights = _ADAMS_BASHFORTH[len(past)]
            eps = weights[0] * first.eps
            for weight, earlier in zip(weights[1:], past, strict=True):
                eps = eps + weight * earlier
        x = _transfer(first, eps, x, now, then)
        past = [first.eps, *past][:3]
        yield x


def _transfer(first: Prediction, eps: Tensor, x: Tensor, now: Scales, then: Scales) -> Tensor:
    """Follow another ε than the first one, as DDIM would (Liu et al. 2022, Eq. 11)."""
    x = travel(first, x, now, then)
    if now.alpha == 0:  # only the straight line leads away from pure noise
        return x
    on_eps = then.sigma - then.alpha * now.sigma / now.alpha
    return x + expand(on_eps, x) * (eps - first.eps)


def _runge_kutta(
    denoise: Denoise, schedule: Schedule, first: Prediction, x: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """The mean ε of the classical method of fourth order."""
    middle = schedule.snap((t + s) / 2)
    now, half, then = schedule(t), schedule(middle), schedule(s)
    second = denoise(travel(first, x, now, half), middle).eps
    third = denoise(_transfer(first, second, x, now, half), middle).eps
    fourth = denoise(_transfer(first, third, x, now, then), s).eps
    return (first.eps + 2 * second + 2 * third + fourth) / 6
