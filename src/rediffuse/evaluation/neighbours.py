"""Exact nearest neighbours and near pairs, in blocks: memory grows with a block, not with the sets.

Blocks of distances come from one float32 product; what they name is measured again in float64, and
what their rounding might have hidden is looked for again in float64.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64, Shaped
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
