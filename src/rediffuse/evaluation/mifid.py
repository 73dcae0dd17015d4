"""FID that a memorising model cannot win: MiFID."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_ROWS = 1024
_SMALLEST = 1e-14


def memorization_informed(
    distance: float,
    real: Float[Tensor, "n feature"],
    fake: Float[Tensor, "m feature"],
    *,
    threshold: float = 0.1,
) -> float:
    """Divide a Fréchet distance by how far samples are from training images (Bai et al. 2021).

    Nothing is divided where they are further than `threshold`. `real` are the images that the model
    was trained on. torchmetrics, whose threshold this is, looks from each real image for the
    nearest sample; the paper, and this, from each sample for the nearest real image.
    """
    return informed(distance, memorization_distance(real, fake), threshold)


def informed(distance: float, apart: float, threshold: float = 0.1) -> float:
    """Divide a distance by how far samples are from training images, if that is below a limit."""
    return distance / (apart + _SMALLEST) if apart < threshold else distance


def memorization_distance(
    real: Float[Tensor, "n feature"], fake: Float[Tensor, "m feature"]
) -> float:
    """Mean over samples of the least 1 - |cos| to a real image, where features are not all 0."""
    return float(memorization_distances(real, fake).nanmean())


def memorization_distances(
    real: Float[Tensor, "n feature"], fake: Float[Tensor, "m feature"]
) -> Float64[Tensor, " m"]:
    """The least 1 - |cos| of each sample to a real image; NaN where its features are all 0."""
    real, kept = _directions(real), fake.double().norm(dim=1) > 0
    near = [1 - (rows @ real.mT).abs().max(dim=1).values for rows in _directions(fake).split(_ROWS)]
    found = torch.full((len(fake),), torch.nan, dtype=torch.float64)
    found[kept] = torch.cat(near).clamp(min=0)
    return found


def _directions(x: Float[Tensor, "n feature"]) -> Float[Tensor, "some feature"]:
    x = x.double()
    length = x.norm(dim=1, keepdim=True)
    kept = length[:, 0] > 0
    if not kept.any():
        raise ValueError("all features are zero, so that they have no direction")
    return x[kept] / length[kept]
