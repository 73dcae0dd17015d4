"""Predictor-corrector sampling: ancestral steps, mended by Langevin dynamics."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, transition_variance
from rediffuse.ranges import Positive, Range
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def predictor_corrector(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    corrections: Annotated[int, Range(0.0)] = 1,
    snr: Positive = 0.16,
) -> Iterator[Tensor]:
    """Song et al. 2021b, Alg. 2-5: after each ancestral step, `corrections` Langevin steps at s.

    Along the score -ε/σ with noise z their size is 2·(snr·σ·‖z‖/‖ε‖)², as in Alg. 4; Alg. 5 has
    another factor 1 - β, close to 1. The norms are each image's own, not means over the batch.
    Below t_min, where no network was trained, nothing is corrected.
    """
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        predicted = denoise(x, t)
        fresh = transition_variance(schedule, t, s).clamp(min=0).sqrt() * then.sigma / now.sigma
        kept = (then.sigma**2 - fresh**2).clamp(min=0).sqrt()
        x = expand(then.alpha, x) * predicted.x_0 + expand(kept, x) * predicted.eps
        if s > 0:
            x = x + expand(fresh, x) * noise(x)
        for _ in range(corrections if s >= schedule.t_min and s > 0 else 0):
            eps, z = denoise(x, s).eps, noise(x)
            # A step of more than σ² would leap over the mode, as an ε near 0 would have it.
            part = (snr * _norms(z) / _norms(eps)).clamp(max=0.5**0.5)
            x = x + expand(then.sigma, x) * (expand(2 * part, x) * z - expand(2 * part**2, x) * eps)
        yield x


def _norms(x: Tensor) -> Tensor:
    """Each image's norm, summed in an order that does not depend on the batch."""
    return torch.stack([image.norm() for image in x])
