"""An adaptive solver: every image takes the steps that it needs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise, turning
from rediffuse.errors import ConfigError
from rediffuse.process import Scales, Schedule
from rediffuse.ranges import NonNegative, Positive, Range
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def adaptive(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    rtol: NonNegative = 1e-3,
    atol: Positive = 1e-3,
    max_evaluations: Annotated[int, Range(4.0)] = 1000,
) -> Iterator[Tensor]:
    """Bogacki & Shampine 1989, 3(2): the probability-flow ODE in steps that fit their errors.

    A step may err by `atol` plus `rtol` of each pixel, as a root mean square over the image, where
    noise is scaled to 1. The grid only says which states to show, interpolated: it changes neither
    cost nor result. A chain's network is asked between its steps, since rounded times would look
    like errors. Below t_min the path is straight to the last x_0.

    Raises:
        ConfigError: if `max_evaluations` do not suffice.
    """
    shown_at = schedule(times.clamp(min=schedule.t_min))
    angles, sizes = torch.atan2(shown_at.sigma, shown_at.alpha), _size(shown_at)
    flow = partial(turning, denoise, schedule)
    walk = _walk(flow, x / expand(sizes[0], x), angles[0], angles[-1], rtol, atol, max_evaluations)
    now = next(walk)
    shown: dict[int, Tensor] = {}
    for i, s in enumerate(times[1:], start=1):
        while (now.angle > angles[i]).any():
            last, now = now, next(walk)
            for k in range(i, len(angles)):
                if (passed := (last.angle > angles[k]) & (now.angle <= angles[k])).any():
                    there = _between(last, now, angles[k])
                    shown[k] = torch.where(_like(passed, x), there, shown.get(k, there))
        x = expand(sizes[i], x) * shown.pop(i, now.y)
        if s < schedule.t_min:
            predicted, to = denoise(x, times.new_tensor(schedule.t_min)), schedule(s)
            x = expand(to.alpha, x) * predicted.x_0 + expand(to.sigma, x) * predicted.eps
        yield x


_FIRST = 0.05  # the first step's share of the way

Flow = Callable[[Tensor, Tensor], Tensor]


class _Place(NamedTuple):
    """Where each image is on its quarter circle, and dy/dφ there."""

    angle: Tensor
    y: Tensor
    slope: Tensor

    def where(self, mask: Tensor, other: "_Place") -> "_Place":
        """Take the other place for the images in the mask."""
        return _Place(
            *(torch.where(_like(mask, a), b, a) for a, b in zip(self, other, strict=True))
        )


def _walk(
    flow: Flow,
    y: Tensor,
    start: Tensor,
    end: Tensor,
    rtol: float,
    atol: float,
    max_evaluations: int,
) -> Iterator[_Place]:
    """Yield where the images are at first and after every attempt, for ever at the end."""
    angle = start.repeat(len(y))
    now, evaluations = _Place(angle, y, flow(y, angle)), 1
    step = (end - angle) * _FIRST
    while True:
        yield now
        if evaluations + 3 > max_evaluations:
            raise ConfigError(
                f"solver 'adaptive' is not done after {evaluations} evaluations; use a larger rtol "
                f"(now {rtol:g}) or atol (now {atol:g}), or more max_evaluations"
            )
        # Those at the end are asked, too: guidance may be bound to the whole batch.
        ahead, error = _ahead(flow, now, torch.maximum(now.angle + step, end))
        evaluations += 3
        excess = _rms(error / (atol + rtol * torch.maximum(now.y.abs(), ahead.y.abs())))
        factor = (0.9 * excess ** (-1 / 3)).clamp(0.2, 5)  # it grows as step³
        step = (ahead.angle - now.angle) * factor
        now = now.where((excess <= 1) & (now.angle > end), ahead)


def _ahead(flow: Flow, now: _Place, angle: Tensor) -> tuple[_Place, Tensor]:
    """Step to these angles (Bogacki & Shampine 1989); also return the error of second order."""
    h, y, first = angle - now.angle, now.y, now.slope
    second = flow(y + expand(h / 2, y) * first, now.angle + h / 2)
    third = flow(y + expand(h * 3 / 4, y) * second, now.angle + h * 3 / 4)
    to = y + expand(h / 9, y) * (2 * first + 3 * second + 4 * third)
    last = flow(to, angle)
    error = expand(h / 72, y) * (-5 * first + 6 * second + 8 * third - 9 * last)
    return _Place(angle, to, last), error


def _between(last: _Place, now: _Place, angle: Tensor) -> Tensor:
    """Hermite's cubic through both places and slopes."""
    whole = now.angle - last.angle
    part = (angle - last.angle) / whole
    bend = part * (part - 1)
    y = last.y + expand(part, now.y) * (now.y - last.y)
    y = y + expand(bend * (1 - 2 * part), y) * (now.y - last.y)
    return y + expand(bend * whole, y) * (
        expand(part - 1, y) * last.slope + expand(part, y) * now.slope
    )


def _size(at: Scales) -> Tensor:
    return (at.alpha**2 + at.sigma**2).sqrt()


def _rms(x: Tensor) -> Tensor:
    """Each image's root mean square, summed in an order that does not depend on the batch."""
    return torch.stack([image.square().mean().sqrt() for image in x]).double().cpu()


def _like(mask: Tensor, like: Tensor) -> Tensor:
    return mask.to(like.device).reshape(-1, *(1,) * (like.ndim - 1))
