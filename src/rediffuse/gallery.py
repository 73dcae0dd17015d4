"""Sampling jobs: image numbers in, PNG files, a grid and a manifest out."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from rediffuse import build
from rediffuse.config.schema import Config, Sampling
from rediffuse.data.pixels import to_uint8
from rediffuse.denoiser import Denoise, Denoiser
from rediffuse.errors import ConfigError
from rediffuse.guidance.clipping import clipping
from rediffuse.randomness import ImageNoise
from rediffuse.sampling import trajectory
from rediffuse.words import did_you_mean

Pixels = UInt8[np.ndarray, "count channels height width"]


@dataclass(frozen=True)
class Model:
    """A network that can be sampled: what it was trained as, and the classes it knows (none: unconditional)."""

    config: Config
    network: nn.Module
    class_names: tuple[str, ...]
    device: torch.device
    trusted: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Job:
    """Which images to draw: their numbers, one class each (None: unconditional), and how many at once."""

    images: tuple[int, ...]
    classes: tuple[int, ...] | None = None
    seed: int = 0
    batch_size: int = 64


def classes_for(
    images: Sequence[int], class_names: Sequence[str], wanted: str | None = None
) -> tuple[int, ...] | None:
    """One class per image: the wanted one, or image j's turn, j modulo the number of classes.

    Raises:
        ConfigError: for a class that the model does not know.
    """
    if not class_names:
        if wanted is not None:
            raise ConfigError(f"class {wanted!r}: this model was trained without classes")
        return None
    if wanted is None:
        return tuple(j % len(class_names) for j in images)
    if wanted not in class_names:
        raise ConfigError(
            f"class {wanted!r}: there is none{did_you_mean(wanted, class_names)}; there are "
            f"{', '.join(class_names)}"
        )
    return (class_names.index(wanted),) * len(images)


def states(model: Model, how: Sampling, job: Job) -> Iterator[Tensor]:
    """Yield every state of one batch of images, from noise to data, in the model's range."""
    data = model.config.data
    denoiser = build.denoiser(model.config, model.network.eval(), model.trusted)
    times = build.grid(how.grid, model.trusted)(denoiser.schedule, how.steps)
    like = torch.empty(
        len(job.images), data.channels, data.image_size, data.image_size, device=model.device
    )
    return trajectory(
        _guided(model, denoiser, how, job),
        denoiser.schedule,
        build.solver(how.solver, model.trusted),
        times,
        ImageNoise(job.seed, torch.tensor(job.images)),
        like,
    )


def draw(model: Model, how: Sampling, job: Job) -> Iterator[tuple[tuple[int, ...], Pixels]]:
    """Yield the finished images batch by batch, with their numbers."""
    data = model.config.data
    for batch in _batches(job):
        for x in states(model, how, batch):
            pass
        yield batch.images, to_uint8(x, data.mean, data.std).cpu().numpy()


def grid(images: Pixels, columns: int | None = None, gap: int = 2) -> UInt8[np.ndarray, "h w c"]:
    """Lay images out in rows, left to right, on white."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for k, image in enumerate(images):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return canvas


def columns_for(count: int, class_names: Sequence[str]) -> int:
    """One column per class where that makes a picture, else a square."""
    classes = len(class_names)
    return classes if 1 < classes <= 20 and count >= classes else math.ceil(math.sqrt(count))


def save_png(pixels: UInt8[np.ndarray, "h w c"], file: Path) -> Path:
    """Write a PNG, complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    building = file.with_name(f".{file.name}.{os.getpid()}")
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(building, "PNG")
    building.replace(file)
    return file


def save_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write what was done beside what came of it."""
    building = folder / f".manifest.{os.getpid()}"
    building.write_text(json.dumps(facts, indent=1))
    building.replace(folder / "manifest.json")


def _batches(job: Job) -> Iterator[Job]:
    for start in range(0, len(job.images), job.batch_size):
        part = slice(start, start + job.batch_size)
        classes = job.classes[part] if job.classes is not None else None
        yield Job(job.images[part], classes, job.seed, job.batch_size)


def _guided(model: Model, denoiser: Denoiser, how: Sampling, job: Job) -> Denoise:
    denoise: Denoise = denoiser
    scale = how.guidance.arguments.get("scale", 1)
    if job.classes is not None:
        if scale != 1 and model.config.training.label_dropout == 0:
            raise ConfigError(
                "guidance needs a model that was also trained without its labels; this one had "
                "training.label_dropout=0, so only --guidance 1 works"
            )
        cond = torch.tensor(job.classes, device=model.device)
        null = torch.full_like(cond, len(model.class_names))
        denoise = build.bind("guidance", how.guidance, "sampling.guidance", model.trusted)(
            partial(denoiser, cond=cond), partial(denoiser, cond=null)
        )
    elif scale != 1:
        raise ConfigError("this model was trained without classes, so there is nothing to guide by")
    if how.clip:
        low, high = pixel_range(model.config.data.mean, model.config.data.std)
        denoise = clipping(denoise, denoiser.schedule, low=low, high=high)
    return denoise


def pixel_range(mean: float | list[float], std: float | list[float]) -> tuple[Tensor, Tensor]:
    """Where black and white lie in the model's range, per channel."""
    m, s = (torch.as_tensor(value).reshape(-1, 1, 1) for value in (mean, std))
    return (0 - m) / s, (1 - m) / s
