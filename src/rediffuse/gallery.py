"""`rediffuse sample`: image numbers in, PNG files, a grid and a manifest out."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rediffuse import outputs
from rediffuse.config.compose import part_from_file, typed_values
from rediffuse.config.schema import Data, Part, Sampling
from rediffuse.data.ahead import ahead
from rediffuse.data.decoding import KINDS, read, to_square
from rediffuse.data.pixels import to_model, to_uint8
from rediffuse.data.sources.folder import image_names
from rediffuse.drawing import (
    Job,
    Way,
    as_walked,
    between_images,
    between_seeds,
    classes_for,
    classes_of_given,
    draw,
    painted,
    picked,
    rebuilt,
    share,
    states,
    uncompiled,
    varied,
)
from rediffuse.errors import ConfigError, DataError, RunError
from rediffuse.legality import check_sampling
from rediffuse.models import Model, find, load
from rediffuse.pictures import Pixels, columns_for, grid, save_film, save_png
from rediffuse.progress import Progress
from rediffuse.runs import Run
from rediffuse.training.devices import Devices, choose
from rediffuse.words import masked, say


@dataclass(frozen=True)
class Options:
    """What `rediffuse sample` was asked for; None leaves it as the run's configuration says."""

    root: Path | None = None
    count: int | None = None
    seeds: str | None = None
    seed: int = 0
    class_name: str | None = None
    guidance: str | float | None = None
    guide_by: str | None = None
    solver: str | None = None
    grid: str | None = None
    threshold: str | None = None
    steps: int | None = None
    inputs: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    resamplings: int = 1
    jump: int = 1
    reconstruct: bool = False
    interpolate: str | None = None
    weights: str = "average"
    checkpoint: str = "latest"
    batch_size: int | None = None
    output_dir: Path | None = None
    film: bool = False
    compile: bool = False
    device: str = "auto"
    trust: tuple[str, ...] = ()


def sample(word: str, options: Options) -> int:
    """Draw images from a run into a folder: a PNG each, a grid, a manifest. Return the exit code.

    Raises:
        RediffuseError: if the run, its checkpoint or what is asked for cannot be used.
    """
    devices = choose(options.device)
    with devices.main_talks():
        return _sample(find(word, options.root), options, devices)


def _sample(run: Run, options: Options, devices: Devices) -> int:
    model = opened(run, options)
    check_equal(model, devices)
    how, job = settled(model, options)
    assert model.origin
    name = f"{model.origin['checkpoint']}-{_job_name(how, job, options)}"
    folder = options.output_dir or run.samples / name
    shared = common(model, how, job, options)
    each = {j: class_of(model, job, k) for k, j in enumerate(job.images)}
    files = [{"image": j, "file": _file_of(j), "class": each[j]} for j in job.images]
    facts = {**shared, "images": files}
    names = [*(str(one["file"]) for one in files), "grid.png", *["film.gif"] * options.film]
    of_a_job = {name: facts[name] for name in _OF_A_JOB}
    with ExitStack() as held:
        devices.on_main(lambda: held.enter_context(outputs.folder_of(of_a_job, folder, names)))
        facts_of = [of_image(shared, j, each[j]) for j in job.images]
        pixels, before = _drawn(model, how, job, folder, facts_of, devices)
        if not devices.is_main:
            return 0
        by_class = model.class_names if job.way is None and options.class_name is None else ()
        columns = columns_for(len(pixels), by_class)
        picture = save_png(grid(pixels, columns), folder / "grid.png", shared)
        if options.film:
            few = replace(job, images=job.images[:16], classes=job.classes and job.classes[:16])
            steps = states(uncompiled(model), how, few)
            frames = (to_uint8(x, *_levels(model)).cpu().numpy() for x in steps)
            save_film(map(grid, frames), folder / "film.gif")
        if options.reconstruct:
            facts["psnr_db"] = _psnr_of_inputs(model, job, options, pixels)
        outputs.finish(folder, facts)
    weights, step = model.origin["weights"], model.origin["checkpoint"]
    say(f"{len(pixels)} images from {weights} weights at {step}")
    if before:
        say(f"  {before} of them were there already, drawn by the same job")
    if _nobody_knows_the_class(model, job):
        say("  class none, as nobody knows that of a given image; --class names one")
    say(f"  in    {folder}")
    say(f"  grid  {picture}")
    if options.reconstruct:
        say(f"  PSNR  {min(facts['psnr_db']):.1f} dB at worst")
    return 0


