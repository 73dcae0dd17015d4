"""Euler and Maruyama's method on the reverse SDE."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, transition_variance, travel
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def euler_maruyama(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise
) -> Iterator[Tensor]:
    """Song et al. 2021b, Eq. 6: the ODE's step, fresh noise, and the score that balances it.

    Down from t to s that is Δx = x_0·Δα + ε·Δσ - v·ε/(2σ_t) + √v·z. The variance v of q(x_t | x_s)
    stands for the integral of g², so that no schedule needs derivatives and α may be 0. The step
    onto data is the ODE's.
    """
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        predicted = denoise(x, t)
        x = travel(predicted, x, now, then)
        if s > 0:
            var_ts = transition_variance(schedule, t, s).clamp(min=0)  # but for rounding
            x = x - expand(var_ts / (2 * now.sigma), x) * predicted.eps
            x = x + expand(var_ts.sqrt(), x) * noise(x)
        yield x
