"""What a run drew while it trained, and what its model draws now."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from rediffuse import plots
from rediffuse.config.schema import Config, Sampling
from rediffuse.data.pixels import to_uint8
from rediffuse.drawing import Job, classes_for, states, watched
from rediffuse.errors import ConfigError, DataError, RediffuseError
from rediffuse.gallery import Options, wanted
from rediffuse.legality import check_sampling
from rediffuse.models import Model
from rediffuse.pictures import Pixels, enlarged, film, grid, png
from rediffuse.process import Schedule
from rediffuse.progress import Progress
from rediffuse.rasters import MAX_PIXELS, png_header, read_png
from rediffuse.reading import why
from rediffuse.report.page import Picture, Section, figure
from rediffuse.tensors import expand

SOLVERS = "ddim", "heun", "dpmpp_2m", "unipc", "euler_ancestral"
"""What the run's own solver is put beside, if nothing else is asked for."""

_GREY = 136  # neither glares on a dark page nor is lost on a light one
_MOST_ROWS, _MOST_COLUMNS, _MOST_FRAMES, _FILM_PIXELS = 10, 10, 40, 440
_SHOWN_PIXELS = 200_000_000  # of all pictures of a section together; seconds of decoding
_WRITTEN_PIXELS = 64_000_000  # the same where they are encoded anew

Frame = UInt8[np.ndarray, "h w c"]


# Previews