def _drawn(
    model: Model,
    how: Sampling,
    job: Job,
    folder: Path,
    facts_of: Sequence[Mapping[str, Any]],
    devices: Devices,
) -> tuple[Pixels, int]:
    """All images of a job, and how many of them were in its folder; the others are drawn into it.

    Every process gets all of them.
    """
    files, size = [folder / _file_of(j) for j in job.images], model.config.data.image_size
    there = devices.on_main(lambda: _there(files, facts_of, size))
    missing = [k for k in range(len(job.images)) if k not in there]
    mine = share(picked(job, missing), devices.rank, devices.ranks)
    known = dict(zip(job.images, facts_of, strict=True))

    def write(batch: tuple[tuple[int, ...], Pixels]) -> Pixels:
        numbers, pixels = batch
        for j, image in zip(numbers, pixels, strict=True):
            save_png(image.transpose(1, 2, 0), folder / _file_of(j), known[j])
        return pixels

    # One batch is written while the next one is drawn.
    with Progress(len(mine.images)) as bar, ThreadPoolExecutor(1, "writing") as pool:
        drawn = list(ahead(pool, write, draw(model, how, mine, bar.move), 1))
    fresh = (image for theirs in devices.everyones(drawn) for some in theirs for image in some)
    images = [there[k] if k in there else next(fresh) for k in range(len(job.images))]
    return np.stack(images), len(there)


def _there(
    files: Sequence[Path], facts_of: Sequence[Mapping[str, Any]], size: int
) -> dict[int, np.ndarray]:
    """Which of a job's images its folder has, by their place in the job."""
    there = {}
    for k, (file, facts) in enumerate(zip(files, facts_of, strict=True)):
        if (pixels := outputs.pixels_in(file, facts, size)) is not None:
            there[k] = pixels.transpose(2, 0, 1)
        else:
            outputs.check_replaceable(file)
    return there


def _file_of(image: int) -> str:
    return f"{image:06d}.png"


def _psnr_of_inputs(model: Model, job: Job, options: Options, pixels: Pixels) -> list[float]:
    assert options.inputs
    inputs = _inputs(model.config.data, options.inputs)
    given = to_uint8(inputs[torch.tensor(job.images) % len(inputs)], *_levels(model))
    return psnr(given.numpy(), pixels)


def opened(run: Run, options: Options) -> Model:
    """The model of the checkpoint and weights that are asked for.

    Raises:
        RediffuseError: if there is none.
    """
    return load(
        run.directory,
        weights=options.weights,
        which=options.checkpoint,
        device=options.device,
        compiled=options.compile,
        trusted=options.trust,
    )


def check_equal(model: Model, devices: Devices) -> None:
    """Hold every process' checkpoint to that of the main process, before they share a job.

    Raises:
        RunError: naming a process that has opened another one.
    """
    if found := devices.first_difference(model.origin or {}):
        raise RunError(
            f"{found} of the run, and would draw from another model; name a --checkpoint that all "
            "of them have"
        )


def settled(model: Model, options: Options) -> tuple[Sampling, Job]:
    """How to draw, and what, from a model.

    Raises:
        RediffuseError: if it cannot do what is asked for.
    """
    how = wanted(model.config.sampling, options)
    if options.guide_by and how.guidance.arguments.get("scale") == 1:
        raise ConfigError("--guide-by needs --guidance above 1; at 1 nobody asks the weaker model")
    check_sampling(model.config, how, model.denoiser.schedule, model.trusted)
    job = wanted_job(model, options)
    if _nobody_knows_the_class(model, job):
        how = _unguided(how, options)
    return as_walked(how, job), job


def common(model: Model, how: Sampling, job: Job, options: Options) -> dict[str, Any]:
    """What all images of a job share, as plain data."""
    return {
        **(model.origin or {}),
        "seed": job.seed,
        "sampling": how.model_dump(mode="json"),  # where JSON has no infinity, null
        "edit": _edit(options),
        **_given(job),
        "device": str(model.device),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "precision": str(model.precision).removeprefix("torch."),
        "compiled": model.compiled,
        "versions": {"rediffuse": version("rediffuse"), "torch": torch.__version__},
    }


