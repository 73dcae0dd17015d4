"""LMS: the linear multistep method in σ/α."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Schedule, travel
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def lms(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    order: Literal[1, 2, 3, 4] = 4,
) -> Iterator[Tensor]:
    """Adams-Bashforth on d(x/α) = ε·d(σ/α) (Hairer et al. 1993, Sec. III.5), steps of any length.

    The polynomial through the last `order` ε is integrated exactly, also over the step onto data.
    """
    past: list[tuple[Tensor, Tensor]] = []  # (σ/α, ε), newest first
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        ratio = now.sigma / now.alpha
        change = then.sigma / then.alpha - ratio
        predicted = denoise(x, t)
        x = travel(predicted, x, now, then)
        if past:
            # Σ w·u^i = ∫ u^i du over the step: u is 0 now and 1 then, and negative in the past
            u = (torch.stack([at for at, _ in past]) - ratio) / change
            power = torch.arange(1, len(past) + 1, dtype=u.dtype)
            weights = torch.linalg.solve(u ** power[:, None], 1 / (power + 1))
            for weight, (_, eps) in zip(then.alpha * change * weights, past, strict=True):
                x = x + expand(weight, x) * (eps - predicted.eps)
        if ratio.isfinite():  # pure noise, α = 0, is infinitely far away
            past = [(ratio, predicted.eps), *past][: order - 1]
        yield x
