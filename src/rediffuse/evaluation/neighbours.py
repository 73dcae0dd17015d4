"""Exact nearest neighbours and near pairs, in blocks: memory grows with a block, not with the sets.

Blocks of distances come from one float32 product; what they name is measured again in float64, and
what their rounding might have hidden is looked for again in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from rediffuse.errors import DataError

Vectors = Shaped[Tensor, "_ ..."]
"""uint8 or float32, on the CPU; every row is one vector, whatever its shape."""


class Neighbours(NamedTuple):
    """The nearest keys of each query, nearest first: Euclidean distances, and rows of the keys."""

    distances: Float64[Tensor, "queries k"]
    rows: Int64[Tensor, "queries k"]


class Pairs(NamedTuple):
    """Rows of two sets, and how far apart they are."""

    first: Int64[Tensor, " pairs"]
    second: Int64[Tensor, " pairs"]
    distances: Float64[Tensor, " pairs"]


_QUERIES, _KEYS = 1024, 4096  # 16 MB of distances at a time
_SPARE = 8  # candidates beyond those asked for, which rounding may have put in the wrong order
_AT_ONCE = 2**24  # values that are measured in float64 at a time
_MOST_PAIRS = 50_000_000
_CANDIDATES = 64  # images beyond those asked for, whose nearest crop is measured


def nearest(
    queries: Vectors,
    keys: Vectors,
    k: int = 1,
    done: Callable[[int], object] = lambda count: None,
) -> Neighbours:
    """Find the k nearest keys of each query; equal distances go by row.

    `done` is told how many queries are answered.

    Raises:
        DataError: for more neighbours than there are keys.
    """
    if not 1 <= k <= len(keys):
        raise DataError(f"{k} nearest of {len(keys)} images: there are not so many")
    queries, keys = queries.flatten(1), keys.flatten(1)
    centre = _mean(keys)
    found, answered = [], 0
    for block in queries.split(_QUERIES):
        found.append(_nearest(block, keys, centre, k))
        done(answered := answered + len(block))
    distances, rows = zip(*found, strict=True)
    return Neighbours(torch.cat(distances), torch.cat(rows))


def nearest_others(
    vectors: Vectors, k: int = 1, done: Callable[[int], object] = lambda count: None
) -> Neighbours:
    """Find the k nearest of all other rows of the same set; `done` is as in `nearest`."""
    found = nearest(vectors, vectors, k + 1, done)
    others = found.rows != torch.arange(len(vectors))[:, None]
    others[others.all(dim=1), -1] = False  # k + 1 equal ones, and itself not among them
    shape = (len(vectors), k)
    return Neighbours(found.distances[others].view(shape), found.rows[others].view(shape))


class Shown(NamedTuple):
    """The nearest images of each query, and in which of the versions that training shows.

    `rows` are different images. A version is the image shifted by `shift` pixels (down, right),
    the gap filled by reflection, and then mirrored if `mirrored` says so.
    """

    distances: Float64[Tensor, "queries k"]
    rows: Int64[Tensor, "queries k"]
    shift: Int64[Tensor, "queries k 2"]
    mirrored: Bool[Tensor, "queries k"]


def nearest_shown(
    queries: Vectors,
    images: Vectors,
    k: int = 1,
    *,
    flip: bool = False,
    crop_padding: int = 0,
    done: Callable[[int], object] = lambda count: None,
) -> Shown:
    """Find the k nearest images of each query, each in the version that is nearest to it.

    Versions are those of `rediffuse.data.pixels.augment`. Without crops the answer is exact. With
    them there are (2·crop_padding + 1)² shifts of each image, which are compared after averaging
    over windows of an eighth of the image; the best shift of `_CANDIDATES` images more than asked
    for is then measured in float64. An average is a lower bound of a distance, so that an image is
    missed only if so many others come nearer in it than that image is: never one that is shown
    exactly, unless more than `_CANDIDATES` others agree with the query in all averages. Images of
    less than 16 pixels are not averaged.

    Raises:
        DataError: for more neighbours than there are images.
    """
    if crop_padding:
        return _nearest_crops(queries, images, k, flip, crop_padding, done)
    found = [nearest(queries, images, k, done)]
    if flip:
        found.append(nearest(queries.flip(-1), images, k, done))
    distances, rows = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    mirrored = torch.arange(rows.shape[1]).expand_as(rows) >= k
    return _first_distinct(
        Shown(distances, rows, torch.zeros(*rows.shape, 2, dtype=torch.long), mirrored), k
    )


def augmented(
    images: Shaped[Tensor, "images channel height width"],
    shift: Int64[Tensor, "images 2"],
    mirrored: Bool[Tensor, " images"],
) -> Shaped[Tensor, "images channel height width"]:
    """Shift each image, fill the gap by reflection, and mirror it where that is said."""
    height, width = images.shape[-2:]
    y = _reflected(torch.arange(height) + shift[:, :1], height)
    x = _reflected(torch.arange(width) + shift[:, 1:], width)
    x = torch.where(mirrored[:, None], x.flip(1), x)
    image, channel = (torch.arange(n) for n in images.shape[:2])
    return images[
        image[:, None, None, None], channel[:, None, None], y[:, None, :, None], x[:, None, None]
    ]


def pairs_within(
    a: Vectors,
    b: Vectors,
    radius: float,
    *,
    ordered: bool = False,
    done: Callable[[int], object] = lambda count: None,
) -> Pairs:
    """Find every (i, j) with |a_i - b_j| <= radius; `ordered` leaves out those with j <= i.

    `done` is told how many rows of a were compared with some of b.

    Raises:
        DataError: where there are more than 50 million.
    """
    a, b = a.flatten(1), b.flatten(1)
    centre, found, count = _mean(b), [], 0
    for top, rows, columns in _candidates(a, b, centre, radius, ordered):
        done(top)
        distances = between(a, rows, b, columns)
        near = distances <= radius
        found.append(Pairs(rows[near], columns[near], distances[near]))
        count += len(found[-1].first)
        if count > _MOST_PAIRS:
            raise DataError(
                f"more than {_MOST_PAIRS:,} pairs of images lie within {radius:.3g} of one "
                "another; such images are too much alike to be told apart in this way"
            )
    none = torch.empty(0, dtype=torch.long)
    found.append(Pairs(none, none, none.double()))
    return Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def between(
    a: Vectors, rows: Int64[Tensor, " pairs"], b: Vectors, columns: Int64[Tensor, " pairs"]
) -> Float64[Tensor, " pairs"]:
    """The Euclidean distances of a[rows] and b[columns], one by one, in float64."""
    a, b = a.flatten(1), b.flatten(1)
    size = max(1, _AT_ONCE // max(1, a.shape[1]))
    pieces = zip(rows.split(size), columns.split(size), strict=True)
    return torch.cat([(a[i].double() - b[j].double()).norm(dim=1) for i, j in pieces])


def _nearest(
    queries: Tensor, keys: Tensor, centre: Tensor, k: int, spare: int = _SPARE
) -> tuple[Tensor, Tensor]:
    take = min(k + spare, len(keys))
    near, slack, q = _candidates_of(queries, keys, centre, take)
    rows = near.indices.sort(dim=1).values
    every = torch.arange(len(queries)).repeat_interleave(take)
    distances = between(queries, every, keys, rows.flatten()).view_as(rows)
    distances, rows = _first(distances, rows, k)
    if take < len(keys):
        # A key that was not named is at least this far away; where that is too near, name more.
        beyond = near.values[:, -1].double() + q.double().square().sum(dim=1) - slack
        unsure = (distances[:, -1].square() >= beyond).nonzero()[:, 0]
        for at in unsure.split(max(1, _AT_ONCE // (8 * take))):
            distances[at], rows[at] = _nearest(queries[at], keys, centre, k, 8 * spare)
    return distances, rows


def _candidates_of(
    queries: Tensor, keys: Tensor, centre: Tensor, take: int
) -> tuple[torch.return_types.topk, Tensor, Tensor]:
    """The `take` keys with the least |key|² - 2·query·key, and how far rounding may be off."""
    q, longest = _centred(queries, centre), torch.zeros(())
    values, rows = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.long)
    for start in range(0, len(keys), _KEYS):
        block = _centred(keys[start : start + _KEYS], centre)
        lengths = block.square().sum(dim=1)
        found = (lengths - 2 * q @ block.T).topk(min(take, len(block)), dim=1, largest=False)
        values = torch.cat((values, found.values), dim=1)
        rows = torch.cat((rows, found.indices + start), dim=1)
        kept = values.topk(min(take, values.shape[1]), dim=1, largest=False)
        values, rows = kept.values, rows.gather(1, kept.indices)
        longest = torch.maximum(longest, lengths.max().sqrt())
    return torch.return_types.topk((values, rows)), _slack(q, longest), q


def _first(distances: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k least; `rows` ascend, so that a stable sort puts the lower of equals first."""
    order = distances.argsort(dim=-1, stable=True)[..., :k]
    return distances.gather(-1, order), rows.gather(-1, order)


