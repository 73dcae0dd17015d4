"""Images that are there more than once: the same pixels, mirrored, brightened or compressed again.

Two images are near-duplicates if they differ, but for their brightness, by no more than either of
them differs from its own copy that was made brighter or darker and saved as JPEG. So every image
brings its own tolerance, in the units of its own detail, and what was altered so is found.
"""

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from PIL import Image
from torch import Tensor

from rediffuse.evaluation.neighbours import Pairs, between, nearest_others, pairs_within

Pixels = UInt8[Tensor, "images channel height width"]

QUALITY, SHIFT = 75, 10
"""What a copy may have gone through: JPEG of this quality, after so many of 255 levels."""

_MARGIN = 1.25  # a tolerance is one outcome of two alterations; another may be a little more


@dataclass(frozen=True)
class Group:
    """Rows of images that are connected by being alike; `kind` tells the loosest link."""

    rows: tuple[int, ...]
    kind: str  # "same", "mirrored" or "near"
    farthest: float  # root mean squared levels of 255, of the loosest link


class Found(NamedTuple):
    """The groups, the largest first, and how far they can be told from images that are alike.

    `expected_false` is the number of images that are expected to have a near one by chance.
    """

    groups: tuple[Group, ...]
    expected_false: float


class Link(NamedTuple):
    """Two rows that are alike, and how far apart in levels."""

    first: int
    second: int
    apart: float
    kind: str


def find(
    images: Pixels,
    *,
    mirrored: bool = True,
    done: Callable[[int], object] = lambda count: None,
) -> Found:
    """Find every group of duplicates, and make one of groups that share an image.

    All images are gone through `rounds(mirrored)` times; `done` is told how many are behind.
    """
    same = _same(images)
    leaders = same.unique()
    distinct = images[leaders]
    tolerance, behind = _MARGIN * altered(distinct), 0
    links = [
        Link(row, leader, 0.0, "same") for row, leader in enumerate(same.tolist()) if row != leader
    ]
    for kind, others in (("near", distinct), ("mirrored", distinct.flip(-1))):
        if kind == "near" or mirrored:
            pairs = _near(distinct, others, tolerance, partial(_after, done, behind))
            behind += len(images)
            ends = (leaders[pairs.first].tolist(), leaders[pairs.second].tolist())
            apart = pairs.distances.tolist()
            links += [Link(i, j, d, kind) for i, j, d in zip(*ends, apart, strict=True)]
    false = expected_false(distinct, tolerance, partial(_after, done, behind))
    return Found(_groups(len(images), links), false)


def rounds(mirrored: bool) -> int:
    """How often all images are gone through."""
    return 3 if mirrored else 2


def _after(done: Callable[[int], object], behind: int, count: int) -> None:
    done(behind + count)


def altered(images: Pixels) -> Float64[Tensor, " images"]:
    """How far each image lies from its copy, brightened or darkened and compressed: the more."""
    made = [
        _apart(images, torch.stack([_compressed(image, shift) for image in images]))
        for shift in (SHIFT, -SHIFT)
    ]
    return torch.maximum(*made)


