"""From image numbers to images: image j of a job depends on (seed, j) alone."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule
from rediffuse.randomness import ImageNoise
from rediffuse.solvers import Solver
from rediffuse.tensors import expand


def trajectory(
    denoise: Denoise,
    schedule: Schedule,
    solver: Solver | partial[Iterator[Tensor]],
    times: Tensor,
    noise: ImageNoise,
    like: Tensor,
) -> Iterator[Tensor]:
    """Yield x after every step, down to data; `like` gives shape, dtype and device.

    Inference mode covers the solver's work and never leaks into the caller's.
    """
    with torch.inference_mode():
        x = expand(schedule(times[0]).sigma, like) * noise(like)
    states = solver(denoise, schedule, x, times, noise)
    while True:
        with torch.inference_mode():
            state = next(states, None)
        if state is None:
            return
        yield state
