"""What is measured of two sets of images that one network has seen.

Names never mix: `fid`, `kid`, `sfid`, `mifid` and `is` are what Inception-v3 of the FID paper says;
through any other network they are `fd_<network>` and `kd_<network>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from rediffuse.evaluation.agreement import class_agreement
from rediffuse.evaluation.card import digest_of
from rediffuse.evaluation.colour import channel_statistics, histogram, histogram_distance
from rediffuse.evaluation.features import Seen
from rediffuse.evaluation.frechet import frechet_distances
from rediffuse.evaluation.inception_score import inception_score
from rediffuse.evaluation.jackknife import GROUPS, groups_of, standard_error
from rediffuse.evaluation.kernel import kernel_distance
from rediffuse.evaluation.manifold import manifold, manifold_without
from rediffuse.evaluation.mifid import informed, memorization_distances
from rediffuse.evaluation.moments import Moments

MEASURE: dict[str, Any] = {
    "jackknife_groups": GROUPS,
    "kernel_subsets": 100,
    "kernel_subset_images": 1000,
    "manifold_images": 10_000,  # of either side: time grows with the square
    "precision_neighbours": 3,
    "density_neighbours": 5,
    "inception_score_splits": 10,
    "seed": 0,
}
"""The constants of what is measured here; every card has them."""

INCEPTION, CLASSIFIER, COLOUR = "inception", "classifier", "colour"


class Value(NamedTuple):
    """A figure and its standard error: how much it varies with the samples of a model, at this n.

    `standard_error` is None for fewer than two images per group of the jackknife. `n` is the number
    of images, if not all of them, and `sd` the deviation over subsets or splits, if it is a mean of
    those.
    """

    value: float
    standard_error: float | None = None
    n: int | None = None
    sd: float | None = None


class Colours:
    """Levels of each channel, counted image by image: a `Features` without a network."""

    name = COLOUR
    facts: dict[str, Any] = {"levels": 256}  # noqa: RUF012  # as the protocol has it
    digest = digest_of(facts)

    def __call__(self, pixels: UInt8[Tensor, "batch channel height width"]) -> Seen:
        """The number of pixels at each level, channel after channel."""
        return Seen(torch.stack([histogram(image[None]).flatten() for image in pixels]).float())


@dataclass(frozen=True)
class Sample:
    """Images as a network saw them, and the classes that they were meant to show, if any."""

    seen: Seen
    classes: Int64[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.seen.features)

    def rows(self, which: slice | Tensor) -> "Sample":
        """Some of them."""
        features, logits, spatial = self.seen
        seen = Seen(
            features[which],
            None if logits is None else logits[which],
            None if spatial is None else spatial[which],
        )
        return Sample(seen, None if self.classes is None else self.classes[which])


@dataclass(frozen=True)
class Reference:
    """Real images as a network saw them: moments of all of them, vectors of the first ones.

    `spatial` are the moments of what keeps where things are, where the network tells that.
    """

    moments: Moments
    seen: Seen
    spatial: Moments | None = None

    @property
    def length(self) -> int:
        """Of a vector."""
        return len(self.moments.mean)


def measured(
    features: str, sample: Sample, reference: Reference, trained: Reference | None = None
) -> dict[str, Value]:
    """Every figure of a sample, by name; those that it is too small for are left out.

    `trained` are the images that the model was trained on, where they are known. Standard errors
    are over samples; the reference is taken as it is.
    """
    group = groups_of(len(sample), sample.classes)
    if features == COLOUR:
        return _colours(sample, reference, group)
    inception = features == INCEPTION
    distance, without = frechet_distances(sample.seen.features, reference.moments, group)
    found = {"fid" if inception else f"fd_{features}": _value(distance, without)}
    found |= _kernel("kid" if inception else f"kd_{features}", sample, reference, group)
    found |= _manifold(features, sample, reference)
    if inception:
        found |= _of_inception(sample, reference, group)
        if trained is not None:
            found["mifid"] = _mifid(distance, without, sample, trained, group)
    elif features == CLASSIFIER and sample.seen.logits is not None and sample.classes is not None:
        found[f"agreement_{features}"] = _agreement(sample.seen.logits, sample.classes, group)
    return found


Group = Int64[Tensor, " n"] | None
"""The group of the jackknife of each image; None for too few images."""


def _value(value: float, without: Sequence[float] | Tensor, n: int | None = None) -> Value:
    """A figure and what it is without each group; nothing of the latter for too few images."""
    return Value(value, standard_error(without) if len(without) else None, n)


def least_images(length: int) -> int:
    """Twice the length of a vector.

    The covariance of n vectors of length d has full rank from n = d + 1 on; at n = 2d its smallest
    eigenvalue is still less than a tenth of the true one: (1 - (d/n)^½)² (Marchenko & Pastur 1967).
    """
    return 2 * length


def _kernel(name: str, sample: Sample, reference: Reference, group: Group) -> dict[str, Value]:
    x, y = sample.seen.features, reference.seen.features
    size = min(MEASURE["kernel_subset_images"], len(x), len(y))
    if size < 2:
        return {}
    subsets, seed = MEASURE["kernel_subsets"], MEASURE["seed"]
    found = kernel_distance(x, y, seed, subsets=subsets, size=size, group=group)
    return {name: Value(found.mean, found.standard_error, sd=found.sd)}


def _manifold(features: str, sample: Sample, reference: Reference) -> dict[str, Value]:
    """Of equally many on both sides, since all four depend on how many there are."""
    near, density = MEASURE["precision_neighbours"], MEASURE["density_neighbours"]
    count = min(MEASURE["manifold_images"], len(sample), len(reference.seen.features))
    if count <= max(near, density):
        return {}
    fake = sample.rows(slice(count))
    both, k = (reference.seen.features[:count], fake.seen.features), (near, density)
    whole = manifold(*both, neighbours=k[0], density_neighbours=k[1])
    group, parts = groups_of(count, fake.classes), []
    if group is not None:
        parts = manifold_without(*both, group, neighbours=k[0], density_neighbours=k[1])
    return {
        f"{name}_{features}": _value(value, [getattr(part, name) for part in parts], count)
        for name, value in whole._asdict().items()
    }


def _of_inception(sample: Sample, reference: Reference, group: Group) -> dict[str, Value]:
    found: dict[str, Value] = {}
    seen, splits = sample.seen, MEASURE["inception_score_splits"]
    if seen.logits is not None and len(sample) >= splits:
        score = inception_score(seen.logits, MEASURE["seed"], splits=splits, group=group)
        found["is"] = Value(score.mean, score.standard_error, sd=score.sd)
    if seen.spatial is not None and reference.spatial is not None:
        found["sfid"] = _value(*frechet_distances(seen.spatial, reference.spatial, group))
    return found


def _mifid(
    distance: float,
    without: Sequence[float],
    sample: Sample,
    trained: Reference,
    group: Group,
) -> Value:
    apart = memorization_distances(trained.seen.features, sample.seen.features)
    rest = [
        informed(value, float(apart[group != number].nanmean()))
        for number, value in enumerate(without)
    ]
    return _value(informed(distance, float(apart.nanmean())), rest)


def _agreement(logits: Tensor, classes: Tensor, group: Group) -> Value:
    agreement, rest = class_agreement(logits, classes), []
    if group is not None:
        right = (logits.argmax(1) == classes).double()
        rest = [float(right[group != number].mean()) for number in range(GROUPS)]
    return _value(agreement.share, rest)


def _colours(sample: Sample, reference: Reference, group: Group) -> dict[str, Value]:
    """Levels, where black is 0 and white is 255; the floor of a mean is that of real images."""
    counts = sample.seen.features.double()
    own = counts.sum(0)
    real = (reference.moments.mean * reference.moments.n).round().long().view(-1, 256)
    whole, rest = _levels(own, real), []
    if group is not None:
        parts = [counts[group == number].sum(0) for number in range(GROUPS)]
        rest = [_levels(own - part, real) for part in parts]
    return {name: _value(value, [part[name] for part in rest]) for name, value in whole.items()}


def _levels(counts: Tensor, real: Tensor) -> dict[str, float]:
    own = counts.long().view(-1, 256)
    found = {}
    for what, levels in (
        ("distance", histogram_distance(own, real)),
        *zip(("mean", "sd"), channel_statistics(own), strict=True),
    ):
        for name, level in zip(_CHANNELS[len(own)], levels.tolist(), strict=True):
            found[f"{name}_{what}"] = level
    return found


_CHANNELS = {
    1: ("grey",),
    3: ("red", "green", "blue"),
    4: ("red", "green", "blue", "alpha"),
}
