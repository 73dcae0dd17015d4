"""Normalisation for `[batch, channels, height, width]`: a number of channels in, a module out.

Statistics are float32 under autocast, on CUDA because autocast says so, on CPUs because ATen keeps them in
the precision of the weights.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from rediffuse.errors import ConfigError

Norm = Callable[[int], nn.Module]


def group(channels: int, *, groups: int = 32, eps: float = 1e-6) -> nn.GroupNorm:
    """Normalise groups of channels of each image (Wu & He 2018); defaults as in Ho et al. 2020, App. B.

    Raises:
        ConfigError: if the groups cannot be equally large.
    """
    if channels % groups:
        possible = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
        raise ConfigError(
            f"group norm cannot split {channels} channels into {groups} equal groups; "
            f"group counts that divide {channels}: {possible}"
        )
    return nn.GroupNorm(groups, channels, eps)


def layer(channels: int, *, eps: float = 1e-6) -> nn.GroupNorm:
    """Normalise each image as a whole (Ba et al. 2016): one group."""
    return nn.GroupNorm(1, channels, eps)


def instance(channels: int, *, eps: float = 1e-6) -> nn.GroupNorm:
    """Normalise each channel of each image (Ulyanov et al. 2016): as many groups as channels."""
    return nn.GroupNorm(channels, channels, eps)


def batch(channels: int, *, eps: float = 1e-5) -> nn.BatchNorm2d:
    """Normalise each channel over the batch (Ioffe & Szegedy 2015); in eval mode by running statistics."""
    return nn.BatchNorm2d(channels, eps)


def forgets_channel_means(norm: nn.Module) -> bool:
    """Whether adding a number to a channel of an image changes nothing after `norm`."""
    return isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def zero(layer: Layer) -> Layer:
    """Let a residual branch begin as nothing (Ho et al. 2020; Dhariwal & Nichol 2021)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
