"""From a model and image numbers to images, batch by batch.

Image j depends on (seed, j) alone: on no neighbour, and on no other job. On a CPU that holds to the
last bit, since kernels for another number of images, or for another place among them, may add up in
another order: there every batch has 16 rows, and image j is in row j modulo 16 (`CPU_ROWS`).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rediffuse import build
from rediffuse.config.schema import Part, Sampling
from rediffuse.data.pixels import pixel_range, to_uint8
from rediffuse.denoiser import Denoise
from rediffuse.editing import Interpolated, image_to_image, inpaint, slerp
from rediffuse.errors import ConfigError
from rediffuse.guidance import apart, sides
from rediffuse.inversion import inverted
from rediffuse.models import Model
from rediffuse.networks.replay import Replay
from rediffuse.pictures import Pixels
from rediffuse.process import Prediction, Schedule
from rediffuse.randomness import ImageNoise
from rediffuse.sampling import trajectory, walk
from rediffuse.solvers import Noise, Solver
from rediffuse.training import memory
from rediffuse.words import did_you_mean

CPU_ROWS = 16
"""Rows of every batch that is denoised on a CPU; rows that no image is in are filled.

With one thread, oneDNN sums 1x1 convolutions of 8 images in another order than those of 16 or more;
with four, some rows of 40 differ. 16 is nearly as fast as 64 (92 % on 28x28 pixels, 68 % for the
smallest networks), takes less memory, and a single image does not wait for 63 others.
"""


class Setting(NamedTuple):
    """What is the same for every way of making images; `like` has shape, dtype and device."""

    denoise: Denoise
    schedule: Schedule
    solver: Solver
    times: Tensor
    noise: Noise
    like: Tensor


Look = Callable[[Tensor, Tensor, Tensor], None]


class Way(NamedTuple):
    """How the images of given numbers are made: `walk` yields every state.

    It may ask for a fresh denoiser for every further walk, since some remember what they said. A
    `plain` way undoes steps of DDIM, which no threshold may bend. `look` is called with x_t, t and
    x_0 of the job's images after every evaluation; what it raises ends the walk. `given` is a
    digest of the pictures that the images are made from, if any.
    """

    walk: Callable[[Setting, Tensor, Callable[[], Denoise]], Iterator[Tensor]]
    plain: bool = False
    look: Look | None = None
    given: str = ""


@dataclass(frozen=True)
class Job:
    """Which images to draw: their numbers, a class each (or None at all), and how many at once.

    Without a `batch_size`, as many as memory allows; a CPU always takes `CPU_ROWS`.
    """

    images: tuple[int, ...]
    classes: tuple[int, ...] | None = None
    seed: int = 0
    batch_size: int | None = None
    way: Way | None = None
    weaker: Model | None = None


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


def classes_of_given(
    model: Model, images: Sequence[int], wanted: str | None = None
) -> tuple[int, ...] | None:
    """The class asked for, else none: nobody knows that of a given image.

    Raises:
        ConfigError: for a class that the model does not know, or if it needs one.
    """
    if wanted is not None or not model.class_names:
        return classes_for(images, model.class_names, wanted)
    if model.null_class is None:
        raise ConfigError("this model always needs a class; add --class")
    return (model.null_class,) * len(images)


def draw(
    model: Model,
    how: Sampling,
    job: Job,
    done: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[tuple[int, ...], Pixels]]:
    """Yield the finished images batch by batch, with their numbers.

    `done` is told after each step how many images that comes to: half of the way of 64 is 32.
    """
    data = model.config.data
    if _fixed_rows(model) is None and job.batch_size is None:
        job = replace(job, batch_size=batch_that_fits(model, how, job))
    finished = 0
    for batch in _batches(model, job):
        for k, state in enumerate(states(model, how, batch, multiple(model, job)), 1):
            x = state
            done(finished + len(batch.images) * min(k, how.steps) // how.steps)
        done(finished := finished + len(batch.images))
        yield batch.images, to_uint8(x, data.mean, data.std).cpu().numpy()


def share(job: Job, rank: int, ranks: int, together: int = CPU_ROWS) -> Job:
    """One of several processes' part of a job: whole groups of images, in order; maybe none."""
    groups = -(-len(job.images) // together)
    start, end = (groups * r // ranks * together for r in (rank, rank + 1))
    classes = job.classes and job.classes[start:end]
    return replace(job, images=job.images[start:end], classes=classes)


def states(model: Model, how: Sampling, job: Job, multiple_of: int = 8) -> Iterator[Tensor]:
    """Yield every state of a job's images, from noise to data, in the model's range.

    They are walked together, in a batch that is filled up: on a CPU as `CPU_ROWS` says, elsewhere
    to a multiple of a number.
    """
    schedule, how = model.denoiser.schedule, as_walked(how, job)
    filled, rows = _filled(job, _fixed_rows(model), multiple_of)

    def fresh() -> Denoise:
        denoise = _denoise(model, how, filled)
        return _seen(denoise, job.way.look, rows) if job.way and job.way.look else denoise

    data, images = model.config.data, torch.tensor(filled.images)
    at = Setting(
        fresh(),
        schedule,
        build.solver(how.solver, model.trusted),
        build.grid(how.grid, model.trusted)(schedule, how.steps),
        ImageNoise(job.seed, images),
        torch.empty(
            len(images), data.channels, data.image_size, data.image_size, device=model.device
        ),
    )
    walked = job.way.walk(at, images, fresh) if job.way else trajectory(*at)
    return (x[rows] for x in walked)


def batch_that_fits(model: Model, how: Sampling, job: Job) -> int:
    """How many images go together: the largest power of two that half of the free memory holds.

    It is measured on the first state of a few images, and at most 1,024.
    """
    device, few = model.device, 8
    if len(job.images) <= few:
        return few
    first = slice(0, few)
    classes = job.classes and job.classes[first]
    weaker = job.weaker and uncompiled(job.weaker)
    tried = replace(job, images=job.images[first], classes=classes, way=None, weaker=weaker)
    memory.give_back()
    before = memory.resident(device)
    memory.forget_peak(device)
    next(states(uncompiled(model), how, tried))
    taken = max(1, memory.peak(device) - before)
    fitting = max(1, memory.free_bytes(device) // 2 * few // taken)
    return min(1024, 2 ** (fitting.bit_length() - 1))


def uncompiled(model: Model) -> Model:
    """The same model with its bare network, neither replayed nor compiled whole: for a few images.

    Those would be one more size of batch.
    """
    network = model.denoiser.network
    if isinstance(network, Replay):
        network = network.network
    bare = copy(network)  # the same weights; a copy forgets that it was to be compiled
    return replace(model, denoiser=replace(model.denoiser, network=bare))


def multiple(model: Model, job: Job) -> int:
    """What the number of rows in a batch is filled up to a multiple of."""
    if (fixed := _fixed_rows(model)) is not None:
        return fixed
    assert job.batch_size
    return job.batch_size if _whole(model) and len(job.images) > job.batch_size else 8


def _fixed_rows(model: Model) -> int | None:
    """How many rows every batch has, where bits may depend on it."""
    return CPU_ROWS if model.device.type == "cpu" else None


def _whole(model: Model) -> bool:
    """Whether the network is compiled as a whole, anew for every other size of its batches."""
    return model.compiled and model.device.type != "cpu"


def as_walked(how: Sampling, job: Job) -> Sampling:
    """What a job makes of the way of sampling that was asked for."""
    if not (job.way and job.way.plain):
        return how
    return how.model_copy(update={"solver": Part(name="ddim"), "threshold": Part(name="none")})


# Ways to make images other than from noise alone


def watched(look: Look, of: Way | None = None) -> Way:
    """From noise alone, or another way, with `look` called after every evaluation."""
    return (of or Way(lambda at, images, fresh: trajectory(*at)))._replace(look=look)


def _seen(denoise: Denoise, look: Look, rows: list[int]) -> Denoise:
    def asked(x_t: Tensor, t: Tensor) -> Prediction:
        predicted = denoise(x_t, t)
        look(x_t[rows], t[rows] if t.ndim else t, predicted.x_0[rows])
        return predicted

    return asked


def varied(inputs: Tensor, strength: float) -> Way:
    """Start image j from input j, modulo their number, with noise added."""

    def way(at: Setting, images: Tensor, fresh: Callable[[], Denoise]) -> Iterator[Tensor]:
        x_0 = _turn(inputs, images, at.like)
        return image_to_image(*at._replace(like=x_0), strength=strength)

    return Way(way)


def painted(inputs: Tensor, mask: Tensor, resamplings: int, jump: int) -> Way:
    """Keep what of input j `mask` says is known, and paint the rest."""

    def way(at: Setting, images: Tensor, fresh: Callable[[], Denoise]) -> Iterator[Tensor]:
        known = _turn(inputs, images, at.like)
        given = mask.to(known).expand_as(known)
        return inpaint(*at._replace(like=known), given, resamplings=resamplings, jump=jump)

    return Way(way)


def rebuilt(inputs: Tensor) -> Way:
    """Walk input j up to noise, and back down by DDIM."""

    def way(at: Setting, images: Tensor, fresh: Callable[[], Denoise]) -> Iterator[Tensor]:
        x = _inverted(at, _turn(inputs, images, at.like))
        return walk(fresh(), at.schedule, at.solver, x, at.times, at.noise)

    return Way(way, plain=True)


def between_seeds(first: int, last: int, count: int, seed: int) -> Way:
    """Image j of `count` lies j / (count - 1) of the way from one image to another."""

    def way(at: Setting, images: Tensor, fresh: Callable[[], Denoise]) -> Iterator[Tensor]:
        start, end = (ImageNoise(seed, torch.full_like(images, end)) for end in (first, last))
        noise = Interpolated(start, end, _part(images, count))
        return trajectory(at.denoise, at.schedule, at.solver, at.times, noise, at.like)

    return Way(way)


def between_images(first: Tensor, last: Tensor, count: int) -> Way:
    """Image j of `count` lies between two given images, which are walked up to noise for it."""

    def way(at: Setting, images: Tensor, fresh: Callable[[], Denoise]) -> Iterator[Tensor]:
        start, end = (
            _inverted(at._replace(denoise=fresh()), end.to(at.like).expand_as(at.like))
            for end in (first, last)
        )
        x = slerp(start, end, _part(images, count))
        return walk(fresh(), at.schedule, at.solver, x, at.times, at.noise)

    return Way(way, plain=True)


def _turn(inputs: Tensor, images: Tensor, like: Tensor) -> Tensor:
    return inputs[images % len(inputs)].to(like)


def _part(images: Tensor, count: int) -> Tensor:
    return images.double() / max(1, count - 1)


def _inverted(at: Setting, x_0: Tensor) -> Tensor:
    with torch.inference_mode():
        return _last(inverted(at.denoise, at.schedule, x_0, at.times))


def _last(states: Iterator[Tensor]) -> Tensor:
    """The last state; the others are let go on the way."""
    return deque(states, maxlen=1).pop()


# What the solver sees


def _denoise(model: Model, how: Sampling, job: Job) -> Denoise:
    """The denoiser of a whole batch; on a CPU it denoises `CPU_ROWS` at a time."""
    size = _fixed_rows(model)
    if size is None or len(job.images) == size:
        return _thresholded(model, how, job)
    parts = [
        _thresholded(model, how, picked(job, range(start, start + size)))
        for start in range(0, len(job.images), size)
    ]

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        times = t.split(size) if t.ndim else [t] * len(parts)
        some = [part(x, at) for part, x, at in zip(parts, x_t.split(size), times, strict=True)]
        variances = [one.variance for one in some if one.variance is not None]
        return Prediction(
            torch.cat([one.x_0 for one in some]),
            torch.cat([one.eps for one in some]),
            torch.cat(variances) if variances else None,
        )

    return denoise


def _thresholded(model: Model, how: Sampling, job: Job) -> Denoise:
    trusted, schedule = model.trusted, model.denoiser.schedule
    denoise = _guided(model, how, job)
    low, high = pixel_range(model.config.data.mean, model.config.data.std)
    threshold = build.bind("threshold", how.threshold, "sampling.threshold", trusted)
    held: Denoise = threshold(denoise, schedule, low=low, high=high)
    return held


def _guided(model: Model, how: Sampling, job: Job) -> Denoise:
    guide = build.bind("guidance", how.guidance, "sampling.guidance", model.trusted)
    schedule, scale = model.denoiser.schedule, how.guidance.arguments.get("scale", 1)
    denoiser = told(model)
    cond = None if job.classes is None else torch.tensor(job.classes, device=model.device)
    if job.weaker:
        pair = apart(partial(denoiser, cond=cond), partial(told(job.weaker), cond=cond))
    elif cond is not None and model.null_class is not None:
        pair = sides(denoiser, cond, torch.full_like(cond, model.null_class))
    elif scale == 1:
        return partial(denoiser, cond=cond)
    elif cond is None:
        raise ConfigError("this model was trained without classes, so there is nothing to guide by")
    else:
        raise ConfigError(
            "guidance needs a model that was also trained without its labels; this one had "
            "training.label_dropout=0, so only --guidance 1 works"
        )
    guided: Denoise = guide(pair, schedule)
    return guided


def told(model: Model) -> Callable[..., Prediction]:
    """The denoiser in the precision it was trained in; what the solver sees stays in float32."""
    denoiser: Callable[..., Prediction] = model.denoiser
    if model.denoiser.estimate_range:
        denoiser = _remembering(denoiser)
    if model.precision is torch.float32:
        return denoiser

    def denoise(x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Prediction:
        with torch.autocast(model.device.type, model.precision):
            return denoiser(x_t, t, cond)

    return denoise


def _remembering(denoiser: Callable[..., Prediction]) -> Callable[..., Prediction]:
    """Show a self-conditioned network its last estimate of these images (Chen et al. 2023)."""
    last: Tensor | None = None

    def denoise(x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Prediction:
        nonlocal last
        given = last
        if given is not None and len(given) != len(x_t):  # guidance asked for one side, or for two
            given = torch.cat((given, given)) if len(given) < len(x_t) else given[: len(x_t)]
        predicted = denoiser(x_t, t, cond, given)
        last = predicted.x_0
        return predicted

    return denoise


def _batches(model: Model, job: Job) -> Iterator[Job]:
    size, fixed = job.batch_size, _fixed_rows(model)
    if fixed is not None:
        parts = _of_different_places(job.images, fixed)
    else:
        assert size
        parts = (range(k, k + size) for k in range(0, len(job.images), size))
    return (picked(job, part[: len(job.images) - part.start]) for part in parts)


def _of_different_places(images: Sequence[int], size: int) -> Iterator[range]:
    """Divide images into consecutive ones whose numbers differ modulo `size`."""
    start, taken = 0, set[int]()
    for k, image in enumerate(images):
        if image % size in taken:
            yield range(start, k)
            start, taken = k, set()
        taken.add(image % size)
    if taken:
        yield range(start, len(images))


def _filled(job: Job, fixed_rows: int | None, multiple_of: int) -> tuple[Job, list[int]]:
    """Fill a batch up with images that it has; return it, and the rows of those asked for."""
    count = len(job.images)
    if fixed_rows is None:  # 8 are also several times faster than 7
        more = [count - 1] * (-count % multiple_of)
        return picked(job, [*range(count), *more]), [*range(count)]
    order: list[int] = []
    rows = []
    for part in _of_different_places(job.images, fixed_rows):
        batch = [part.start] * fixed_rows
        for k in part:
            place = job.images[k] % fixed_rows
            batch[place] = k
            rows.append(len(order) + place)
        order += batch
    return picked(job, order), rows


def picked(job: Job, order: Sequence[int]) -> Job:
    """Some images of a job, each with its class."""
    classes = None if job.classes is None else tuple(job.classes[k] for k in order)
    return replace(job, images=tuple(job.images[k] for k in order), classes=classes)
