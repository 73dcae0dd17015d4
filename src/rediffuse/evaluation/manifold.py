"""Fidelity and variety apart: precision and recall, density and coverage.

Each set is a union of balls, around every image out to its k-th neighbour. Everything is done in
blocks of rows, so that 50,000 images against 10,000 need no more than some 500 MB.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

_ROWS = 1024


class Manifold(NamedTuple):
    """`precision` and `density` say how real samples look, `recall` and `coverage` how various."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(
    real: Float[Tensor, "n feature"],
    fake: Float[Tensor, "m feature"],
    *,
    neighbours: int = 3,
    density_neighbours: int = 5,
) -> Manifold:
    """Compare two sets of images by the balls around them.

    Precision is the share of samples inside a ball of real images, recall the other way round, both
    with k = 3 (Kynkäänniemi et al. 2019, Eq. 1-2). Density is the number of real balls around a
    sample, over k; coverage is the share of real balls with a sample inside, both with k = 5
    (Naeem et al. 2020). Balls are closed. All depend on n and m; density may exceed 1.

    Raises:
        ValueError: if a set has no more images than neighbours.
    """
    if min(len(real), len(fake)) <= max(neighbours, density_neighbours):
        raise ValueError(
            f"{max(neighbours, density_neighbours)} neighbours need more images than "
            f"{len(real)} real ones and {len(fake)} samples"
        )
    real, fake = real.double(), fake.double()
    out_to, wide = radii(real, neighbours), radii(real, density_neighbours)
    inside, around = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    for rows, own in zip(fake.split(_ROWS), radii(fake, neighbours).split(_ROWS), strict=True):
        distance = torch.cdist(rows, real)
        inside += int((distance <= out_to).any(1).sum())
        recalled |= (distance <= own[:, None]).any(0)
        around += int((distance <= wide).sum())
        covered |= (distance <= wide).any(0)
    return Manifold(
        precision=inside / len(fake),
        recall=float(recalled.double().mean()),
        density=around / (density_neighbours * len(fake)),
        coverage=float(covered.double().mean()),
    )


def manifold_without(
    real: Float[Tensor, "n feature"],
    fake: Float[Tensor, "m feature"],
    group: Int64[Tensor, " m"],
    *,
    neighbours: int = 3,
    density_neighbours: int = 5,
) -> list[Manifold]:
    """The same without each group of samples in turn, in little more than the time of one.

    Without a group, the balls of samples that had neighbours in it are wider.
    """
    real, fake, groups = real.double(), fake.double(), range(int(group.max()) + 1)
    out_to, wide = radii(real, neighbours), radii(real, density_neighbours)
    inside, around = [torch.zeros(len(groups), dtype=torch.long) for _ in range(2)]
    recalled, wider, covered = [
        torch.zeros(len(groups), len(real), dtype=torch.bool) for _ in range(3)
    ]
    for rows, own in zip(fake.split(_ROWS), group.split(_ROWS), strict=True):
        distance, apart = torch.cdist(rows, real), torch.cdist(rows, fake)
        nearest = apart.topk(neighbours + 1, dim=1, largest=False)
        radius, beside = nearest.values[:, -1:], group[nearest.indices]
        inside.index_add_(0, own, (distance <= out_to).any(1).long())
        around.index_add_(0, own, (distance <= wide).sum(1))
        for number in own.unique():
            of = own == number
            recalled[number] |= (distance[of] <= radius[of]).any(0)
            covered[number] |= (distance[of] <= wide).any(0)
        for number in beside.unique():
            of = (beside == number).any(1) & (own != number)
            others = apart[of].masked_fill(group == number, torch.inf)
            out = others.kthvalue(neighbours + 1, dim=1, keepdim=True).values
            wider[number] |= (distance[of] <= out).any(0)
    size = len(fake) - group.bincount()
    found = []
    for number in groups:
        rest = [other for other in groups if other != number]
        found.append(
            Manifold(
                precision=float(inside[rest].sum() / size[number]),
                recall=float((recalled[rest].any(0) | wider[number]).double().mean()),
                density=float(around[rest].sum() / (density_neighbours * size[number])),
                coverage=float(covered[rest].any(0).double().mean()),
            )
        )
    return found


def radii(x: Float64[Tensor, "n feature"], neighbours: int) -> Float64[Tensor, " n"]:
    """The distance of each image to its k-th neighbour, itself not counted."""
    blocks = [
        torch.cdist(rows, x).kthvalue(neighbours + 1, dim=1).values for rows in x.split(_ROWS)
    ]
    return torch.cat(blocks)