def of_image(shared: Mapping[str, Any], image: int, class_name: str | None) -> dict[str, Any]:
    """What is written into an image's own file; of the files that were given, their names alone."""
    edit = {k: Path(v).name if k in _FILES else v for k, v in shared["edit"].items()}
    return {**shared, "edit": edit, "image": image, "class": class_name}


_FILES = "input", "mask"


def wanted(how: Sampling, options: Options) -> Sampling:
    """The run's way of sampling with what was asked for in its place."""
    changes: dict[str, Any] = {}
    for axis in ("solver", "grid", "threshold"):
        if (asked := getattr(options, axis)) is not None:
            changes[axis] = _part(axis, asked)
    if options.guidance is not None:
        changes["guidance"] = _guidance(str(options.guidance), how.guidance)
    if options.steps is not None:
        changes["steps"] = options.steps
    return how.model_copy(update=changes)


def wanted_job(model: Model, options: Options) -> Job:
    """Which images, of which classes, and how they are made if not from noise alone.

    Raises:
        ConfigError: for options that do not go together.
    """
    _check_options(options)
    images, way = image_numbers(options.seeds, options.count), None
    if options.interpolate:
        images = tuple(range(options.count or 8))
        way, classes = _between(model, images, options)
    elif options.inputs:
        inputs = _inputs(model.config.data, options.inputs)
        images = images if options.seeds or options.count else tuple(range(len(inputs)))
        way = _way(model.config.data, inputs, options)
        classes = classes_of_given(model, images, options.class_name)
    else:
        classes = classes_for(images, model.class_names, options.class_name)
    weaker = _weaker(model, options) if options.guide_by else None
    return Job(images, classes, options.seed, options.batch_size, way, weaker)


def image_numbers(seeds: str | None, count: int | None) -> tuple[int, ...]:
    """Which images: `0-63`, `3,5,8`, a count from 0 on, or 64.

    Raises:
        ConfigError: for what is not a list of numbers or ranges.
    """
    if (count or 0) > _MOST_IMAGES:
        raise ConfigError(f"--n {count}: more than {_MOST_IMAGES:,} images in one job")
    if seeds is None:
        return tuple(range(count or 64))
    numbers: list[int] = []
    for part in seeds.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise ConfigError(
                f"--seeds {seeds[:80]}: expected numbers and ranges, such as 0-63 or 3,5,8"
            )
        start, end = _image_number("--seeds", first), _image_number("--seeds", last or first)
        if len(numbers) + end - start >= _MOST_IMAGES:
            raise ConfigError(f"--seeds {seeds}: more than {_MOST_IMAGES:,} images in one job")
        numbers += range(start, end + 1)
    if not numbers:
        raise ConfigError(f"--seeds {seeds} names 0 images; a range goes up, as 3-5")
    if count is not None and count != len(numbers):
        raise ConfigError(f"--seeds {seeds} names {len(numbers)} images, --n {count}")
    return tuple(numbers)


_MOST_IMAGES = 10_000_000


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal()


def _image_number(option: str, word: str) -> int:
    if len(word) > 19 or int(word) >= 2**63:
        raise ConfigError(f"{option} {word[:30]}: an image's number is below 2^63")
    return int(word)


def psnr(given: Pixels, drawn: Pixels) -> list[float]:
    """Peak signal-to-noise ratio of each image in dB; equal images have 120, not infinity."""
    error = np.square(given.astype(np.float64) - drawn).mean(axis=(1, 2, 3))
    return [float(value) for value in 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-12))]


def _guidance(asked: str, has: Part) -> Part:
    """`3` for the run's own guidance at scale 3, or `projected scale=3 parallel=0`."""
    try:
        scale = float((asked.split() or [""])[0])
    except ValueError:
        given = {name: has.arguments[name] for name in {"scale"} & has.arguments.keys()}
        return _part("guidance", asked, given)
    if not math.isfinite(scale):
        raise ConfigError(f"--guidance {asked}: expected a finite number")
    return _part("guidance", asked, {**has.model_dump(), "scale": scale})


