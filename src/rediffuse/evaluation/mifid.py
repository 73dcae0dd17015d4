"""FID that a memorising model cannot win: MiFID."""

import torch
from jaxtyping import Float
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
    apart = memorization_distance(real, fake)
    return distance / (apart + _SMALLEST) if apart < threshold else distance


def memorization_distance(
    real: Float[Tensor, "n feature"], fake: Float[Tensor, "m feature"]
) -> float:
    """Mean over samples of the least 1 - |cos| to a real image, where features are not all 0."""
    real, fake = _directions(real), _directions(fake)
    nearest = [1 - (rows @ real.mT).abs().max(dim=1).values for rows in fake.split(_ROWS)]
    return float(torch.cat(nearest).clamp(min=0).mean())


def _directions(x: Float[Tensor, "n feature"]) -> Float[Tensor, "some feature"]:
    x = x.double()
    length = x.norm(dim=1, keepdim=True)
    kept = length[:, 0] > 0
    if not kept.any():
        raise ValueError("all features are zero, so that they have no direction")
    return x[kept] / length[kept]
