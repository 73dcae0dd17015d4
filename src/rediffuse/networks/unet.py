"""The U-Net of Ho et al. 2020 and, by its options, of the papers that followed."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rediffuse.errors import ConfigError
from rediffuse.networks.attention import Attention
from rediffuse.networks.blocks import Downsample, Repeat, ResidualBlock, Stage, Upsample, zero
from rediffuse.networks.convolutions import Convolution
from rediffuse.networks.embeddings import Embedding
from rediffuse.networks.norms import Norm, group
from rediffuse.ranges import BelowOne, Depth, Width


class UNet(nn.Module):
    """Go down level by level and up again, where each step down is remembered by a step up.

    Images are square. Level i sees them halved i times, `base_channels * channel_multipliers[i]`
    channels wide. Levels whose feature maps are one of `attention_resolutions` (pixels) attend, and
    the middle always does.

    Defaults: Ho et al. 2020, App. B, for CIFAR-10. `scale_shift`: Nichol & Dhariwal 2021, who call
    the network improved DDPM; with `head_channels=64` and `residual_resampling` too it is ADM
    (Dhariwal & Nichol 2021, Sec. 3.1). A new network answers 0 to everything.

    Raises:
        ConfigError: if the size cannot be halved that often, no level has a size that is to attend,
            or the channels cannot be split into the groups or heads.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        image_size: int,
        num_classes: int = 0,
        null_class: bool = False,
        base_channels: Width = 128,
        channel_multipliers: Sequence[Depth] = (1, 2, 2, 2),
        blocks_per_level: Depth = 2,
        attention_resolutions: Sequence[Width] = (16,),
        heads: Width = 1,
        head_channels: Width | None = None,
        scale_shift: bool = False,
        residual_resampling: bool = False,
        norm: Norm = group,
        dropout: BelowOne = 0.0,
    ) -> None:
        super().__init__()
        _check_numbers(base_channels, channel_multipliers, blocks_per_level, dropout)
        sizes = _feature_sizes(image_size, len(channel_multipliers))
        _check_attention(attention_resolutions, sizes)
        attention = partial(Attention, norm=norm, heads=heads, head_channels=head_channels)
        block = partial(
            ResidualBlock,
            embedding_channels=4 * base_channels,
            norm=norm,
            scale_shift=scale_shift,
            dropout=dropout,
        )

        def stage(before: int, after: int, size: int) -> Stage:
            attends = [attention(after)] if size in attention_resolutions else []
            return Stage([block(before, after), *attends])

        def resized(channels: int, plain: type[nn.Module], resample: nn.Module) -> nn.Module:
            if residual_resampling:
                return block(channels, channels, resample=resample)
            return plain(channels)

        width = base_channels
        widths = [width]  # of what is remembered on the way down
        levels = [
            (size, base_channels * m) for size, m in zip(sizes, channel_multipliers, strict=True)
        ]

        self.embedding = Embedding(
            base_channels, 4 * base_channels, num_classes=num_classes, null_class=null_class
        )
        self.conv_in = Convolution(in_channels, width)
        self.down = nn.ModuleList()
        for size, after in levels:
            for _ in range(blocks_per_level):
                self.down.append(stage(width, after, size))
                widths.append(width := after)
            if size != sizes[-1]:
                self.down.append(Stage([resized(width, Downsample, nn.AvgPool2d(2))]))
                widths.append(width)
        self.middle = Stage([block(width, width), attention(width), block(width, width)])
        self.up = nn.ModuleList()
        for size, after in reversed(levels):
            for _ in range(blocks_per_level + 1):
                self.up.append(last := stage(width + widths.pop(), after, size))
                width = after
            if size != sizes[0]:
                last.append(resized(width, Upsample, Repeat()))
        self.norm_out = norm(width)
        self.conv_out = zero(Convolution(width, out_channels))

    def forward(
        self,
        x: Float[Tensor, "batch in_c height width"],
        label: Float[Tensor, " batch"],
        cond: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_c height width"]:
        """Answer with an image for each x; `label` is a number per noise level, `cond` a class.

        Raises:
            ConfigError: if there is a cond but no classes, or the other way round.
        """
        embedding = F.silu(self.embedding(label, cond))
        h = self.conv_in(x).contiguous(memory_format=_layout(self.conv_out.weight))
        remembered = [h]
        for stage in self.down:
            h = stage(h, embedding)
            remembered.append(h)
        h = self.middle(h, embedding)
        for stage in self.up:
            h = stage(torch.cat((h, remembered.pop()), dim=1), embedding)
        output: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return output


def _layout(weight: Tensor) -> torch.memory_format:
    """That of the weights, in which a convolution answers too unless its image has one channel."""
    return torch.contiguous_format if weight.is_contiguous() else torch.channels_last


def _check_numbers(base: int, multipliers: Sequence[int], blocks: int, dropout: float) -> None:
    if base < 4 or base % 2:
        raise ConfigError(f"base_channels must be even and at least 4, not {base}")
    if not multipliers or min(multipliers) < 1:
        raise ConfigError(
            f"channel_multipliers must be one positive number per level, not {list(multipliers)}"
        )
    if blocks < 1:
        raise ConfigError(f"blocks_per_level must be at least 1, not {blocks}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be a probability below 1, not {dropout}")


def _feature_sizes(image_size: int, levels: int) -> list[int]:
    step = 2 ** (levels - 1)
    if image_size % step:
        below = image_size // step * step
        nearest = f"{below}, {below + step}" if below else f"{step}"
        raise ConfigError(
            f"image_size {image_size} cannot be halved {levels - 1} times; "
            f"nearest that can: {nearest}"
        )
    return [image_size >> level for level in range(levels)]


def _check_attention(resolutions: Sequence[int], sizes: Sequence[int]) -> None:
    if resolutions and not set(resolutions) & set(sizes):
        raise ConfigError(
            f"attention_resolutions {list(resolutions)} names no feature map of this network; they "
            f"are {', '.join(map(str, sizes))} pixels wide ([] leaves attention to the middle)"
        )
