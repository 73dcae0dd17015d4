"""DDIM backwards: from an image to the noise that gives it."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Images, Schedule, Time, travel


def inverted(
    denoise: Denoise, schedule: Schedule, x_0: Images, times: Time, *, iterations: int = 3
) -> Iterator[Tensor]:
    """Walk a solver's grid up from data, undoing DDIM: yield every state, the noise last.

    `ddim` took x_t to x_s with its ε(x_t), which nobody has yet. The first of the `iterations`
    takes ε(x_s) instead (Song et al. 2021a, Eq. 14; Dhariwal & Nichol 2021, App. F); each further
    one asks again at the x_t found (Pan et al. 2023, Eq. 7-8), and the error shrinks as fast as
    the grid is fine.
    """
    x_s = x_0
    for s, t in pairwise(times.flip(0)):
        x_t = x_s
        for _ in range(iterations):
            x_t = travel(denoise(x_t, t), x_s, schedule(s), schedule(t))
        x_s = x_t
        yield x_s