def _candidates(
    a: Tensor, b: Tensor, centre: Tensor, radius: float, ordered: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Pairs that may lie within the radius, block by block, after the first row of each."""
    for top in range(0, len(a), _QUERIES):
        x = _centred(a[top : top + _QUERIES], centre)
        own = x.square().sum(dim=1, keepdim=True)
        for left in range(0, len(b), _KEYS):
            if ordered and left + _KEYS <= top:
                continue
            y = _centred(b[left : left + _KEYS], centre)
            lengths = y.square().sum(dim=1)
            limit = radius**2 + _slack(x, lengths.max().sqrt())[:, None]
            rows, columns = (own + lengths - 2 * x @ y.T <= limit).nonzero().unbind(1)
            rows, columns = rows + top, columns + left
            kept = columns > rows if ordered else slice(None)
            yield top, rows[kept], columns[kept]


def _nearest_crops(
    queries: Tensor,
    images: Tensor,
    k: int,
    flip: bool,
    padding: int,
    done: Callable[[int], object],
) -> Shown:
    if not 1 <= k <= len(images):
        raise DataError(f"{k} nearest of {len(images)} images: there are not so many")
    sides = [queries, queries.flip(-1)] if flip else [queries]
    window = max(1, min(images.shape[-2:]) // 8)
    level = float(images.float().mean())
    pooled = [window * F.avg_pool2d(side.float() - level, window).flatten(1) for side in sides]
    take, size = min(k + _CANDIDATES, len(images)), max(1, _AT_ONCE // (4 * images[0].numel()))
    values = torch.empty(len(queries), 0)
    found = [torch.empty(len(queries), 0, dtype=torch.long) for _ in range(2)]  # rows, versions
    for start in range(0, len(images), size):
        block = images[start : start + size]
        keys = _pooled_crops(block.float() - level, padding, window)
        near = [
            _best(q, keys) for q in zip(*(side.split(_QUERIES) for side in pooled), strict=True)
        ]
        least, which = (torch.cat(parts) for parts in zip(*near, strict=True))
        rows = torch.arange(start, start + len(block)).expand_as(which)
        values, found = _merged((values, *found), (least, rows, which), take)
        done(len(queries) * (start + len(block)) // len(images))
    rows, which = found
    shifts = 2 * padding + 1
    mirrored, at = which >= shifts**2, which % shifts**2
    shift = torch.stack((at // shifts, at % shifts), dim=-1) - padding
    distances = _measured(sides, images, Shown(values.double(), rows, shift, mirrored))
    return _first_distinct(Shown(distances, rows, shift, mirrored), k)


def _pooled_crops(block: Tensor, padding: int, window: int) -> list[Tensor]:
    """The averages over windows of every shift of a block, times the window.

    So scaled, their distances are at most those of the pixels (Jensen's inequality).
    """
    box = window * F.avg_pool2d(F.pad(block, (padding,) * 4, mode="reflect"), window, stride=1)
    down, right = (n - n % window - window + 1 for n in block.shape[-2:])
    return [
        box[..., y : y + down : window, x : x + right : window].flatten(1)
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
    ]


def _best(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The least squared distance of each query to each image, and the number of the version."""
    least = torch.full((len(queries[0]), len(keys[0])), torch.inf)
    which = torch.zeros(least.shape, dtype=torch.long)
    for side, q in enumerate(queries):
        own = q.square().sum(1, keepdim=True)
        for number, key in enumerate(keys):
            squared = own + key.square().sum(1) - 2 * q @ key.T
            closer = squared < least
            least = torch.where(closer, squared, least)
            which.masked_fill_(closer, side * len(keys) + number)
    return least, which


def _merged(
    old: tuple[Tensor, ...], new: tuple[Tensor, ...], take: int
) -> tuple[Tensor, list[Tensor]]:
    """The `take` least of both, with what belongs to them."""
    values, *others = (torch.cat(both, dim=1) for both in zip(old, new, strict=True))
    kept = values.topk(min(take, values.shape[1]), dim=1, largest=False)
    return kept.values, [other.gather(1, kept.indices) for other in others]


def _measured(sides: Sequence[Tensor], images: Tensor, of: Shown) -> Tensor:
    """The distance of each query to each named version, in float64."""
    count = of.rows.shape[1]
    query = torch.arange(len(of.rows)).repeat_interleave(count)
    still = torch.zeros(1, dtype=torch.bool)
    found = []
    for at in torch.arange(len(query)).split(max(1, _AT_ONCE // images[0].numel())):
        rows, mirrored = of.rows.flatten()[at], of.mirrored.flatten()[at]
        keys = augmented(images[rows], of.shift.flatten(0, 1)[at], still.expand(len(at)))
        asked = torch.where(
            mirrored[:, None, None, None], sides[-1][query[at]], sides[0][query[at]]
        )
        found.append((asked.double() - keys.double()).flatten(1).norm(dim=1))
    return torch.cat(found).view(of.rows.shape)


def _first_distinct(of: Shown, k: int) -> Shown:
    """The k nearest different images; of equal distances, the lower row and the plain version."""
    order = of.rows.argsort(dim=1, stable=True)
    order = order.gather(1, of.distances.gather(1, order).argsort(dim=1, stable=True))
    by_row = of.rows.gather(1, order).argsort(dim=1, stable=True)
    rows = of.rows.gather(1, order).gather(1, by_row)
    again = torch.zeros(rows.shape, dtype=torch.bool)  # the same image in a version further away
    again.scatter_(1, by_row[:, 1:], rows[:, 1:] == rows[:, :-1])
    order = order.gather(1, again.long().argsort(dim=1, stable=True)[:, :k])
    shift = of.shift.gather(1, order[:, :, None].expand(-1, -1, 2))
    parts = (of.distances.gather(1, order), of.rows.gather(1, order), shift)
    return Shown(*parts, of.mirrored.gather(1, order))


def _reflected(at: Tensor, length: int) -> Tensor:
    last = length - 1
    return last - (last - at.abs()).abs()


def _slack(x: Tensor, longest: Tensor) -> Tensor:
    """More than rounding can change a squared distance by (Higham 2002, Sec. 3.1)."""
    unit = 2.0**-24 * (x.shape[1] + 8)
    return unit * (x.double().norm(dim=1) + longest.double()).square()


def _mean(x: Tensor) -> Tensor:
    """The mean row; distances do not depend on it, but rounding does."""
    total = sum((block.double().sum(dim=0) for block in x.split(_KEYS)), start=torch.zeros(()))
    return (total / max(1, len(x))).float()


def _centred(x: Tensor, centre: Tensor) -> Tensor:
    return x.float() - centre
