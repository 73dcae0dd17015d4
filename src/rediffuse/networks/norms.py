"""Normalisation for `[batch, channels, height, width]`: a number of channels in, a module out.

Under autocast the statistics stay float32: CUDA does all of it in float32, a CPU keeps mean and
deviation in the precision of the weights and rounds only its answer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rediffuse.errors import ConfigError
from rediffuse.networks import fused
from rediffuse.ranges import Positive, Width

Norm = Callable[[int], nn.Module]


class GroupNorm(nn.GroupNorm):
    """torch's group norm or, once `fast`, that of `networks.fused`.

    On a GPU only while the compiler looks: without it the formula is slower than torch's.
    """

    fast = False

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Normalise; with a scale and a shift per image and channel, (1 + scale)·h + shift."""
        if self.fast and (x.device.type == "cpu" or torch.compiler.is_compiling()):
            given = self.weight, self.bias, self.num_groups, self.eps
            return fused.group_norm(x, *given, scale, shift)
        return _modulated(super().forward(x), scale, shift)


def modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise x, then (1 + scale)·h + shift: a number per image and channel, each."""
    if isinstance(norm, GroupNorm):
        return norm(x, scale, shift)
    return _modulated(norm(x), scale, shift)


def _modulated(h: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None or shift is None:
        return h
    return h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def group(channels: int, *, groups: Width = 32, eps: Positive = 1e-6) -> GroupNorm:
    """Normalise groups of channels of an image (Wu & He 2018; defaults of Ho et al. 2020's code).

    Raises:
        ConfigError: if the groups cannot be equally large.
    """
    if groups < 1 or channels % groups:
        raise ConfigError(
            f"group norm cannot split {channels} channels into {groups} equal groups; "
            f"numbers of groups that divide {channels}: {divisors(channels)}"
        )
    return GroupNorm(groups, channels, eps)


def layer(channels: int, *, eps: Positive = 1e-6) -> GroupNorm:
    """Normalise an image as a whole (Ba et al. 2016): one group."""
    return GroupNorm(1, channels, eps)


def instance(channels: int, *, eps: Positive = 1e-6) -> GroupNorm:
    """Normalise each channel of an image (Ulyanov et al. 2016): as many groups as channels."""
    return GroupNorm(channels, channels, eps)


def batch(channels: int, *, eps: Positive = 1e-5) -> nn.BatchNorm2d:
    """Normalise each channel over the batch, later by running means (Ioffe & Szegedy 2015)."""
    return nn.BatchNorm2d(channels, eps)


def forgets_channel_means(norm: nn.Module) -> bool:
    """Whether a number added to a whole channel of an image is gone after `norm`."""
    return isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels


def divisors(number: int) -> str:
    """Name the numbers that divide it, for messages."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
