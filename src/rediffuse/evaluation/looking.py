"""What feature networks have in common."""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from rediffuse.errors import DataError


def as_rgb(
    pixels: UInt8[Tensor, "batch channel height width"],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Repeat grey to three channels.

    Raises:
        DataError: if there are neither one nor three.
    """
    if pixels.shape[1] not in (1, 3):
        raise DataError(f"features need images of 1 or 3 channels, not {pixels.shape[1]}")
    return pixels.expand(-1, 3, -1, -1)


def full_precision() -> Any:
    """Convolve in float32 on a GPU too, where 10 bits of it would be kept; for a `with`."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
