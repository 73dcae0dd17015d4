"""Parts of your own, which a configuration names in full, as my_parts.careful_euler.

A schedule, a network, a weighting or another part is a function in the same way.
"""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, travel
from rediffuse.solvers import Noise


def careful_euler(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    looks: int = 1,
) -> Iterator[Tensor]:
    """Euler's method, which looks at the end of each step and goes again: the trapezoidal rule.

    A solver yields every state from noise to data. What comes after the * can be set by name.
    """
    for t, s in pairwise(times):
        predicted = denoise(x, t)
        end = travel(predicted, x, schedule(t), schedule(s))
        for _ in range(looks if s >= schedule.t_min else 0):
            seen = denoise(end, s)
            both = predicted._replace(
                x_0=(predicted.x_0 + seen.x_0) / 2, eps=(predicted.eps + seen.eps) / 2
            )
            end = travel(both, x, schedule(t), schedule(s))
        x = end
        yield x
