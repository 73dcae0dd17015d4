"""The same as the command line, from Python."""

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import UInt8

from rediffuse.config.compose import compose
from rediffuse.drawing import Job, Way, classes_for, classes_of_given, draw
from rediffuse.errors import ConfigError
from rediffuse.gallery import Options, wanted
from rediffuse.launch import trained
from rediffuse.legality import check_sampling
from rediffuse.models import Model, load
from rediffuse.outputs import check_replaceable
from rediffuse.pictures import PICTURES, columns_for, grid, save_picture
from rediffuse.runs import Run
from rediffuse.session import Look, unseen

__all__ = ["generate_samples", "load", "sample", "train"]


def train(*words: str, root: str | Path | None = None, look: Look = unseen) -> Run:
    """Train a run as `rediffuse train WORDS` does; return it, for `load` and the like.

    Progress is printed; `look` is called with all metrics, for live curves. Ctrl-C ends training
    after the current step, with a checkpoint, but not in another thread than the main one, where
    Python handles no signals.

    Raises:
        RediffuseError: before anything is written, for what cannot work.
    """
    return trained(compose(words), root=root, look=look)[0]


def sample(
    model: Model,
    images: SupportsIndex | Iterable[SupportsIndex] = 64,
    *,
    solver: str | None = None,
    steps: SupportsIndex | None = None,
    grid: str | None = None,
    guidance: float | str | None = None,
    threshold: str | None = None,
    class_name: str | None = None,
    way: Way | None = None,
    seed: SupportsIndex = 0,
    batch_size: SupportsIndex | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> UInt8[np.ndarray, "count channels height width"]:
    """Draw images: so many, or those of the given numbers; image j depends on (seed, j) alone.

    What is left open is as the run's configuration says. Parts are given as on the command line:
    `solver="heun churn=40"`, `guidance=3`. Without `class_name`, classes take turns. A `way` starts
    from given images (`rediffuse.drawing.varied`, `painted`, `rebuilt`), then without a class.
    `done` is told after each step how many images that comes to.

    `images` may also be a range, or numbers of NumPy.

    Raises:
        ConfigError: for what the model cannot do, and for arguments of another type.
    """
    if not isinstance(model, Model):
        raise ConfigError(
            f"sample draws from a model, not from {type(model).__name__}; "
            "rediffuse.load(RUN) gives one"
        )
    numbers, number = _numbers(images), _whole("seed", seed, 0, 2**32)
    how_many = None if steps is None else _whole("steps", steps, 1, 2**31)
    at_once = None if batch_size is None else _whole("batch_size", batch_size, 1, 2**31)
    named = {"solver": solver, "grid": grid, "threshold": threshold, "class_name": class_name}
    for name, value in named.items():
        if not isinstance(value, str | None):
            raise ConfigError(f"{name}={value!r:.80}: expected a name, or None")
    if not isinstance(guidance, str | Real | None) or isinstance(guidance, bool):
        raise ConfigError(f"guidance={guidance!r:.80}: expected a number, or a name with arguments")
    if not isinstance(way, Way | None):
        raise ConfigError(f"way={way!r:.80}: expected one of rediffuse.drawing, as varied(...)")
    options = Options(
        solver=solver,
        steps=how_many,
        grid=grid,
        guidance=guidance if isinstance(guidance, str | None) else float(guidance),
        threshold=threshold,
    )
    how = wanted(model.config.sampling, options)
    check_sampling(model.config, how, model.denoiser.schedule, model.trusted)
    if way is None:
        classes = classes_for(numbers, model.class_names, class_name)
    else:
        classes = classes_of_given(model, numbers, class_name)
    job = Job(numbers, classes, number, at_once, way)
    return np.concatenate([pixels for _, pixels in draw(model, how, job, done)])


def generate_samples(
    run: str | Path | Run | Model,
    num_images: SupportsIndex | Iterable[SupportsIndex] = 36,
    output_path: str | Path = "samples.png",
    *,
    root: str | Path | None = None,
    **how: object,
) -> Path:
    """Draw images of a run into one PNG or JPEG, as the path ends; return the path.

    Other arguments are `sample`'s. A file that is there is replaced if an earlier call wrote it.

    Raises:
        RediffuseError: if there is no such run, it cannot do what is asked for, or the file is
            another's or cannot be written.
    """
    file = _picture(output_path)
    model = run if isinstance(run, Model) else load(run, root=root)
    pixels = sample(model, num_images, **how)  # type: ignore[arg-type]
    names = model.class_names if how.get("class_name") is None else ()
    try:
        return save_picture(grid(pixels, columns_for(len(pixels), names)), file, model.origin or {})
    except OSError as failed:
        raise ConfigError(f"{file} cannot be written ({failed.strerror or failed})") from None


def _picture(path: str | Path) -> Path:
    """Check where a picture is to be written."""
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise ConfigError(f"output_path={path!r:.80}: expected the path of a picture")
    file = Path(path).expanduser()
    if file.suffix.lower() not in PICTURES:
        raise ConfigError(f"{file}: expected a name that ends in {', '.join(PICTURES)}")
    check_replaceable(file)
    return file


def _numbers(images: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Image numbers from how many, or from which."""
    if isinstance(images, Iterable) and not isinstance(images, str | bytes | Mapping):
        numbers = tuple(_whole("images", image, 0, 2**63) for image in images)
    else:
        numbers = tuple(range(_whole("images", images, 1, 10_000_001)))
    if not numbers:
        raise ConfigError(f"images={images!r:.80}: expected 1 or more")
    return numbers


def _whole(name: str, value: object, least: int, end: int) -> int:
    """An integer, of Python or NumPy, in least <= value < end."""
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        with suppress(TypeError):  # an array of one dimension or of numbers that are not whole
            if least <= (number := operator.index(value)) < end:
                return number
    raise ConfigError(f"{name}={value!r:.80}: expected a whole number from {least} to {end - 1}")
