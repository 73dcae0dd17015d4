"""The Fréchet distance between two Gaussians: FID, where the features are Inception's."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from rediffuse.evaluation.moments import Moments, moments, moments_without


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |μ_1 - μ_2|² + tr(Σ_1 + Σ_2 - 2(Σ_1Σ_2)^½) for two Gaussians.

    Dowson & Landau 1982; Heusel et al. 2017, Eq. 6.

    Raises:
        ValueError: if a and b have different numbers of features.
    """
    return _distance(a, b, _root(b.covariance))


def frechet_distances(
    features: Float[Tensor, "n feature"], b: Moments, group: Int64[Tensor, " n"] | None
) -> tuple[float, list[float]]:
    """Return the distance of all rows from b, and the distances without each group of rows.

    The list is empty where `group` is None. The root of b's covariance is computed once.

    Raises:
        ValueError: as `frechet_distance`.
    """
    root = _root(b.covariance)
    whole = _distance(moments(features), b, root)
    return whole, [] if group is None else _distances_without(features, b, group, root)


def _distance(a: Moments, b: Moments, root: Float64[Tensor, "feature rank"]) -> float:
    """The distance of a from b, whose covariance is `root` times its transpose.

    With Σ = AAᵀ the roots of the eigenvalues of Σ_1Σ_2 are the singular values of A_1ᵀA_2. They are
    computed without squaring, so that the rounding errors of null directions (fewer images than
    features) are not square-rooted into the result, and no complex number appears.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} features cannot be compared with {len(b.mean)}")
    overlap = torch.linalg.svdvals(_root(a.covariance).mT @ root).sum()
    apart = (a.mean - b.mean).square().sum()
    spread = a.covariance.trace() + b.covariance.trace()
    return max(0.0, float(apart + spread - 2 * overlap))


def _distances_without(
    features: Float[Tensor, "n feature"],
    b: Moments,
    group: Int64[Tensor, " n"],
    root: Float64[Tensor, "feature rank"],
) -> list[float]:
    """The distances from b without each group, by eigenvalues alone (several times as fast).

    The eigenvalues of Σ_1Σ_2 are those of A_2ᵀΣ_1A_2, the covariance of the features times A_2, so
    that no root of Σ_1 is needed. Their square roots have errors up to √eps of the largest one,
    which is far below a standard error.
    """
    distances = []
    for number, inner in enumerate(moments_without(features.double() @ root, group)):
        overlap = torch.linalg.eigvalsh(inner.covariance).clamp(min=0).sqrt().sum()
        rest = features[group != number].double()
        apart = (rest.mean(0) - b.mean).square().sum()
        spread = rest.var(0).sum() + b.covariance.trace()
        distances.append(max(0.0, float(apart + spread - 2 * overlap)))
    return distances


def _root(covariance: Float64[Tensor, "feature feature"]) -> Float64[Tensor, "feature rank"]:
    """A with AAᵀ = Σ, by the eigenvalues that are more than rounding errors."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    real = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return vectors[:, real] * values[real].sqrt()
