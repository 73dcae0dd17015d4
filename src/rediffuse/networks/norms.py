"""Normalisation for `[batch, channels, height, width]`: a number of channels in, a module out.

Under autocast the statistics stay float32: CUDA does all of it in float32, a CPU keeps mean and
deviation in the precision of the weights and rounds only its answer.
"""

from collections.abc import Callable

from torch import nn

from rediffuse.errors import ConfigError

Norm = Callable[[int], nn.Module]


def group(channels: int, *, groups: int = 32, eps: float = 1e-6) -> nn.GroupNorm:
    """Normalise groups of channels of an image (Wu & He 2018; defaults of Ho et al. 2020's code).

    Raises:
        ConfigError: if the groups cannot be equally large.
    """
    if groups < 1 or channels % groups:
        raise ConfigError(
            f"group norm cannot split {channels} channels into {groups} equal groups; "
            f"numbers of groups that divide {channels}: {divisors(channels)}"
        )
    return nn.GroupNorm(groups, channels, eps)


def layer(channels: int, *, eps: float = 1e-6) -> nn.GroupNorm:
    """Normalise an image as a whole (Ba et al. 2016): one group."""
    return nn.GroupNorm(1, channels, eps)


def instance(channels: int, *, eps: float = 1e-6) -> nn.GroupNorm:
    """Normalise each channel of an image (Ulyanov et al. 2016): as many groups as channels."""
    return nn.GroupNorm(channels, channels, eps)


def batch(channels: int, *, eps: float = 1e-5) -> nn.BatchNorm2d:
    """Normalise each channel over the batch, later by running means (Ioffe & Szegedy 2015)."""
    return nn.BatchNorm2d(channels, eps)


def forgets_channel_means(norm: nn.Module) -> bool:
    """Whether a number added to a whole channel of an image is gone after `norm`."""
    return isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels


def divisors(number: int) -> str:
    """Name the numbers that divide it, for messages."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
