"""Sampling jobs: image numbers in, PNG files, a grid and a manifest out."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from rediffuse import build, runs
from rediffuse.config.compose import checked, read_yaml, typed_values
from rediffuse.config.schema import Config, Part, Sampling
from rediffuse.data.pixels import to_uint8
from rediffuse.denoiser import Denoise, Denoiser
from rediffuse.errors import CheckpointError, ConfigError
from rediffuse.guidance.clipping import clipping
from rediffuse.process import Prediction
from rediffuse.randomness import ImageNoise
from rediffuse.runs import Run
from rediffuse.sampling import trajectory
from rediffuse.training import checkpoint
from rediffuse.training.devices import PRECISIONS, choose, set_determinism
from rediffuse.words import did_you_mean

Pixels = UInt8[np.ndarray, "count channels height width"]


@dataclass(frozen=True)
class Model:
    """A network that can be sampled: what it was trained as, and the classes it knows, if any."""

    config: Config
    network: nn.Module
    class_names: tuple[str, ...]
    device: torch.device
    precision: torch.dtype = torch.float32
    trusted: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Job:
    """Which images to draw: their numbers, a class each (or None at all), and how many at once."""

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
        *_, x = states(model, how, _padded(batch))
        pixels = to_uint8(x[: len(batch.images)], data.mean, data.std)
        yield batch.images, pixels.cpu().numpy()


@dataclass(frozen=True)
class Options:
    """What `rediffuse sample` was asked for; None leaves it as the run's configuration says."""

    root: Path | None = None
    count: int | None = None
    seeds: str | None = None
    seed: int = 0
    class_name: str | None = None
    guidance: float | None = None
    solver: str | None = None
    grid: str | None = None
    steps: int | None = None
    clip: bool | None = None
    weights: str = "average"
    checkpoint: str = "latest"
    batch_size: int = 64
    output_dir: Path | None = None
    film: bool = False
    device: str = "auto"
    trust: tuple[str, ...] = ()


def sample(word: str, options: Options) -> int:
    """Draw images from a run into a folder: a PNG each, a grid, a manifest. Return the exit code.

    Raises:
        RediffuseError: if the run, its checkpoint or what is asked for cannot be used.
    """
    run = runs.find_run(runs.runs_root(options.root), word)
    model, step, weights = load(run, options)
    how = wanted(model.config.sampling, options)
    images = image_numbers(options.seeds, options.count)
    classes = classes_for(images, model.class_names, options.class_name)
    job = Job(images, classes, options.seed, options.batch_size)
    folder = options.output_dir or run.samples / _job_name(step, how, job)
    drawn = []
    with tqdm(total=len(images), unit="img", disable=not sys.stderr.isatty()) as bar:
        for numbers, pixels in draw(model, how, job):
            for j, image in zip(numbers, pixels, strict=True):
                save_png(image.transpose(1, 2, 0), folder / f"{j:06d}.png")
            drawn.append(pixels)
            bar.update(len(numbers))
    columns = columns_for(len(images), model.class_names if options.class_name is None else ())
    picture = save_png(grid(np.concatenate(drawn), columns), folder / "grid.png")
    facts = {
        "run": run.id,
        "checkpoint": step,
        "weights": weights,
        "seed": job.seed,
        "images": [
            {"image": j, "file": f"{j:06d}.png", "class": _class_name(model, job, k)}
            for k, j in enumerate(images)
        ],
        "sampling": how.model_dump(),
        "device": str(model.device),
        "versions": {"rediffuse": version("rediffuse"), "torch": torch.__version__},
    }
    save_manifest(folder, facts)
    if options.film:
        save_film(model, how, job, folder / "film.gif")
    print(f"{len(images)} images from {weights} weights at {step}: {folder}")
    print(f"  grid  {picture}")
    return 0


def load(run: Run, options: Options) -> tuple[Model, str, str]:
    """Build a run's network from its own configuration, with the weights asked for.

    Raises:
        RediffuseError: if there is no such checkpoint, or it does not verify.
    """
    config = checked(read_yaml(run.config))
    device = choose(options.device).device
    set_determinism(config.determinism, device, config.threads if device.type == "cpu" else None)
    names = tuple(json.loads(run.environment.read_text())["data"]["class_names"])
    network = build.network(config, len(names), options.trust)
    chosen = _checkpoint(run, options.checkpoint)
    which = options.weights if config.average.half_life_images else "raw"
    checkpoint.load_weights(network, chosen, which)
    precision = PRECISIONS[config.training.precision]
    model = Model(config, network.to(device), names, device, precision, options.trust)
    return model, chosen.name, which


