"""What there is to see while images are denoised. Nothing is computed that nobody asks for."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor

from rediffuse.data.pixels import to_uint8
from rediffuse.drawing import states, watched
from rediffuse.pictures import Pixels
from rediffuse.report.images import moment
from rediffuse.studio.asking import Drawing


class Frame(NamedTuple):
    """How far a solver is, what it is at (x_t) and what it takes for the image there (x_0).

    The last one says how the walk came to its `end`; if it is done, x_t and x_0 are the image.
    `seconds` are those that the walk took so far.
    """

    step: int
    evaluations: int
    x_t: Pixels
    x_0: Pixels
    end: Literal["done", "stopped"] | None = None
    seconds: float = 0.0


class _Stopped(Exception):
    """Somebody had seen enough."""


def frames(of: Drawing, stopped: Callable[[], bool]) -> Iterator[Frame]:
    """Yield a frame for every step of the solver, and one of the images.

    `stopped` is asked after every evaluation of the network; there is no other after it says so.

    Raises:
        DataError: if a state is not finite.
    """
    data, schedule = of.model.config.data, of.model.denoiser.schedule
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    evaluations, step = 0, 0

    def look(x_t: Tensor, t: Tensor, x_0: Tensor) -> None:
        nonlocal evaluations
        evaluations += 1
        calls.append((x_t, t, x_0))
        if stopped():
            raise _Stopped

    def seen(end: Literal["stopped"] | None = None) -> Frame:
        at = moment(step, schedule, *calls[0], data.mean, data.std)
        calls.clear()
        return Frame(step, evaluations, at.x_t, at.x_0, end)

    job = replace(of.job, way=watched(look, of.job.way))
    try:
        for x in states(of.model, of.how, job):
            state, step = x, step + 1
            if calls:
                yield seen()
    except _Stopped:
        step += 1
        yield seen("stopped")
        return
    images = to_uint8(state, data.mean, data.std).cpu().numpy()
    yield Frame(step, evaluations, images, images, "done")


def together(*walks: Iterator[Frame]) -> Iterator[tuple[Frame, ...]]:
    """Walk several in turn, a step of each; who is done waits, and when one is stopped all are."""
    at = [_timed(walk) for walk in walks]
    while True:
        yield tuple(at)
        if any(frame.end == "stopped" for frame in at) or all(frame.end for frame in at):
            return
        at = [f if f.end else _timed(walk, f.seconds) for f, walk in zip(at, walks, strict=True)]


def _timed(walk: Iterator[Frame], seconds: float = 0.0) -> Frame:
    began = time.monotonic()
    frame = next(walk)
    return frame._replace(seconds=seconds + time.monotonic() - began)


def paced(walk: Iterable[tuple[Frame, ...]], every_s: float = 0.1) -> Iterator[tuple[Frame, ...]]:
    """Leave out what comes faster than anybody can look; never the last."""
    last, left_out = -every_s, None
    for at in walk:
        now = time.monotonic()
        if now - last >= every_s:
            last, left_out = now, None
            yield at
        else:
            left_out = at
    if left_out:
        yield left_out
