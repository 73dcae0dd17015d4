"""The one place where a coefficient meets an image."""

from torch import Tensor


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Give a scalar or `[batch]` float64 coefficient the rank, dtype and device of `like`.

    A `[batch]` vector times `[batch, channels, height, width]` would broadcast over the *width*
    wherever the two happen to be equal, silently; every product in the code goes through here.
    """
    if coefficient.ndim == 0:
        # A 0-dim CPU tensor mixes with any device without a copy, hence without a synchronisation.
        return coefficient.to(like.dtype)
    return coefficient.to(like).reshape(-1, *(1,) * (like.ndim - 1))
