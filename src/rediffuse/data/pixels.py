"""Between uint8 pixels and the model's range, and what chance does to them in between."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from rediffuse.errors import ConfigError, DataError
from rediffuse.randomness import Stream, uniform
from rediffuse.tensors import sent

Level = float | Sequence[float]
"""One number, or one per channel, where black is 0 and white is 1."""


def to_model(
    pixels: UInt8[Tensor, "*batch channel height width"], mean: Level = 0.5, std: Level = 0.5
) -> Float[Tensor, "*batch channel height width"]:
    """(pixel/255 - mean) / std in float32; the default lies in [-1, 1].

    Raises:
        ConfigError: if a list has not one number per channel.
    """
    x = pixels.float()
    return x.div_(_per_channel(255.0, x)).sub_(_per_channel(mean, x)).div_(_per_channel(std, x))


def to_uint8(
    x: Float[Tensor, "*batch channel height width"], mean: Level = 0.5, std: Level = 0.5
) -> UInt8[Tensor, "*batch channel height width"]:
    """The nearest pixels: the inverse of `to_model`, clamped to 0 .. 255.

    Raises:
        DataError: if a value is NaN or infinite, which would otherwise look like black or white.
        ConfigError: if a list has not one number per channel.
    """
    if not (finite := x.isfinite()).all():
        raise DataError(
            f"{(~finite).sum()} of {x.numel()} pixel values are NaN or infinite: the network or "
            "the solver diverged; try float32, more steps, less guidance or an earlier checkpoint"
        )
    x = x.float()
    level = x * _per_channel(std, x) + _per_channel(mean, x)
    return (level * 255).round().clamp(0, 255).to(torch.uint8)


def pixel_range(mean: Level = 0.5, std: Level = 0.5) -> tuple[Tensor, Tensor]:
    """Where black and white lie in the model's range: one number, or `[channels, 1, 1]`."""
    m, s = (torch.as_tensor(value, dtype=torch.float32) for value in (mean, std))
    low, high = (0 - m) / s, (1 - m) / s
    return (low[:, None, None], high[:, None, None]) if low.ndim else (low, high)


def augment(
    pixels: UInt8[Tensor, "batch channel height width"],
    index: Int[Tensor, " batch"],
    seed: int,
    *,
    flip: bool = False,
    crop_padding: int = 0,
) -> UInt8[Tensor, "batch channel height width"]:
    """Mirror half of the images and shift each by up to `crop_padding` pixels, keyed by its index.

    A shift is a crop out of the image padded by reflection, which adds no border for a model to
    learn; `crop_padding` is less than the image's size.
    """
    if not flip and not crop_padding:
        return pixels
    u = uniform(seed, Stream.AUGMENT, index, 3 if crop_padding else 1)
    if not crop_padding:
        # All bits of those to mirror; torch.where takes four times as long on bytes.
        mirrored = sent((u[:, 0] < 0.5).to(torch.uint8) * 255, pixels.device)
        return pixels ^ ((pixels ^ pixels.flip(-1)) & mirrored[:, None, None, None])
    height, width = pixels.shape[-2:]
    shift = (u[:, 1:] * (2 * crop_padding + 1)).long() - crop_padding
    y = _reflected(torch.arange(height) + shift[:, :1], height)
    x = _reflected(torch.arange(width) + shift[:, 1:], width)
    if flip:
        x = torch.where(u[:, :1] < 0.5, x.flip(1), x)
    image, channel = (torch.arange(n, device=pixels.device) for n in pixels.shape[:2])
    y, x = sent(y, pixels.device), sent(x, pixels.device)
    return pixels[
        image[:, None, None, None], channel[:, None, None], y[:, None, :, None], x[:, None, None]
    ]


def _reflected(at: Tensor, length: int) -> Tensor:
    last = length - 1
    return last - (last - at.abs()).abs()


def _per_channel(level: Level, x: Tensor) -> Tensor:
    """One number, or one per channel, on x's device.

    A GPU would multiply by the reciprocal of a plain number, which has another last digit.
    """
    if not isinstance(level, Sequence):
        return x.new_full((), level)
    if len(level) != x.shape[-3]:
        raise ConfigError(
            f"data.mean and data.std: {list(level)} has {len(level)} numbers for images of "
            f"{x.shape[-3]} channels; give one number for all, or one per channel"
        )
    return sent(torch.tensor(level), x.device).reshape(-1, 1, 1)
