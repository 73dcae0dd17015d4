"""A run as an MLflow model, for `mlflow models serve`: rows that ask for images in, PNGs out.

The model is a run's folder with what sampling needs and nothing else: configuration, classes, and
the weights of one checkpoint, as safetensors. MLflow calls `_load_pyfunc` by its name.
"""

import base64
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rediffuse.build import own_packages
from rediffuse.config.compose import checked, read_yaml
from rediffuse.config.schema import Sampling
from rediffuse.drawing import Job, classes_for, draw
from rediffuse.errors import ConfigError, RediffuseError
from rediffuse.gallery import Options, wanted
from rediffuse.legality import check_sampling
from rediffuse.models import Model, load
from rediffuse.runs import Run
from rediffuse.training import committed

MOST_IMAGES = 4096
"""In one request, whose answer is one JSON."""


def export(directory: Path, folder: Path) -> dict[str, Any] | None:
    """Put what sampling needs of a run below `folder`; return what a request may leave open.

    None if the run has no checkpoint.
    """
    run = Run(directory)
    newest = committed.newest(run.checkpoints, set_aside=False)
    if newest is None:
        return None
    slim = Run(folder / run.id)
    slim.checkpoints.mkdir(parents=True)
    for file in (run.config, run.environment):
        shutil.copyfile(file, slim.directory / file.name)
    committed.copy_for_sampling(newest, slim.checkpoints)
    return left_open(checked(read_yaml(run.config)).sampling)


def left_open(how: Sampling) -> dict[str, Any]:
    """The parameters of a request, with their defaults; an empty solver is the run's own."""
    scale = float(how.guidance.arguments.get("scale", 1.0))
    return {"seed": 0, "steps": how.steps, "guidance": scale, "solver": ""}


TRUST = "REDIFFUSE_TRUST"
"""The environment variable that names, with commas, packages that a model may import."""


def _load_pyfunc(data_path: str) -> "Generator":
    """Load a model; one with parts of the user's own needs their packages in $REDIFFUSE_TRUST.

    Raises:
        ConfigError: naming the packages to be trusted, or that cannot be imported.
    """
    (directory,) = Path(data_path).iterdir()
    trusted = [name for name in os.environ.get(TRUST, "").split(",") if name]
    needed = own_packages(checked(read_yaml(Run(directory).config)))
    if missing := [name for name in needed if name not in trusted]:
        raise ConfigError(
            f"this model has parts of {', '.join(missing)}; if you trust that code, set "
            f"{TRUST}={','.join([*trusted, *missing])}, and PYTHONPATH to where it lies"
        )
    return Generator(load(directory, trusted=trusted))


class Generator:
    """Draws image `image` of class `class` for each row; without a class it is that image's turn.

    They are the pixels of `rediffuse sample` for the same numbers.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._left_open = left_open(model.config.sampling)

    def predict(self, asked: Any, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Answer a data frame with a row per image: its number, class and PNG in base64.

        Raises:
            MlflowException: for what the model cannot do, which its server answers with 400.
        """
        from mlflow.exceptions import MlflowException

        rows = asked.to_dict("records")
        try:
            return self._drawn(rows, {**self._left_open, **(params or {})})
        except RediffuseError as refused:
            raise MlflowException.invalid_parameter_value(str(refused)) from None

    def _drawn(
        self, rows: Sequence[Mapping[str, Any]], params: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        job = self._job(rows, _whole("seed", params["seed"], 2**32))
        how = self._way(params)
        pngs = [_png(image) for _, pixels in draw(self.model, how, job) for image in pixels]
        names = (
            [self.model.class_names[c] for c in job.classes] if job.classes else [""] * len(pngs)
        )
        return [
            {"image": number, "class": name, "png": png}
            for number, name, png in zip(job.images, names, pngs, strict=True)
        ]

    def _job(self, rows: Sequence[Mapping[str, Any]], seed: int) -> Job:
        if not 1 <= len(rows) <= MOST_IMAGES:
            raise ConfigError(f"expected 1 to {MOST_IMAGES} rows, not {len(rows)}")
        numbers = tuple(_whole("image", row["image"], 2**63) for row in rows)
        named = zip(numbers, (row.get("class") for row in rows), strict=True)
        classes = [
            known for image, name in named if (known := self._class(image, name)) is not None
        ]
        return Job(numbers, tuple(classes) or None, seed)

    def _class(self, image: int, name: object) -> int | None:
        asked = name if isinstance(name, str) and name else None  # a data frame's gap is NaN
        found = classes_for([image], self.model.class_names, asked)
        return found[0] if found else None

    def _way(self, params: Mapping[str, Any]) -> Sampling:
        given = {name: params[name] for name in params if params[name] != self._left_open[name]}
        steps = given.get("steps")
        options = Options(
            solver=given.get("solver"),
            steps=None if steps is None else _whole("steps", steps, 2**31),
            guidance=given.get("guidance"),
        )
        model = self.model
        how = wanted(model.config.sampling, options)
        check_sampling(model.config, how, model.denoiser.schedule, model.trusted)
        return how


def _whole(name: str, value: Any, end: int) -> int:
    """A whole number of a request, which may come as a float."""
    try:
        number = int(value)
        if number == value and 0 <= number < end:
            return number
    except (TypeError, ValueError, OverflowError):  # None, a word, NaN, infinity
        pass
    raise ConfigError(f"{name}={value!r:.80}: expected a whole number from 0 to {end - 1}")


def _png(image: Any) -> str:
    """One image as `rediffuse sample` writes it, in base64."""
    written = io.BytesIO()
    pixels = image.transpose(1, 2, 0)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()
