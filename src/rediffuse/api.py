"""The same as the command line, from Python."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from rediffuse.config.compose import compose
from rediffuse.drawing import Job, Way, classes_for, classes_of_given, draw
from rediffuse.errors import ConfigError
from rediffuse.gallery import Options, wanted
from rediffuse.launch import trained
from rediffuse.legality import check_sampling
from rediffuse.models import Model, load
from rediffuse.pictures import columns_for, grid, save_png
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
    images: int | Sequence[int] = 64,
    *,
    solver: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    guidance: float | str | None = None,
    threshold: str | None = None,
    class_name: str | None = None,
    way: Way | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> UInt8[np.ndarray, "count channels height width"]:
    """Draw images: so many, or those of the given numbers; image j depends on (seed, j) alone.

    What is left open is as the run's configuration says. Parts are given as on the command line:
    `solver="heun churn=40"`, `guidance=3`. Without `class_name`, classes take turns. A `way` starts
    from given images (`rediffuse.drawing.varied`, `painted`, `rebuilt`), then without a class.
    `done` is told after each step how many images that comes to.

    Raises:
        ConfigError: for what the model cannot do.
    """
    numbers = tuple(range(images)) if isinstance(images, int) else tuple(images)
    none_at_once = batch_size is not None and batch_size < 1
    if not numbers or min(numbers) < 0 or max(numbers) >= 2**63 or none_at_once:
        raise ConfigError(
            f"images={images!r:.80}, batch_size={batch_size}: expected 1 or more of each, and "
            "images numbered from 0 to below 2^63"
        )
    options = Options(
        solver=solver,
        steps=steps,
        grid=grid,
        guidance=guidance,
        threshold=threshold,
    )
    how = wanted(model.config.sampling, options)
    check_sampling(model.config, how, model.denoiser.schedule, model.trusted)
    if way is None:
        classes = classes_for(numbers, model.class_names, class_name)
    else:
        classes = classes_of_given(model, numbers, class_name)
    job = Job(numbers, classes, seed, batch_size, way)
    return np.concatenate([pixels for _, pixels in draw(model, how, job, done)])


def generate_samples(
    run: str | Path | Run | Model,
    num_images: int = 36,
    output_path: str | Path = "samples.png",
    *,
    root: str | Path | None = None,
    **how: object,
) -> Path:
    """Draw images of a run into one picture; return its path. Other arguments are `sample`'s.

    Raises:
        RediffuseError: if there is no such run, or it cannot do what is asked for.
    """
    model = run if isinstance(run, Model) else load(run, root=root)
    pixels = sample(model, num_images, **how)  # type: ignore[arg-type]
    names = model.class_names if how.get("class_name") is None else ()
    return save_png(grid(pixels, columns_for(num_images, names)), Path(output_path))