def _part(axis: str, asked: str, given: Mapping[str, Any] | None = None) -> Part:
    """`heun churn=40` as a part: what its file says, then what is given, then what was typed."""
    name, *words = asked.split() or [""]
    if not name:
        raise ConfigError(f"--{axis} is empty; give a name, or leave it away")
    typed = typed_values(words)
    own = {key: value for key, value in typed if key != "name" and key.isidentifier()}
    if len(own) < len(typed):
        raise ConfigError(f"--{axis} {asked}: the name comes first, then each key=value once")
    part = {"name": name, **part_from_file(axis, name), **(given or {}), **own}
    return Part.model_validate(part)


def _check_options(options: Options) -> None:
    given = {
        "--mask": options.mask is not None,
        "--strength": options.strength is not None,
        "--reconstruct": options.reconstruct,
        "--interpolate": options.interpolate is not None,
    }
    ways = [name for name, asked in given.items() if asked]
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} do not go together; use one of them")
    if ways and ways != ["--interpolate"] and not options.inputs:
        raise ConfigError(f"{ways[0]} needs --input, an image or a folder of images")
    if options.inputs and options.interpolate:
        raise ConfigError("--interpolate names its own images; leave --input away")
    if options.interpolate and options.seeds:
        raise ConfigError("--interpolate names its own images; use --n for how many")
    if not options.mask and (options.resamplings, options.jump) != (1, 1):
        raise ConfigError("--resamplings and --jump are for inpainting; add --mask")
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: expected 1 or more")
    if options.strength is not None and not 0 <= options.strength <= 1:
        raise ConfigError(f"--strength {options.strength:g}: expected 0 (as given) to 1 (new)")


def _way(data: Data, inputs: Tensor, options: Options) -> Way:
    if options.mask:
        anew = _squares(data, [options.mask], channels=1) >= 128  # white is painted
        way = painted(inputs, (~anew).float(), options.resamplings, options.jump)
        return way._replace(given=_digest_of(inputs, anew))
    if options.reconstruct:
        way = rebuilt(inputs)
    else:
        way = varied(inputs, _STRENGTH if options.strength is None else options.strength)
    return way._replace(given=_digest_of(inputs))


_STRENGTH = 0.6


def _between(
    model: Model, images: tuple[int, ...], options: Options
) -> tuple[Way, tuple[int, ...] | None]:
    """How to go from one image to another, and with which class."""
    ends = [end.strip() for end in (options.interpolate or "").split(",")]
    numbers = sum(map(_is_number, ends))
    if len(ends) != 2 or numbers == 1 or "" in ends:
        raise ConfigError(
            f"--interpolate {options.interpolate}: expected two numbers, as 3,17, or two files; "
            "a file whose name is a number is ./3"
        )
    if numbers == 0:
        data = model.config.data
        first, last = (_inputs(data, Path(end)) for end in ends)
        way = between_images(first[:1], last[:1], len(images))
        way = way._replace(given=_digest_of(first[:1], last[:1]))
        return way, classes_of_given(model, images, options.class_name)
    first_number, last_number = (_image_number("--interpolate", end) for end in ends)
    pair = classes_for((first_number, last_number), model.class_names, options.class_name)
    if pair and pair[0] != pair[1]:
        raise ConfigError(
            f"--interpolate {options.interpolate}: these images are of the classes "
            f"{' and '.join(model.class_names[c] for c in pair)}; add --class for one"
        )
    way = between_seeds(first_number, last_number, len(images), options.seed)
    return way, pair and pair[:1] * len(images)


def _weaker(model: Model, options: Options) -> Model:
    """The model that guides by being worse: a checkpoint of this run, or of another one."""
    assert model.origin
    assert options.guide_by
    run, colon, which = options.guide_by.rpartition(":")
    if not colon and not _is_checkpoint(which):
        raise ConfigError(
            f"--guide-by {which}: expected a checkpoint (latest, best, or a step's number), or "
            f"another run's, as {which}:latest"
        )
    weaker = load(
        find(run or model.origin["run"], options.root).directory,
        which=which,
        weights=options.weights,
        device=options.device,
        compiled=options.compile,
        trusted=options.trust,
    )
    mine, theirs = (_must_agree(m) for m in (model, weaker))
    for what in mine:
        if mine[what] != theirs[what]:
            raise ConfigError(f"--guide-by {options.guide_by}: its {what} is not this model's")
    # A schedule that learns has moved since; its labels are noise levels, so the newer one serves.
    return replace(weaker, denoiser=replace(weaker.denoiser, schedule=model.denoiser.schedule))