def wanted(how: Sampling, options: Options) -> Sampling:
    """The run's way of sampling with what was asked for in its place."""
    changes: dict[str, Any] = {}
    for axis in ("solver", "grid"):
        if words := (getattr(options, axis) or "").split():
            arguments = dict(typed_values(words[1:]))
            changes[axis] = Part(name=words[0], **arguments)
    if options.guidance is not None:
        changes["guidance"] = Part.model_validate(
            {"name": how.guidance.name, "scale": options.guidance}
        )
    for name in ("steps", "clip"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    return how.model_copy(update=changes)


def image_numbers(seeds: str | None, count: int | None) -> tuple[int, ...]:
    """Which images: `0-63`, `3,5,8`, a count from 0 on, or 64.

    Raises:
        ConfigError: for what is not a list of numbers or ranges.
    """
    if seeds is None:
        return tuple(range(count or 64))
    numbers: list[int] = []
    for part in seeds.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(
                f"--seeds {seeds}: expected numbers and ranges, such as 0-63 or 3,5,8"
            )
        numbers += range(int(first), int(last or first) + 1)
        if len(numbers) > _MOST_IMAGES:
            raise ConfigError(f"--seeds {seeds}: more than {_MOST_IMAGES:,} images in one job")
    if not numbers or (count is not None and count != len(numbers)):
        raise ConfigError(f"--seeds {seeds} names {len(numbers)} images, --n {count}")
    return tuple(numbers)


_MOST_IMAGES = 10_000_000


def save_film(model: Model, how: Sampling, job: Job, file: Path, most: int = 16) -> None:
    """Write the way from noise to data of the first few images as a GIF."""
    classes = job.classes[:most] if job.classes is not None else None
    few = Job(job.images[:most], classes, job.seed, most)
    data = model.config.data
    frames = [grid(to_uint8(x, data.mean, data.std).cpu().numpy()) for x in states(model, how, few)]
    first, *rest = (Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in frames)
    first.save(file, save_all=True, append_images=rest, duration=80, loop=0)


def grid(
    images: Pixels, columns: int | None = None, gap: int = 2, least: int = 28
) -> UInt8[np.ndarray, "h w c"]:
    """Lay images out in rows, left to right, on white; tiny ones are enlarged to `least` pixels."""
    zoom = max(1, -(-least // images.shape[-1]))
    images = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
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


def _padded(job: Job, to: int = 8) -> Job:
    """Repeat the last image until the batch is a multiple of 8.

    Kernels add up in another order for other batch sizes; for multiples of 8 a CPU's agree to the
    last bit, so an image does not depend on its neighbours. They are also several times faster than
    for 7.
    """
    more = -len(job.images) % to
    classes = job.classes and job.classes + job.classes[-1:] * more
    return replace(job, images=job.images + job.images[-1:] * more, classes=classes)


def _guided(model: Model, denoiser: Denoiser, how: Sampling, job: Job) -> Denoise:
    told = _in_precision(model, denoiser)
    denoise: Denoise = told
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
            partial(told, cond=cond), partial(told, cond=null)
        )
    elif scale != 1:
        raise ConfigError("this model was trained without classes, so there is nothing to guide by")
    if how.clip:
        low, high = pixel_range(model.config.data.mean, model.config.data.std)
        denoise = clipping(denoise, denoiser.schedule, low=low, high=high)
    return denoise


def _in_precision(model: Model, denoiser: Denoiser) -> Callable[..., Prediction]:
    """Let the network compute as it was trained; what the solver sees stays in float32."""
    if model.precision is torch.float32:
        return denoiser

    def denoise(x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Prediction:
        with torch.autocast(model.device.type, model.precision):
            return denoiser(x_t, t, cond)

    return denoise


def pixel_range(mean: float | list[float], std: float | list[float]) -> tuple[Tensor, Tensor]:
    """Where black and white lie in the model's range, per channel."""
    m, s = (torch.as_tensor(value).reshape(-1, 1, 1) for value in (mean, std))
    return (0 - m) / s, (1 - m) / s


def _checkpoint(run: Run, which: str) -> Path:
    """Latest, best, or the step of that number."""
    if which == "latest":
        found = checkpoint.newest(run.checkpoints, print)
    elif which == "best":
        found = checkpoint.best(run.checkpoints)
    else:
        found = run.checkpoints / f"step-{int(which):08d}" if which.isdigit() else None
    there = checkpoint.checkpoints(run.checkpoints)
    if found not in there or found is None:
        names = ", ".join(c.name for c in there) or "none yet"
        raise CheckpointError(f"run {run.id} has no checkpoint '{which}'; it has {names}")
    return found


def _job_name(step: str, how: Sampling, job: Job) -> str:
    asked = json.dumps([how.model_dump(mode="json"), job.images, job.classes, job.seed])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    return f"{step}-{how.solver.name}-{how.steps}-{digest}"


def _class_name(model: Model, job: Job, k: int) -> str | None:
    return model.class_names[job.classes[k]] if job.classes is not None else None
