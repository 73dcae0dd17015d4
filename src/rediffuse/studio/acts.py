"""What a click does, as HTML step by step; what is refused is one line, and the page goes on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from rediffuse.errors import DataError, RediffuseError
from rediffuse.gallery import image_numbers
from rediffuse.pictures import enlarged
from rediffuse.studio import shelf, showing
from rediffuse.studio.asking import Asked, Edit, Square, command, drawing, options_of, square_of
from rediffuse.studio.desk import Desk
from rediffuse.studio.frames import frames, paced, together

_CANVAS = 448  # pixels that a mask is drawn on, or as many as the image has
_FAULTS = RediffuseError, OSError, MemoryError, RuntimeError


class Sheet(NamedTuple):
    """What the page shows after an act: a line, and a block for each side, or what is there."""

    line: str
    sides: tuple[str, ...] | None = None


def draw(
    desk: Desk, session: str, sides: Sequence[Asked], what: str = "x_t", edit: Edit | None = None
) -> Iterator[Sheet]:
    """Draw one setting, or several from the same noise, and yield what is to be seen meanwhile."""
    try:
        stopped = desk.begin(session)
        yield Sheet(showing.line("loading the model"))
        drawings = [drawing(desk.model(asked), asked, edit) for asked in sides]
        for at in paced(together(*(frames(of, stopped) for of in drawings))):
            shown = [
                showing.state(of, frame) + showing.tiles(of, frame, what)
                for of, frame in zip(drawings, at, strict=True)
            ]
            if edit is None and all(frame.end == "done" for frame in at):
                shown = [
                    html + showing.typed(command(asked, of.model.config.sampling))
                    for html, asked, of in zip(shown, sides, drawings, strict=True)
                ]
            yield Sheet("", tuple(shown))
    except _FAULTS as refused:
        yield Sheet(showing.refusal(reason(refused)))


def reason(refused: Exception) -> Exception:
    """What to tell of a fault that is not ours; what nobody can act on goes on as it is."""
    if isinstance(refused, RediffuseError):
        return refused
    if isinstance(refused, MemoryError) or "memory" in str(refused):
        return RediffuseError("there is not enough memory for this; ask for fewer images")
    if isinstance(refused, OSError):
        return RediffuseError(f"{refused.filename or 'the system'}: {refused.strerror}")
    raise refused


class Given(NamedTuple):
    """An image to start from, and how it looks where a mask is drawn on it."""

    square: Square
    canvas: UInt8[np.ndarray, "height width colour"]


def take(desk: Desk, asked: Asked, file: Path) -> Given:
    """Read a picture as the run's model sees it.

    Raises:
        RediffuseError: if there is no run, or the file is no picture that can be used.
    """
    if not asked.run:
        raise DataError("there is no run to say how large an image is")
    square = square_of(file, shelf.card(desk.root, asked.run).config.data)
    return Given(square, canvas_of(square))


def canvas_of(square: Square) -> UInt8[np.ndarray, "height width colour"]:
    """An image as large as it takes to draw on it, in colours; every pixel is a square."""
    large = enlarged(square[None], _CANVAS)[0].transpose(1, 2, 0)
    return large.repeat(3, axis=2) if large.shape[2] == 1 else large[:, :, :3]


def first(desk: Desk, session: str, asked: Asked) -> Given | str:
    """Draw the first of the images asked for, to start from, or tell why not."""
    try:
        stopped, model = desk.begin(session), desk.model(asked)
        options = options_of(asked, model.config.sampling)
        one = replace(asked, seeds=str(image_numbers(options.seeds, None)[0]))
        (*_, frame) = frames(drawing(model, one), stopped)
    except _FAULTS as refused:
        return showing.refusal(reason(refused))
    if frame.end == "stopped":
        return showing.line("cancelled")
    return Given(frame.x_0[0], canvas_of(frame.x_0[0]))
