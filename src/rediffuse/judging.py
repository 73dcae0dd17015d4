"""From a model to figures: images are drawn and looked at at once, and only vectors are kept.

A thread looks at one batch while the next one is sampled. Networks look at always as many images at
a time, in the order of their numbers, so that no figure depends on the batch size of sampling.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from rediffuse.config.schema import Sampling
from rediffuse.data.ahead import ahead
from rediffuse.drawing import Job, batch_that_fits, classes_for, draw, multiple, share
from rediffuse.errors import ConfigError
from rediffuse.evaluation.card import Card, Facts, digest_of
from rediffuse.evaluation.classifier import Labels, classification_accuracy_score, enough
from rediffuse.evaluation.features import Features, Seen
from rediffuse.evaluation.figures import Figure, Floor, with_n
from rediffuse.evaluation.frechet import frechet_distance
from rediffuse.evaluation.looking import full_precision
from rediffuse.evaluation.measures import (
    COLOUR,
    INCEPTION,
    MEASURE,
    Reference,
    Sample,
    least_images,
    measured,
)
from rediffuse.evaluation.moments import moments
from rediffuse.images import Images
from rediffuse.models import Model
from rediffuse.progress import Progress
from rediffuse.references import (
    CHUNK,
    KEPT,
    Pixels,
    Real,
    classifier_of,
    identity,
    joined,
    looked_at,
    looked_up,
    real_parts,
    versions,
)
from rediffuse.training.devices import Devices


class Clock(nn.Module):
    """A network that counts the images that it is shown, and the seconds that this takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.rows, self.seconds = 0, 0.0

    def forward(self, *inputs: Any) -> Any:
        """Answer as the network does."""
        began = _now(inputs[0].device)
        said = self.network(*inputs)
        self.seconds += _now(inputs[0].device) - began
        self.rows += len(inputs[0])
        return said


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Cost(NamedTuple):
    """What drawing took: passes of the network per image, and seconds in all and in the network.

    A guided step asks about every image twice, and counts as two evaluations. Of several processes
    the seconds in the network are those of the one that has most.
    """

    evaluations: float
    seconds: float
    network_seconds: float


@dataclass(frozen=True)
class Drawn:
    """Drawn images as each network saw them; the pixels themselves only where they were wanted."""

    seen: dict[str, Seen]
    cost: Cost
    pixels: Pixels | None = None


