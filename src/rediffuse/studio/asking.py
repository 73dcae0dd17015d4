"""What the fields of the page mean: from what was typed and drawn to a job that can be walked."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from rediffuse.config.schema import Data, Sampling
from rediffuse.data.decoding import read, to_square
from rediffuse.drawing import Job
from rediffuse.errors import ConfigError, DataError
from rediffuse.gallery import Options, common, image_numbers, settled
from rediffuse.models import Model
from rediffuse.pictures import save_png

MOST_IMAGES = 64
"""What a page shows at once; `rediffuse sample` draws any number."""

Square = UInt8[np.ndarray, "channel size size"]
Mask = Bool[np.ndarray, "size size"]
Number = int | float
"""What a field for numbers gives."""


@dataclass(frozen=True)
class Asked:
    """What the fields of one setting say, as they come from the page: anything may be missing."""

    run: str | None = None
    checkpoint: str | None = None
    weights: str | None = "average"
    solver: str | None = None
    steps: Number | None = None
    guidance: Number | None = None
    class_name: str | None = None
    seeds: str | None = None
    seed: Number | None = 0


@dataclass(frozen=True)
class Edit:
    """An image to start from, as the model sees it: varied, or painted where `mask` is true."""

    given: Square
    strength: Number = 0.6
    mask: Mask | None = None
    resamplings: Number | None = 1


@dataclass(frozen=True)
class Drawing:
    """What is going to be drawn; `facts` are what all of its images share."""

    model: Model
    how: Sampling
    job: Job
    facts: Mapping[str, Any]
    steps: int | None  # that the solver is going to walk; None where nobody knows


def drawing(model: Model, asked: Asked, edit: Edit | None = None) -> Drawing:
    """Settle what is asked of a model.

    Raises:
        RediffuseError: if the model cannot do it, or a field says what it cannot mean.
    """
    options = options_of(asked, model.config.sampling)
    if edit is None:
        how, job = settled(model, options)
    else:
        with TemporaryDirectory() as folder:
            options = with_edit(options, edit, Path(folder))
            how, job = settled(model, options)
    return Drawing(model, how, job, common(model, how, job, options), steps_of(how, options))


def options_of(asked: Asked, own: Sampling) -> Options:
    """The fields as options of `rediffuse sample`; what is as the run has it is left to the run.

    Raises:
        ConfigError: for what a field cannot mean.
    """
    seeds = (asked.seeds or "").strip() or "0-15"
    if (count := len(image_numbers(seeds, None))) > MOST_IMAGES:
        raise ConfigError(
            f"seeds {seeds} names {count:,} images, and a page shows {MOST_IMAGES}; "
            "`rediffuse sample` draws any number"
        )
    solver = " ".join((asked.solver or "").split())
    guidance, scale = asked.guidance, own.guidance.arguments.get("scale")
    return Options(
        seeds=seeds,
        seed=_whole("seed", asked.seed, 0, 2**32 - 1) or 0,
        class_name=asked.class_name or None,
        guidance=None if guidance in (None, scale) else float(guidance),
        solver=None if solver in ("", own.solver.name) else solver,
        steps=_whole("steps", asked.steps, 1, 100_000),
        weights=asked.weights or "average",
        checkpoint=asked.checkpoint or "latest",
    )


def with_edit(options: Options, edit: Edit, folder: Path) -> Options:
    """Put the given image and mask where `rediffuse sample` would find them.

    Raises:
        ConfigError: if there is a mask with nothing in it.
    """
    given = save_png(edit.given.transpose(1, 2, 0), folder / "given.png")
    if edit.mask is None:
        return replace(options, inputs=given, strength=float(edit.strength))
    if not edit.mask.any():
        raise ConfigError("nothing is marked: draw over what is to be painted anew")
    mask = save_png(edit.mask[..., None].astype(np.uint8) * 255, folder / "mask.png")
    resamplings = _whole("resamplings", edit.resamplings, 1, 1000) or 1
    return replace(options, inputs=given, mask=mask, resamplings=resamplings)


def steps_of(how: Sampling, options: Options) -> int | None:
    """How many states a solver is going to yield, but for those that choose their own steps."""
    if how.solver.name == "adaptive":
        return None
    if options.strength is not None:
        return max(1, round(options.strength * how.steps))
    return (how.steps - 1) * options.resamplings + 1  # the last step is walked once


def square_of(file: Path, data: Data) -> Square:
    """A picture file as a model sees it.

    Raises:
        DataError: if it is none, is broken, or has too many pixels.
    """
    try:
        return to_square(read(file), data.image_size, data.channels, data.fit)
    except DataError as refused:
        raise DataError(f"{file.name[:80]} cannot be used: {refused}") from None


def mask_of(alpha: UInt8[np.ndarray, "height width"], size: int) -> Mask:
    """A model's pixels of which half or more is painted over."""
    rows, columns = (np.linspace(0, n, size + 1).astype(int) for n in alpha.shape)
    painted = np.add.reduceat(np.add.reduceat(alpha >= 128, rows[:-1], 0, int), columns[:-1], 1)
    whole = np.diff(rows)[:, None] * np.diff(columns)
    return np.asarray(2 * painted >= whole)


def command(asked: Asked, own: Sampling) -> str:
    """What to type for the same images."""
    options = options_of(asked, own)
    typed = {
        "--seeds": options.seeds,
        "--seed": options.seed or None,
        "--class": options.class_name,
        "--guidance": None if options.guidance is None else f"{options.guidance:g}",
        "--solver": options.solver,
        "--steps": None if options.steps == own.steps else options.steps,
        "--weights": None if options.weights == "average" else options.weights,
        "--checkpoint": options.checkpoint,
    }
    given = [word for name, value in typed.items() if value is not None for word in (name, value)]
    return shlex.join(["rediffuse", "sample", str(asked.run), *map(str, given)])


def _whole(name: str, value: Number | None, least: int, most: int) -> int | None:
    if value is None:
        return None
    if not (math.isfinite(value) and value == int(value) and least <= value <= most):
        raise ConfigError(f"{name} {value:g}: expected a whole number from {least} to {most:,}")
    return int(value)