def timeline(samples: Path, config: Config, class_names: Sequence[str]) -> Section:
    """The previews that training drew: their first rows below one another, and all of it as film.

    A preview that cannot be read is left out, and named.
    """
    size = config.data.image_size
    size *= max(1, -(-28 // size))  # as `pictures.grid` enlarges
    shots, notes = _previews(samples, size)
    if not shots:
        return Section("Samples while training", notes=notes or ["No preview has been drawn yet."])
    rows = {seen: shot.row for seen, shot in shots.items()}
    columns = min(map(len, rows.values()))
    if columns == 0:
        return Section("Samples while training", notes=["The previews are of another size."])
    few = [list(rows)[k] for k in _spread(len(rows), _MOST_ROWS)]
    names = class_names if 1 < len(class_names) <= 20 else ()
    strip = figure(
        "timeline",
        partial(
            plots.table,
            [rows[seen][:columns] for seen in few],
            [f"{seen:,}" for seen in few],
            [names[k] if k < len(names) else str(k) for k in range(columns)],
            "class" if names else "image",
        ),
        "Timeline",
        "One row per preview, named by the images seen; a column has the same noise every time.",
        wide=True,
    )
    frames = list(shots)
    moving = _film(
        "timeline-film",
        "Timeline as a film",
        f"From {frames[0]:,} to {frames[-1]:,} images seen.",
        [shots[seen].frame for seen in frames],
    )
    return Section("Samples while training", [strip, moving], notes)


class _Shot(NamedTuple):
    """What is shown of a preview: its first row of images, and as much as a film has room for."""

    row: Pixels
    frame: Frame


def _previews(samples: Path, size: int) -> tuple[dict[int, _Shot], list[str]]:
    """Evenly chosen previews by the images seen, and what is wrong with others.

    At most 40 of them, and fewer where all together have more pixels than `_SHOWN_PIXELS`.
    """
    files: dict[int, Path] = {}
    notes = []
    for file in sorted(samples.glob("preview-*.png")):
        number = file.stem.removeprefix("preview-")
        if number.isascii() and number.isdecimal() and len(number) <= 18:
            files[int(number)] = file
    few = [list(files)[k] for k in _spread(len(files), _MOST_FRAMES)]
    pixels = {}
    for seen in few:
        try:
            pixels[seen] = math.prod(png_header(files[seen]).size)
        except (OSError, ValueError) as refused:
            notes.append(f"{files[seen].name} is left out: {why(refused)}.")
    most = max(2, _SHOWN_PIXELS // max(pixels.values(), default=1))
    found = {}
    for seen in [list(pixels)[k] for k in _spread(len(pixels), most)]:
        try:
            found[seen] = _shot(picture_of(files[seen]), size)
        except DataError as refused:
            notes.append(f"{files[seen].name} is left out: {refused}.")
    shapes = [shot.frame.shape[2:] for shot in found.values()]
    return {seen: shot for seen, shot in found.items() if shot.frame.shape[2:] == shapes[-1]}, notes


def _shot(picture: Frame, size: int) -> _Shot:
    """Copy the parts that are shown, so that the rest of a picture can be let go."""
    return _Shot(_first_row(picture, size), _cropped(picture, size).copy())


def picture_of(file: Path, most_pixels: int = MAX_PIXELS) -> Frame:
    """Decode a picture of a run's directory, if it has no more than so many pixels.

    Raises:
        DataError: giving the reason alone, if it is none.
    """
    try:
        image = read_png(file, most_pixels)
    except (OSError, ValueError) as refused:
        raise DataError(why(refused)) from None
    pixels = np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def _first_row(picture: Frame, size: int, gap: int = 2) -> Pixels:
    """Cut the first ten images out of a grid's first row."""
    count = (picture.shape[1] + gap) // (size + gap) if picture.shape[0] >= size else 0
    starts = [k * (size + gap) for k in range(min(count, _MOST_COLUMNS))]
    cells = [picture[:size, x : x + size].transpose(2, 0, 1) for x in starts]
    return np.array(cells, np.uint8).reshape(-1, picture.shape[2], size, size)


def _cropped(picture: Frame, size: int, gap: int = 2) -> np.ndarray:
    """As many whole images as a film has room for, but at least one."""
    height, width = (
        max(1, (min(length, _FILM_PIXELS) + gap) // (size + gap)) * (size + gap) - gap
        for length in picture.shape[:2]
    )
    return picture[:height, :width]


def _spread(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1: the first, the last, and evenly in between."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, most))})


def _film(name: str, title: str, caption: str, frames: Sequence[np.ndarray]) -> Picture:
    height, width = (max(frame.shape[k] for frame in frames) for k in (0, 1))
    equal = [_padded(frame, height, width) for frame in frames]
    return Picture(name, "gif", title, caption, film(equal), still=png(equal[-1]))


def _padded(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    below, right = height - frame.shape[0], width - frame.shape[1]
    return np.pad(frame, ((0, below), (0, right), (0, 0)), constant_values=_GREY)


# What the model draws


class Moment(NamedTuple):
    """What the solver was at and what it was told: x_t and x_0 as pixels.

    `t` is None where each image has its own, as with `adaptive`.
    """

    step: int
    t: float | None
    x_t: Pixels
    x_0: Pixels


class Drawn(NamedTuple):
    """Finished images, moments on the way, and how often the network was asked for them."""

    images: Pixels
    moments: list[Moment]
    evaluations: int


def trajectories(model: Model, seed: int) -> Section:
    """The way from noise to images, with what the model takes for the image at each moment."""
    title, how = "From noise to image", model.config.sampling
    try:
        drawn = follow(model, how, tuple(range(9)), seed)
    except RediffuseError as refused:
        return Section(title, notes=[f"Not drawn: {refused}."])
    moments = drawn.moments
    few = [moments[k] for k in _spread(len(moments), 11)]
    clocked = all(moment.t is not None for moment in few)
    count = 3
    rows = [
        np.stack([getattr(moment, what)[k] for moment in few] + [drawn.images[k]])
        for k in range(count)
        for what in ("x_t", "x_0")
    ]
    strip = figure(
        "trajectory",
        partial(
            plots.table,
            rows,
            ["x_t", "x̂_0"] * count,
            [f"{moment.t:.4g}" if clocked else f"{moment.step:,}" for moment in few] + ["done"],
            "t" if clocked else "step; each image has its own t",
        ),
        "Trajectories",
        "Above, x_t / √(α² + σ²); below it x̂_0, the image that the model sees in it. "
        f"{how.solver.name}, {how.steps} steps, {drawn.evaluations} evaluations of the network.",
        wide=True,
    )
    halves = [(moment.x_t, moment.x_0) for moment in moments] + [(drawn.images,) * 2]
    frames = [np.concatenate([_square(half) for half in pair], axis=1) for pair in halves]
    moving = _film("trajectory-film", "Trajectories as a film", "Left: x_t. Right: x̂_0.", frames)
    return Section(title, [strip, moving])


def samplers(
    model: Model, names: Sequence[str], count: int, steps: int | None, seed: int
) -> Section:
    """The same noise through several solvers; those that cannot be used here are named."""
    own, numbers = model.config.sampling, tuple(range(count))
    rows, labels, notes = [], [], []
    asked: list[str | None] = [*names] or [None, *(n for n in SOLVERS if n != own.solver.name)]
    bar = Progress(len(asked), "solvers")
    for k, name in enumerate(asked):
        bar.move(k)
        try:
            how = wanted(own, Options(solver=name, steps=steps))
            check_sampling(model.config, how, model.denoiser.schedule, model.trusted)
            drawn = follow(model, how, numbers, seed)
        except ConfigError as refused:
            if names:
                raise
            notes.append(f"{name} is left out: {refused}.")
            continue
        except DataError as refused:
            notes.append(f"{name or own.solver.name} is left out: {refused}.")
            continue
        rows.append(drawn.images)
        labels.append(f"{how.solver.name}, {drawn.evaluations} eval.")
    bar.close()
    title = "Solvers"
    if not rows:
        return Section(title, notes=notes)
    turns = classes_for(numbers, model.class_names)
    strip = figure(
        "samplers",
        partial(
            plots.table,
            rows,
            labels,
            [model.class_names[k] for k in turns] if turns else list(map(str, numbers)),
            "class" if turns else "image",
        ),
        "Solvers side by side",
        f"A column starts from the same noise. {steps or own.steps} steps, grid={own.grid.name}, "
        "each row with how often it asks the network.",
        wide=True,
    )
    return Section(title, [strip], notes)


def follow(model: Model, how: Sampling, numbers: tuple[int, ...], seed: int) -> Drawn:
    """Draw images and remember about `_MOST_FRAMES` moments, evenly over the solver's steps.

    Raises:
        DataError: if a state is not finite.
    """
    data, schedule = model.config.data, model.denoiser.schedule
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    evaluations, stride, moments = 0, 1, []
    way = watched(lambda *call: calls.append(call))
    job = Job(numbers, classes_for(numbers, model.class_names), seed, way=way)
    for step, state in enumerate(states(model, how, job)):
        x = state
        evaluations += len(calls)
        if calls and step % stride == 0:
            moments.append(moment(step, schedule, *calls[0], data.mean, data.std))
        if len(moments) > 2 * _MOST_FRAMES:
            moments, stride = moments[::2], 2 * stride
        calls.clear()
    images = to_uint8(x, data.mean, data.std).cpu().numpy()
    return Drawn(images, moments, evaluations)


@torch.inference_mode()
def moment(
    step: int, schedule: Schedule, x_t: Tensor, t: Tensor, x_0: Tensor, *levels: float | list[float]
) -> Moment:
    """What a solver was at and was told, as pixels; x_t is divided by √(α² + σ²)."""
    at = schedule(t)
    size = (at.alpha**2 + at.sigma**2).rsqrt()
    pixels = [to_uint8(x, *levels).cpu().numpy() for x in (x_t * expand(size, x_t), x_0)]
    return Moment(step, t.item() if t.ndim == 0 else None, *pixels)


def _square(images: Pixels, margin: int = 8) -> Frame:
    """A grid of 9, with a margin that parts the halves of a film."""
    picture = grid(enlarged(images, 56), 3, paper=_GREY)
    return np.pad(picture, ((0, 0), (0, margin), (0, 0)), constant_values=_GREY)


def pictures_in(folder: Path, most: int = 20) -> tuple[list[Picture], list[str]]:
    """The PNG files of a folder and of those in it, and what is wrong with the others.

    They are decoded and written anew, as long as all together have no more than `_WRITTEN_PIXELS`.
    """
    left = _WRITTEN_PIXELS
    found: list[Picture] = []
    notes = []
    files = [file for at in ("*.png", "*/*.png") for file in sorted(folder.glob(at))]
    for file in [file for file in files if file.name[0] != "."][:most]:
        name = str(file.relative_to(folder))
        try:
            picture = picture_of(file, left)
            content = png(picture)
        except DataError as refused:
            notes.append(f"{name} is left out: {refused}.")
        else:
            left -= picture.shape[0] * picture.shape[1]
            found.append(Picture(f"evaluation-{len(found)}", "png", name, "", content))
    return found, notes