def drawn(
    model: Model,
    how: Sampling,
    job: Job,
    networks: Sequence[Features],
    done: Callable[[int], object] = lambda count: None,
    *,
    keep_pixels: bool = False,
    devices: Devices | None = None,
) -> Drawn:
    """Draw a job's images, and look at them through each network meanwhile.

    `done` is told how many images there are so far. `devices` share the work; each of them gets
    the whole answer.
    """
    here = devices or Devices(model.device)
    job = share(job, here.rank, here.ranks, CHUNK)
    if job.batch_size is None:
        job = replace(job, batch_size=_batch_size(model, how, job))
    timed, *clocks = _clocked(model)
    if job.weaker:
        weaker, other = _clocked(job.weaker)
        job, clocks = replace(job, weaker=weaker), [*clocks, other]
    began, asked, together = time.perf_counter(), 0, multiple(model, job)
    held: list[Pixels] = []

    def batches() -> Iterator[Pixels]:
        nonlocal asked
        for images, pixels in draw(timed, how, job, lambda count: done(count * here.ranks)):
            asked += -(-len(images) // together) * together  # a batch is padded
            if keep_pixels:
                held.append(pixels)
            yield pixels

    def look(chunk: Pixels) -> list[Seen]:
        pixels = torch.from_numpy(chunk)
        return [features(pixels) for features in networks]

    # Who looks asks for full precision; what is drawn meanwhile must not depend on when.
    with full_precision(), ThreadPoolExecutor(1, "features") as pool:
        answers = list(ahead(pool, look, in_chunks(batches(), CHUNK), 2))
    rows, seconds = sum(c.rows for c in clocks), sum(c.seconds for c in clocks)
    everyones = here.everyones(_Share(answers, held, rows, asked, seconds))
    answers = [answer for one in everyones for answer in one.answers]
    seen = {
        features.name: joined(answer)
        for features, answer in zip(networks, zip(*answers, strict=True), strict=True)
    }
    cost = Cost(
        sum(one.rows for one in everyones) / sum(one.asked for one in everyones),
        time.perf_counter() - began,
        max(one.seconds for one in everyones),
    )
    held = [pixels for one in everyones for pixels in one.held]
    return Drawn(seen, cost, np.concatenate(held) if keep_pixels else None)


def samples(model: Model, how: Sampling, job: Job) -> dict[str, Any]:
    """What a card says of drawn images: all that they depend on."""
    assert model.origin
    config, numbers, classes = model.config, _numbers(job.images), _classes(model, job)
    scale = how.guidance.arguments.get("scale", 1)
    return {
        "told": f"{numbers} of seed {job.seed}, {classes}, drawn by {how.solver.name} in "
        f"{how.steps} steps, guidance {scale:g}, from {model.origin['weights']} weights of "
        f"{model.origin['checkpoint']} of run {model.origin['run'][:8]}",
        **model.origin,
        "sampling": how.model_dump(mode="json"),
        "seed": job.seed,
        "images": numbers,
        "classes": classes,
        "weaker": job.weaker.origin if job.weaker else None,
        "precision": str(model.precision).removeprefix("torch."),
        "compiled": model.compiled,
        "determinism": config.determinism,
        "device": model.device.type,
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
    }


def _numbers(images: Sequence[int]) -> str:
    """Image numbers in one word: a range where they are one, else a digest of them."""
    if list(images) == list(range(images[0], images[0] + len(images))):
        return f"images {images[0]}-{images[-1]}"
    return f"{len(images)} images {digest_of(list(images))}"


def _classes(model: Model, job: Job) -> str:
    """How labels are distributed: those in turn give a lower distance than random ones."""
    if job.classes is None:
        return "without classes"
    if len({*job.classes}) == 1:
        return f"all of class {model.class_names[job.classes[0]]}"
    return f"{len(model.class_names)} classes in turn"


def _clocked(model: Model) -> tuple[Model, Clock]:
    """The same model, with a clock around its network."""
    clock = Clock(model.denoiser.network)
    return replace(model, denoiser=replace(model.denoiser, network=clock)), clock


class _Share(NamedTuple):
    """What one process has drawn and seen, chunk by chunk, and what that took."""

    answers: list[list[Seen]]
    held: list[Pixels]
    rows: int
    asked: int
    seconds: float


def _batch_size(model: Model, how: Sampling, job: Job) -> int:
    """As many at once as keep a device busy, and no more, so that looking begins early."""
    if model.device.type == "cpu":
        return CHUNK
    return min(_MOST_AT_ONCE, batch_that_fits(model, how, job))


_MOST_AT_ONCE = 1024


def in_chunks(batches: Iterable[Pixels], size: int) -> Iterator[Pixels]:
    """The same images in chunks of one size, but the last."""
    held: list[Pixels] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        if count >= size:
            together = np.concatenate(held)
            whole = count // size * size
            yield from np.split(together[:whole], whole // size)
            held, count = [together[whole:]], count - whole
    if count:
        yield np.concatenate(held)


class Study:
    """The networks that look, and what they saw of real images; asked for once and remembered.

    `against` names the part that images are held against. A floor is the same figure of as many
    real images, with as many of each class, against the same reference: of images that were neither
    trained on nor are held against. Where there are too few of them, there is no floor.
    """

    def __init__(
        self,
        root: Path,
        parts: Mapping[str, Real],
        against: str,
        networks: Sequence[Features],
        tell: Callable[[str], None],
        *,
        with_accuracy_score: bool = False,
    ) -> None:
        self.with_accuracy_score = with_accuracy_score
        self.networks, self.against = tuple(networks), parts[against]
        self._root, self._parts, self._tell = root, parts, tell
        self._references: dict[tuple[str, str], Reference] = {}
        self._floors: dict[tuple[str, int, tuple[int, ...]], dict[str, Floor]] = {}

    def card(self, n: int, samples: Facts) -> Card:
        """The card of all that is measured of `n` images that `samples` tells of."""
        networks = {features.name: identity(features) for features in self.networks}
        measure = {**MEASURE, "accuracy_score": self.with_accuracy_score}
        return Card(n, samples, self.against.facts, networks, measure, versions()).masked()

    @property
    def usual_n(self) -> int:
        """Ten thousand images, or as many whole thousands as there are to be held against."""
        return min(10_000, max(1000, len(self.against) // 1000 * 1000))

    def check(self, n: int) -> None:
        """Refuse a number of images whose distance says more about n than about the images.

        Raises:
            ConfigError: saying how many there must be.
        """
        for features in self.networks:
            if features.name == COLOUR:
                continue
            one = torch.from_numpy(next(self.against.chunks(1)))
            least = least_images(features(one).features.shape[1])
            for what, count in (("images", n), (f"{self.against.what} images", len(self.against))):
                if count < least:
                    raise ConfigError(
                        f"{count:,} {what} are too few to be judged through {features.name}: below "
                        f"{least:,}, twice the length of its vectors, a covariance is mostly "
                        "noise; use more, or --allow-small-n"
                    )

    def classes_of(self, images: Real) -> Tensor | None:
        """The classes of given images in the numbers that the networks know them by, if all do."""
        known, names = self.against.packed.class_names, images.packed.class_names
        if images.labels is None or not {*names} <= {*known}:
            return None
        return torch.tensor([known.index(name) for name in names])[images.labels]

    def prepare(self, n: int, classes: Tensor | None) -> None:
        """Look at all real images that figures of n images of these classes will need."""
        for features in self.networks:
            self.reference(features, self.against)
            self._floors_at(features, n, classes)

    def figures(
        self, seen: Mapping[str, Seen], card: Card, classes: Tensor | None = None
    ) -> list[Figure]:
        """Every figure of images of these `classes`, as the networks saw them."""
        found = []
        for features in self.networks:
            reference, name = self.reference(features, self.against), features.name
            sample = Sample(seen[name], classes)
            values = measured(name, sample, reference, self._trained_on(features))
            floors = self._floors_at(features, card.n, classes)
            for figure, value in values.items():
                mine = card.through(*({name} - {COLOUR})).of(value.n or card.n)
                floor = floors.get(figure)
                found.append(
                    Figure(figure, value.value, mine, value.standard_error, floor, value.sd)
                )
        return found

    def unseen(self) -> Real:
        """The largest part that nothing was trained on.

        Raises:
            ConfigError: if there is none.
        """
        others = [part for what, part in self._parts.items() if what != "train"]
        if not others:
            raise ConfigError("all images were trained on; this needs some that were held out")
        return max(others, key=len)

    def accuracy_score(self, pixels: Pixels, card: Card, classes: Tensor | None) -> Figure:
        """How well a classifier that learned from samples alone knows real images.

        Its floor, a ceiling, is that of one that learned from as many real ones.

        Raises:
            ConfigError: if there are no classes.
        """
        self.check_accuracy_score(classes is not None)
        test, train = self.unseen(), self._parts["train"]
        assert classes is not None
        assert train.labels is not None
        assert test.labels is not None
        several = len(train.packed.class_names)
        images, labels = test.part.images[test.rows], test.labels.numpy()
        learned = [(pixels, classes.numpy())]
        rows = rows_of_classes(train.labels, classes)
        if rows is not None:
            learned.append((train.part.images[train.rows[rows]], train.labels[rows].numpy()))
        self._tell(
            f"training {'two classifiers' if learned[1:] else 'a classifier'} on {card.n:,} "
            f"samples{' and on as many real images' if learned[1:] else ''}"
        )
        score, *real = (_score(x, y, images, labels, several) for x, y in learned)
        what = f"train images teach, {len(test):,} {test.what} ones test"
        floor = Floor(real[0], card.n, what) if real else None
        return Figure("cas", score, card.through(), floor=floor)

    def check_accuracy_score(self, with_classes: bool) -> None:
        """Refuse what has no classes, or no image to test with.

        Raises:
            ConfigError: saying which.
        """
        labels = (self.unseen().labels, self._parts["train"].labels)
        if not with_classes or any(of is None for of in labels):
            raise ConfigError("the classification accuracy score needs classes")

    def reference(self, features: Features, real: Real) -> Reference:
        """What a network saw of real images: remembered, or kept on the disk, or looked at now."""
        key = (features.name, real.what)
        if key not in self._references:
            self._references[key] = looked_up(self._root, real, features, self._tell)
        return self._references[key]

    def _trained_on(self, features: Features) -> Reference | None:
        """What a network saw of the images that were trained on, where a figure asks for that."""
        if features.name != INCEPTION or "train" not in self._parts:
            return None
        return self.reference(features, self._parts["train"])

    def no_floor(self, n: int, classes: Tensor | None) -> str | None:
        """Why figures of n images of these classes have no floor; None if they have one."""
        if self._real_sample(n, classes) is not None:
            return None
        alike = "" if classes is None else ", as many of each class as are judged,"
        there = ", ".join(f"{len(part):,} {part.what}" for part in self._others()) or "0"
        return (
            f"it takes {n:,} real images{alike} that are neither trained on nor held against; "
            f"there are {there}"
        )

    def _floors_at(self, features: Features, n: int, classes: Tensor | None) -> dict[str, Floor]:
        """The figures of as many real images, of the same classes, against the same reference."""
        key = (features.name, n, () if classes is None else tuple(classes.bincount().tolist()))
        if key not in self._floors:
            chosen, self._floors[key] = self._real_sample(n, classes), {}
            if chosen is not None:
                seen = [self._of_real(features, part, rows) for part, rows in chosen]
                labels = [one.classes for one in seen if one.classes is not None]
                sample = Sample(
                    joined(one.seen for one in seen), torch.cat(labels) if labels else None
                )
                reference, trained = (
                    self.reference(features, self.against),
                    self._trained_on(features),
                )
                names = " and ".join(part.what for part, _ in chosen)
                told = f"{names} images against {len(self.against):,} {self.against.what} ones"
                told += "" if classes is None else ", as many of each class"
                self._floors[key] = {
                    name: Floor(value.value, value.n or n, told, value.standard_error)
                    for name, value in measured(features.name, sample, reference, trained).items()
                }
        return self._floors[key]

    def _others(self) -> list[Real]:
        """Real images that are neither trained on nor held against, the largest part first."""
        parts = [p for name, p in self._parts.items() if p is not self.against and name != "train"]
        return sorted(parts, key=len, reverse=True)

    def _real_sample(self, n: int, classes: Tensor | None) -> list[tuple[Real, Tensor]] | None:
        """n real images with as many of each class, as rows of few parts; None if there are fewer.

        A distance depends on the number of images on both sides and on how classes are mixed, so
        that fewer images, or others, have another floor.
        """
        parts = self._others()
        for count in range(1, len(parts) + 1):
            some = parts[:count]
            sizes = [min(len(part), KEPT) for part in some]
            rows = torch.arange(n) if classes is None and sum(sizes) >= n else None
            labels = [part.labels[:KEPT] for part in some if part.labels is not None]
            if classes is not None and len(labels) == count:
                rows = rows_of_classes(torch.cat(labels), classes)
            if rows is not None:
                ends = torch.tensor(sizes).cumsum(0)
                of = torch.bucketize(rows, ends, right=True)
                starts = ends - torch.tensor(sizes)
                pieces = [(part, rows[of == k] - starts[k]) for k, part in enumerate(some)]
                return [(part, mine) for part, mine in pieces if len(mine)]
        return None

    def _of_real(self, features: Features, real: Real, rows: Tensor) -> Sample:
        """What a network saw of some; counts of colours are not kept, as they are quick."""
        if features.name == COLOUR:
            some = real.some(rows.numpy(), real.what)
            return Sample(joined(looked_at(some.chunks(), features)), some.labels)
        return Sample(self.reference(features, real).seen, real.labels).rows(rows)


def rows_of_classes(
    labels: Int64[Tensor, " images"] | None, classes: Int64[Tensor, " n"] | None
) -> Int64[Tensor, " n"] | None:
    """The first rows with as many of each class as `classes` has; None if there are too few."""
    if labels is None or classes is None:
        return None
    found = [
        (labels == number).nonzero().flatten()[:count]
        for number, count in enumerate(classes.bincount())
    ]
    rows = torch.cat(found)
    return rows.sort().values if len(rows) == len(classes) else None


def _score(samples: Pixels, sampled: Labels, images: Pixels, labels: Labels, classes: int) -> float:
    with Progress(enough(len(samples)), "images learned from") as bar:
        return classification_accuracy_score(
            samples, sampled, images, labels, classes, 0, tell=bar.move
        )


class Proxy:
    """A cheap stand-in for a distance while training: few images, few steps, always the same noise.

    Its images have numbers that no evaluation reaches, so that choosing the best by it does not
    choose by the images that are judged later. What it needs is made at the first call.
    """

    def __init__(self, root: Path, images: Images, tell: Callable[[str], None]) -> None:
        self._root, self._images, self._tell = root, images, tell
        self._ready: tuple[Features, Reference] | None = None

    def __call__(self, model: Model, count: int, steps: int) -> dict[str, float]:
        """The distance of `count` images from those that are trained on, by name."""
        if self._ready is None:
            real = real_parts(self._images)["train"]
            features: Features = classifier_of(self._root, real, model.device, self._tell)
            reference = looked_up(self._root, real, features, self._tell)
            self._ready = (features, reference)
        features, reference = self._ready
        numbers = tuple(range(_FIRST_PROXY_IMAGE, _FIRST_PROXY_IMAGE + count))
        how = model.config.sampling
        how = how.model_copy(update={"steps": min(steps, how.steps)})
        job = Job(numbers, classes_for(numbers, model.class_names))
        seen = drawn(model, how, job, [features]).seen[features.name]
        distance = frechet_distance(moments(seen.features), reference.moments)
        return {f"proxy/fd_{with_n(features.name, count)}": distance}


_FIRST_PROXY_IMAGE = 2**40
