"""The Fréchet distance between two Gaussians: FID, where the features are Inception's."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float64
from torch import Tensor

from rediffuse.evaluation.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance of two Gaussians; see `frechet_distances`."""
    (distance,) = frechet_distances([a], b)
    return distance


def frechet_distances(each: Iterable[Moments], b: Moments) -> Iterator[float]:
    """Yield the distance of each from b:

    |μ_1 - μ_2|² + tr(Σ_1 + Σ_2 - 2(Σ_1Σ_2)^½) (Dowson & Landau 1982; Heusel et al. 2017, Eq. 6).

    With Σ = AAᵀ the roots of the eigenvalues of Σ_1Σ_2 are the singular values of A_1ᵀA_2. They are
    found without squaring, so that the rounding errors of null directions (fewer images than
    features) are not square-rooted into the result, and no complex number appears.
    """
    root = _root(b.covariance)
    for a in each:
        if a.mean.shape != b.mean.shape:
            raise ValueError(f"{len(a.mean)} features cannot be compared with {len(b.mean)}")
        overlap = torch.linalg.svdvals(_root(a.covariance).mT @ root).sum()
        apart = (a.mean - b.mean).square().sum()
        spread = a.covariance.trace() + b.covariance.trace()
        yield max(0.0, float(apart + spread - 2 * overlap))


def _root(covariance: Float64[Tensor, "feature feature"]) -> Float64[Tensor, "feature rank"]:
    """A with AAᵀ = Σ, by the eigenvalues that are more than rounding errors."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    real = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return vectors[:, real] * values[real].sqrt()
