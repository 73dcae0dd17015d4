"""The networks that are compared: each size in our words and in those of the peers."""

from dataclasses import dataclass

from rediffuse.networks.norms import group
from rediffuse.networks.unet import UNet


@dataclass(frozen=True)
class Size:
    """A U-Net, the images that it is for, and how many of them a step takes."""

    name: str
    image_size: int
    channels: int
    base_channels: int
    multipliers: tuple[int, ...]
    attention: tuple[bool, ...]  # level by level
    groups: int
    scale_shift: bool
    batch_size: int
    blocks: int = 2  # a level

    def ours(self) -> UNet:
        """The network as Rediffuse builds it."""
        return UNet(
            in_channels=self.channels,
            out_channels=self.channels,
            image_size=self.image_size,
            base_channels=self.base_channels,
            channel_multipliers=self.multipliers,
            blocks_per_level=self.blocks,
            attention_resolutions=[
                self.image_size >> level for level, attends in enumerate(self.attention) if attends
            ],
            norm=lambda channels: group(channels, groups=self.groups),
            scale_shift=self.scale_shift,
        )


SMALL = Size("1.6 M, 28 x 28", 28, 1, 32, (1, 2, 2), (False, False, True), 8, True, 128)
LARGE = Size(
    "35.7 M, 32 x 32", 32, 3, 128, (1, 2, 2, 2), (False, True, False, False), 32, False, 16
)
SIZES = {"small": SMALL, "large": LARGE}
