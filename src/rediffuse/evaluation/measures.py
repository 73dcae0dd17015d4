"""What is measured of two sets of images that one network has seen.

Names never mix: `fid`, `kid`, `sfid`, `mifid` and `is` are what Inception-v3 of the FID paper says;
through any other network they are `fd_<network>` and `kd_<network>`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from rediffuse.evaluation.agreement import class_agreement
from rediffuse.evaluation.card import digest_of
from rediffuse.evaluation.colour import channel_statistics, histogram, histogram_distance
from rediffuse.evaluation.features import Seen
from rediffuse.evaluation.frechet import frechet_distance
from rediffuse.evaluation.inception_score import inception_score
from rediffuse.evaluation.kernel import kernel_distance
from rediffuse.evaluation.manifold import manifold
from rediffuse.evaluation.mifid import memorization_informed
from rediffuse.evaluation.moments import Moments, moments

BLOCKS = 5
"""Disjoint blocks of images whose figures say how much a figure varies by chance."""

MEASURE: dict[str, Any] = {
    "blocks": BLOCKS,
    "kernel_subsets": 100,
    "kernel_subsets_of_a_block": 20,
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
    """A number, its own deviation where it is a mean of subsets or splits, and of how many images.

    `n` is None where it is of all of them.
    """

    value: float
    sd: float | None = None
    n: int | None = None


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

    def blocks(self, count: int) -> Iterator["Sample"]:
        """Disjoint blocks of equal size, in order; what is left over is in none."""
        size = len(self) // count
        return (self.rows(slice(k * size, (k + 1) * size)) for k in range(count if size else 0))


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
    features: str,
    sample: Sample,
    reference: Reference,
    kernel_subsets: int,
    trained: Reference | None = None,
) -> dict[str, Value]:
    """Every figure of a sample, by name; those that it is too small for are left out.

    `trained` are the images that the model was trained on, where they are known.
    """
    if features == COLOUR:
        return _colours(sample, reference)
    inception = features == INCEPTION
    own = moments(sample.seen.features)
    distance = frechet_distance(own, reference.moments)
    found = {"fid" if inception else f"fd_{features}": Value(distance)}
    found |= _kernel("kid" if inception else f"kd_{features}", sample, reference, kernel_subsets)
    found |= _manifold(features, sample, reference)
    if inception:
        found |= _of_inception(distance, sample, reference, trained)
    elif features == CLASSIFIER and sample.seen.logits is not None and sample.classes is not None:
        agreement = class_agreement(sample.seen.logits, sample.classes)
        found[f"agreement_{features}"] = Value(agreement.share)
    return found


def least_images(length: int) -> int:
    """Twice the length of a vector.

    The covariance of n vectors of length d has full rank from n = d + 1 on; at n = 2d its smallest
    eigenvalue is still less than a tenth of the true one: (1 - (d/n)^½)² (Marchenko & Pastur 1967).
    """
    return 2 * length


def _kernel(name: str, sample: Sample, reference: Reference, subsets: int) -> dict[str, Value]:
    x, y = sample.seen.features, reference.seen.features
    size = min(MEASURE["kernel_subset_images"], len(x), len(y))
    if size < 2:
        return {}
    return {name: Value(*kernel_distance(x, y, MEASURE["seed"], subsets=subsets, size=size))}


def _manifold(features: str, sample: Sample, reference: Reference) -> dict[str, Value]:
    """Of equally many on both sides, since all four depend on how many there are."""
    near, density = MEASURE["precision_neighbours"], MEASURE["density_neighbours"]
    count = min(MEASURE["manifold_images"], len(sample), len(reference.seen.features))
    if count <= max(near, density):
        return {}
    real, fake = reference.seen.features[:count], sample.seen.features[:count]
    found = manifold(real, fake, neighbours=near, density_neighbours=density)
    return {f"{name}_{features}": Value(v, n=count) for name, v in found._asdict().items()}


def _of_inception(
    distance: float, sample: Sample, reference: Reference, trained: Reference | None
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    seen, splits = sample.seen, MEASURE["inception_score_splits"]
    if seen.logits is not None and len(sample) >= splits:
        found["is"] = Value(*inception_score(seen.logits, MEASURE["seed"], splits=splits))
    if seen.spatial is not None and reference.spatial is not None:
        found["sfid"] = Value(frechet_distance(moments(seen.spatial), reference.spatial))
    if trained is not None:
        informed = memorization_informed(distance, trained.seen.features, seen.features)
        found["mifid"] = Value(informed)
    return found


def _colours(sample: Sample, reference: Reference) -> dict[str, Value]:
    """Levels, where black is 0 and white is 255; the floor of a mean is that of real images."""
    own = sample.seen.features.double().sum(0).long().view(-1, 256)
    real = (reference.moments.mean * reference.moments.n).round().long().view(-1, 256)
    names = _CHANNELS[len(own)]
    found = {}
    for what, levels in (
        ("distance", histogram_distance(own, real)),
        *zip(("mean", "sd"), channel_statistics(own), strict=True),
    ):
        for name, level in zip(names, levels.tolist(), strict=True):
            found[f"{name}_{what}"] = Value(level)
    return found


_CHANNELS = {
    1: ("grey",),
    3: ("red", "green", "blue"),
    4: ("red", "green", "blue", "alpha"),
}
