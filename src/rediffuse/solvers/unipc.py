"""UniPC: a predictor and, with the evaluation that comes next anyway, a corrector."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Scales, Schedule
from rediffuse.solvers import Noise
from rediffuse.tensors import expand

Known = tuple[Tensor, Tensor]  # (λ, x_0)


def unipc(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    order: Literal[1, 2, 3] = 3,
    bh: Literal[1, 2] = 2,
) -> Iterator[Tensor]:
    """Zhao et al. 2023, Sec. 3: order + 1 in λ = ln(α/σ), predicting x_0, one evaluation a step.

    `bh` is the paper's B_1(h) = h or B_2(h) = e^h - 1. The order is lower in the first steps and
    in the last two. Yielded is what the predictor says; its correction enters the next step.
    """
    past: list[Known] = []  # newest first
    start, now = x, schedule(times[0])
    for left, (t, s) in zip(range(len(times) - 1, 0, -1), pairwise(times), strict=True):
        before, now, then = now, schedule(t), schedule(s)
        here = now.half_log_snr, denoise(x, t).x_0
        if past:
            x = _step(start, before, now, past[0][1], [*past[1:], here], bh)
        start = x
        x = _step(x, now, then, here[1], past[: min(order, left) - 1], bh)
        if here[0].isfinite():
            past = [here, *past][:order]
        yield x


def _step(
    x: Tensor, now: Scales, then: Scales, x_0: Tensor, others: Sequence[Known], bh: int
) -> Tensor:
    """Integrate the polynomial in λ through x_0, which is at `now`, and the others."""
    on_x_0 = then.alpha - then.sigma * now.alpha / now.sigma  # α_s·(1 - e^-h)
    x = expand(then.sigma / now.sigma, x) * x + expand(on_x_0, x) * x_0
    if not others:
        return x
    # Σ w·u^i = h·∫ u^i·e^(-h(1-u)) du over the step: u is 0 now and 1 then
    h = then.half_log_snr - now.half_log_snr
    u = (torch.stack([at for at, _ in others]) - now.half_log_snr) / h
    moments = [-torch.expm1(-h)]
    for i in range(1, len(others) + 1):
        moments.append(1 - moments[-1] * i / h)
    if len(others) == 1:  # the paper's 1/2, the only case where B(h) does not cancel
        weights = (h if bh == 1 else moments[0]) / (2 * u)
    else:
        power = torch.arange(1, len(others) + 1, dtype=u.dtype)
        weights = torch.linalg.solve(u ** power[:, None], torch.stack(moments[1:]))
    for weight, (_, other) in zip(then.alpha * weights, others, strict=True):
        x = x + expand(weight, x) * (other - x_0)
    return x
