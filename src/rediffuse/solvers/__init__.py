"""Solvers: generator functions that walk x down a grid of times, one file each."""

from collections.abc import Callable, Iterator

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule

Noise = Callable[[Tensor], Tensor]
Solver = Callable[[Denoise, Schedule, Tensor, Tensor, Noise], Iterator[Tensor]]
