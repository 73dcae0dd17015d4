"""The layers of a U-Net: residual blocks and changes of size."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from rediffuse.errors import ConfigError
from rediffuse.networks.convolutions import Convolution
from rediffuse.networks.norms import Norm, forgets_channel_means, group, modulated

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def zero(layer: Layer) -> Layer:
    """Let a layer begin as 0, as Ho et al. 2020's code does where a residual branch ends."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _activated(h: Tensor, *, own: bool) -> Tensor:
    """SiLU; in the place of h, where that is nobody else's and no gradient asks what it was."""
    return F.silu(h, inplace=own and not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Norm-SiLU-conv twice, told of an embedding between the two (Ho et al. 2020, App. B).

    The embedding is added to every position; with `scale_shift` it scales and shifts what the
    second norm gives (Dhariwal & Nichol 2021, Sec. 3.1). `resample` changes the size, inside the
    block and beside it (Brock et al. 2019, App. B: "BigGAN").

    Raises:
        ConfigError: if the norm takes away again what the embedding adds.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        norm: Norm = group,
        scale_shift: bool = False,
        dropout: float = 0.0,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.norm_1 = norm(in_channels)
        self.conv_1 = Convolution(in_channels, out_channels)
        self.modulation = nn.Linear(embedding_channels, (1 + scale_shift) * out_channels)
        self.norm_2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv_2 = zero(Convolution(out_channels, out_channels))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        if forgets_channel_means(self.norm_2) and not scale_shift:
            raise ConfigError(
                f"a norm of each of {out_channels} channels by itself subtracts what the noise "
                "level adds; use scale_shift=true, or a norm over several channels (fewer groups)"
            )

    def forward(
        self, x: Float[Tensor, "batch in_c height width"], embedding: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch out_c new_height new_width"]:
        modulation = self.modulation(embedding)
        is_new = isinstance(self.norm_1, nn.GroupNorm | nn.BatchNorm2d)  # a user's may be a view
        h = self.conv_1(self.resample(_activated(self.norm_1(x), own=is_new)))
        if self.scale_shift:
            h = modulated(self.norm_2, h, *modulation.chunk(2, dim=1))
        else:
            h = self.norm_2(h + modulation[:, :, None, None])
        h = self.conv_2(self.dropout(_activated(h, own=True)))
        skipped: Tensor = self.skip(self.resample(x))
        return skipped + h


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded as TensorFlow's "SAME"."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height//2 width//2"]:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Repeat(nn.Module):
    """Double height and width by repeating pixels."""

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel 2*height 2*width"]:
        if x.device.type == "cpu" or not torch.compiler.is_compiling():
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return repeated(x)


def repeated(
    x: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch channel 2*height 2*width"]:
    """Every pixel four times, for a compiler on a GPU.

    It would make the gradient of interpolate out of atomic additions, in no certain order.
    """
    twice = repeat(x, "b c h w -> b (h i) (w j) c", i=2, j=2)
    return rearrange(twice, "b h w c -> b c h w")


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.repeat = Repeat()
        self.conv = Convolution(channels, channels)

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel 2*height 2*width"]:
        doubled: Tensor = self.conv(self.repeat(x))
        return doubled


class Stage(nn.ModuleList):
    """Layers in a row; the residual blocks among them are told the embedding."""

    def forward(
        self, x: Float[Tensor, "batch in_c height width"], embedding: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch out_c new_height new_width"]:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x
