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

    Going down, `ddim` asks the network about x_t, which is not known here. The first of the
    `iterations` asks about x_s in its place (Song et al. 2021a, Sec. 4.3), each further one about
    the x_t found so far, towards the fixed point that DDIM takes to x_s exactly (Pan et al. 2023,
    AIDI). The finer the grid, the fewer are needed.
    """
    x_s = x_0
    for s, t in pairwise(times.flip(0)):
        x_t = x_s
        for _ in range(iterations):
            x_t = travel(denoise(x_t, t), x_s, schedule(s), schedule(t))
        x_s = x_t
        yield x_s
