"""Where a number meets an image, and where it crosses over to the device."""

import torch
from torch import Tensor

FETCHING = {"cuda"}
"""Types of devices that fetch pinned memory by themselves."""


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Give a scalar or `[batch]` float64 coefficient the rank, dtype and device of `like`.

    A `[batch]` vector times `[batch, channels, height, width]` would broadcast over the *width*
    wherever the two happen to be equal, silently; every product in the code goes through here.
    """
    coefficient = coefficient.to(like.dtype)  # before it is sent: not every device knows float64
    if coefficient.ndim == 0:
        return coefficient  # a 0-dim CPU tensor mixes with any device without a copy
    return sent(coefficient, like.device).reshape(-1, *(1,) * (like.ndim - 1))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Give a device a tensor without waiting for it.

    A GPU fetches what lies in pinned memory by itself; a plain copy would wait until it has done
    all that it was told before.
    """
    if device.type in FETCHING and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
