"""From image numbers to images: image j of a job depends on (seed, j) alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule
from rediffuse.solvers import Noise, Solver
from rediffuse.tensors import expand


def trajectory(
    denoise: Denoise,
    schedule: Schedule,
    solver: Solver,
    times: Tensor,
    noise: Noise,
    like: Tensor,
) -> Iterator[Tensor]:
    """Yield x after every step from pure noise to data; `like` gives shape, dtype and device."""
    with torch.inference_mode():
        x = expand(schedule(times[0]).sigma, like) * noise(like)
    yield from walk(denoise, schedule, solver, x, times, noise)


def walk(
    denoise: Denoise,
    schedule: Schedule,
    solver: Solver,
    x: Tensor,
    times: Tensor,
    noise: Noise,
) -> Iterator[Tensor]:
    """Yield every state that the solver makes of x, which is at times[0].

    Inference mode covers the solver's work and never leaks into the caller's.
    """
    states = solver(denoise, schedule, x, times, noise)
    while True:
        with torch.inference_mode():
            state = next(states, None)
        if state is None:
            return
        yield state
