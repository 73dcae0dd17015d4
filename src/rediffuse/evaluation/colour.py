"""Colours of uint8 images: what a shift of brightness or contrast shows in first."""

from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel's pixels, in levels 0 .. 255."""

    mean: Float64[Tensor, " channel"]
    sd: Float64[Tensor, " channel"]


def histogram(
    pixels: UInt8[Tensor, "batch channel height width"],
) -> Int64[Tensor, "channel 256"]:
    """Count each channel's levels; the histogram of more images is the sum of theirs."""
    channels = pixels.movedim(1, 0).flatten(1)
    return torch.stack([torch.bincount(one, minlength=256) for one in channels])


def channel_statistics(counts: Int64[Tensor, "channel 256"]) -> ChannelStatistics:
    """Mean and standard deviation of what a histogram counted."""
    share, levels = _share(counts), torch.arange(256, dtype=torch.float64)
    mean = share @ levels
    return ChannelStatistics(mean, (share * (levels - mean[:, None]) ** 2).sum(1).sqrt())


def histogram_distance(
    a: Int64[Tensor, "channel 256"], b: Int64[Tensor, "channel 256"]
) -> Float64[Tensor, " channel"]:
    """How many levels pixels have to be moved by, on average, to turn one into the other.

    It is the first Wasserstein distance: the area between the cumulative histograms.
    """
    return (_share(a).cumsum(1) - _share(b).cumsum(1)).abs().sum(1)


def _share(counts: Int64[Tensor, "channel 256"]) -> Float64[Tensor, "channel 256"]:
    return counts.double() / counts.sum(1, keepdim=True)
