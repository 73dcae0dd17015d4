"""The U-Net of Ho et al. 2020 and, by its options, of Nichol & Dhariwal 2021 and Dhariwal & Nichol 2021."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rediffuse.errors import ConfigError
from rediffuse.networks.attention import Attention
from rediffuse.networks.blocks import Downsample, ResidualBlock, Stage, Upsample
from rediffuse.networks.embeddings import Embedding
from rediffuse.networks.norms import Norm, group, zero


class UNet(nn.Module):
    """Down, through the middle and up again, every way down remembered for the way up (Ho et al. 2020, App. B).

    Images are square. Level i halves the size i times and is `base_channels * channel_multipliers[i]`
    channels wide; levels whose feature maps are `attention_resolutions` pixels wide attend, the middle
    always. Defaults are Ho et al.'s for CIFAR-10. Improved DDPM has `scale_shift`; ADM also has
    `head_channels=64` and `residual_resampling` (Dhariwal & Nichol 2021, Sec. 3.1).
    A fresh network answers with zeros.

    Raises:
        ConfigError: if the levels cannot halve the size, no level has a size that is to attend, or
            channels cannot be split into the groups or heads.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        image_size: int,
        num_classes: int = 0,
        null_class: bool = False,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        heads: int = 1,
        head_channels: int | None = None,
        scale_shift: bool = False,
        residual_resampling: bool = False,
        norm: Norm = group,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = feature_sizes(image_size, len(channel_multipliers))
        check_attention(attention_resolutions, sizes)
        embedding_channels = 4 * base_channels
        attention = partial(Attention, norm=norm, heads=heads, head_channels=head_channels)
        block = partial(
            ResidualBlock,
            embedding_channels=embedding_channels,
            norm=norm,
            scale_shift=scale_shift,
            dropout=dropout,
        )

        def stage(into: int, out: int, size: int) -> Stage:
            attends = [attention(out)] if size in attention_resolutions else []
            return Stage([block(into, out), *attends])

        def shrink(channels: int) -> nn.Module:
            if residual_resampling:
                return block(channels, channels, resample=nn.AvgPool2d(2))
            return Downsample(channels)

        def grow(channels: int) -> nn.Module:
            if residual_resampling:
                return block(channels, channels, resample=nn.Upsample(scale_factor=2))
            return Upsample(channels)

        self.embedding = Embedding(
            base_channels, embedding_channels, num_classes=num_classes, null_class=null_class
        )
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        levels = [
            (size, base_channels * m) for size, m in zip(sizes, channel_multipliers, strict=True)
        ]
        width = base_channels
        remembered = [width]
        self.down = nn.ModuleList()
        for size, out in levels:
            for _ in range(blocks_per_level):
                self.down.append(stage(width, out, size))
                width = out
                remembered.append(width)
            if size != sizes[-1]:
                self.down.append(Stage([shrink(width)]))
                remembered.append(width)
        self.middle = Stage([block(width, width), attention(width), block(width, width)])
        self.up = nn.ModuleList()
        for size, out in reversed(levels):
            for _ in range(blocks_per_level + 1):
                self.up.append(stage(width + remembered.pop(), out, size))
                width = out
            if size != sizes[0]:
                self.up[-1].append(grow(width))
        self.norm_out = norm(width)
        self.conv_out = zero(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(
        self,
        x: Float[Tensor, "batch in_c height width"],
        label: Float[Tensor, " batch"],
        cond: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_c height width"]:
        embedding = self.embedding(label, cond)
        h = self.conv_in(x)
        remembered = [h]
        for stage in self.down:
            h = stage(h, embedding)
            remembered.append(h)
        h = self.middle(h, embedding)
        for stage in self.up:
            h = stage(torch.cat((h, remembered.pop()), dim=1), embedding)
        return self.conv_out(F.silu(self.norm_out(h)))


def feature_sizes(image_size: int, levels: int) -> list[int]:
    """The size of each level's feature maps in pixels, or a ConfigError that names sizes that would do."""
    step = 2 ** (levels - 1)
    if image_size < step or image_size % step:
        below = image_size // step * step
        nearest = f"{below}, {below + step}" if below else f"{step}"
        raise ConfigError(
            f"image_size {image_size} cannot be halved {levels - 1} times; nearest that can: {nearest}"
        )
    return [image_size >> level for level in range(levels)]


def check_attention(attention_resolutions: Sequence[int], sizes: list[int]) -> None:
    """Refuse to attend at a size that no feature map has."""
    missing = [size for size in attention_resolutions if size not in sizes]
    if missing:
        raise ConfigError(
            f"attention_resolutions {list(attention_resolutions)}: no feature map is {missing[0]} pixels "
            f"wide; this network's are {', '.join(map(str, sizes))}"
        )