def expected_false(
    images: Pixels,
    tolerance: Float64[Tensor, " images"],
    done: Callable[[int], object] = lambda count: None,
) -> float:
    """How many images have a near one by chance, going by those whose nearest is not near.

    The distance to the nearest, in tolerances, is taken to have a power law for its lower tail, as
    where points lie evenly in so many dimensions (Hill 1975). Its power is the most likely one for
    the nearest twentieth of the distances above 1: those below may be of true duplicates.
    """
    if len(images) < 2:
        return 0.0
    found = nearest_others(_even(images), done=done)
    apart = found.distances[:, 0] / math.sqrt(images[0].numel())
    scaled = apart / torch.maximum(tolerance, tolerance[found.rows[:, 0]])
    beyond = scaled[scaled > 1].sort().values
    tail = beyond[: len(beyond) // 20].log()
    if len(tail) < 10:
        return 0.0
    return len(tail) / math.expm1(_rise(float(tail.mean() / tail[-1])))


def _rise(mean: float) -> float:
    """The r for which a density that is proportional to e^(r·y) on [0, 1] has this mean."""
    from scipy.optimize import brentq

    least, most = 1e-3, 500.0

    def gap(r: float) -> float:
        return -1 / math.expm1(-r) - 1 / r - mean

    if gap(least) >= 0:
        return least
    return most if gap(most) <= 0 else float(brentq(gap, least, most))


def _same(images: Pixels) -> Tensor:
    """For each image the first row with the same pixels."""
    first: dict[bytes, int] = {}
    rows = images.flatten(1).numpy()
    digests = (hashlib.sha256(row.data).digest() for row in rows)
    return torch.tensor([first.setdefault(digest, i) for i, digest in enumerate(digests)])


def _near(
    images: Pixels, others: Pixels, tolerance: Tensor, done: Callable[[int], object]
) -> Pairs:
    """Every pair i < j within the tolerance of either, with distances in levels."""
    a, b = _even(images), _even(others)
    scale = math.sqrt(images[0].numel())
    radius = float(tolerance.max()) * scale
    # Sums over blocks lie no farther apart than what is summed, and are few.
    maybe = pairs_within(_sketch(a), _sketch(b), radius, ordered=True, done=done)
    apart = between(a, maybe.first, b, maybe.second) / scale
    near = apart <= torch.maximum(tolerance[maybe.first], tolerance[maybe.second])
    return Pairs(maybe.first[near], maybe.second[near], apart[near])


def _groups(count: int, links: Sequence[Link]) -> tuple[Group, ...]:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.array([link[:2] for link in links], np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(links)), (ends[0], ends[1])), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    rows: dict[int, list[int]] = {}
    for row in np.unique(ends).tolist():
        rows.setdefault(label[row], []).append(row)
    loosest: dict[int, tuple[int, float]] = dict.fromkeys(rows, (0, 0.0))
    for link in links:
        at = label[link.first]
        loosest[at] = max(loosest[at], (_KINDS.index(link.kind), link.apart))
    groups = [
        Group(tuple(members), _KINDS[loosest[at][0]], loosest[at][1])
        for at, members in rows.items()
    ]
    return tuple(sorted(groups, key=lambda group: (-len(group.rows), group.rows)))


_KINDS = ("same", "mirrored", "near")


def _apart(a: Pixels, b: Pixels) -> Float64[Tensor, " images"]:
    rows = torch.arange(len(a))
    return between(_even(a), rows, _even(b), rows) / math.sqrt(a[0].numel())


def _even(images: Pixels) -> Tensor:
    """Each image less its own brightness, per channel."""
    x = images.float()
    return x - x.mean(dim=(2, 3), keepdim=True)


def _sketch(images: Tensor) -> Tensor:
    """Sums over blocks of pixels, over the root of their number: a projection on 8x8 or so."""
    size = max(1, min(images.shape[2:]) // 8)
    return torch.nn.functional.avg_pool2d(images, size) * size


def _compressed(image: UInt8[Tensor, "channel height width"], shift: int) -> Tensor:
    shifted = (image.short() + shift).clamp(0, 255).byte()
    colours = shifted if len(shifted) < 4 else shifted[:3]  # JPEG has no transparency
    save = partial(Image.fromarray(_layout(colours)).save, format="JPEG", quality=QUALITY)
    with io.BytesIO() as file:
        save(file)
        with Image.open(file, formats=["JPEG"]) as opened:
            read = np.array(opened)
    back = torch.from_numpy(read.reshape(*read.shape[:2], -1)).permute(2, 0, 1)
    return torch.cat((back, shifted[len(colours) :]))


def _layout(image: Tensor) -> np.ndarray:
    array = image.permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[2] == 1 else array