def _is_checkpoint(word: str) -> bool:
    return word in ("latest", "best") or _is_number(word.removeprefix("step-"))


def _nobody_knows_the_class(model: Model, job: Job) -> bool:
    """Whether all images are drawn without a class by a model that has classes."""
    return job.classes is not None and {*job.classes} == {model.null_class}


def _unguided(how: Sampling, options: Options) -> Sampling:
    """Without a class both sides of guidance say the same, unless a weaker model is one of them."""
    if options.guide_by or how.guidance.arguments.get("scale", 1) == 1:
        return how
    if options.guidance is not None:
        raise ConfigError(
            f"--guidance {options.guidance} guides towards a class, and nobody knows that of a "
            "given image; add --class, or leave --guidance away"
        )
    guidance = Part.model_validate({**how.guidance.model_dump(), "scale": 1.0})
    return how.model_copy(update={"guidance": guidance})


def _must_agree(model: Model) -> dict[str, Any]:
    data = model.config.data.model_dump(include={"channels", "image_size", "mean", "std"})
    return {"schedule": model.config.schedule, "class_names": model.class_names, **data}


def _inputs(data: Data, path: Path) -> Tensor:
    """The given images in the model's range: one file, or all of a folder in alphabetical order."""
    files = [path]
    if path.is_dir():
        files = [path / name for name in image_names(path).images]
        if not files:
            raise DataError(f"{path}: there is no {KINDS} image in this folder")
    return to_model(_squares(data, files), data.mean, data.std)


def _squares(data: Data, files: list[Path], channels: int | None = None) -> Tensor:
    squares = []
    for file in files:
        try:
            squares.append(
                to_square(read(file), data.image_size, channels or data.channels, data.fit)
            )
        except DataError as refused:
            raise DataError(f"{file}: {refused}") from None
    return torch.from_numpy(np.stack(squares))


def _levels(model: Model) -> tuple[float | list[float], float | list[float]]:
    return model.config.data.mean, model.config.data.std


def _edit(options: Options) -> dict[str, Any]:
    """What was asked for beside plain sampling."""
    asked = {
        "input": options.inputs and masked(str(options.inputs)),
        "strength": options.strength,
        "mask": options.mask and str(options.mask),
        "resamplings": options.resamplings if options.mask else None,
        "jump": options.jump if options.mask else None,
        "reconstruct": options.reconstruct or None,
        "interpolate": options.interpolate,
        "guide_by": options.guide_by,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _given(job: Job) -> dict[str, Any]:
    """What the pixels depend on beside numbers: digests of given pictures, the guiding weights."""
    found: dict[str, Any] = {}
    if job.way and job.way.given:
        found["pictures"] = job.way.given
    if job.weaker:
        found["guide_by"] = job.weaker.origin
    return {"given": found} if found else {}


def _digest_of(*pictures: Tensor) -> str:
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in pictures)).hexdigest()[:16]


def _job_name(how: Sampling, job: Job, options: Options) -> str:
    which = [options.weights, job.weaker.origin if job.weaker else None]
    asked = json.dumps([how.model_dump(mode="json"), job.images, job.classes, job.seed, which])
    edit = json.dumps(_edit(options)) if _edit(options) else ""
    digest = hashlib.sha256(f"{asked}{edit}".encode()).hexdigest()[:8]
    return f"{how.solver.name}-{how.steps}-{digest}"


def class_of(model: Model, job: Job, k: int) -> str | None:
    """The class of a job's k-th image, if it is drawn for one."""
    if job.classes is None or job.classes[k] == len(model.class_names):
        return None
    return model.class_names[job.classes[k]]


_OF_A_JOB = ("run", "checkpoint", "weights", "seed", "images", "sampling", "edit")
