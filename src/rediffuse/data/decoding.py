"""From any picture file to a square of uint8."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from rediffuse.errors import DataError
from rediffuse.reading import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_FILE_BYTES = 50_000_000
MAX_PIXELS = 64_000_000

_SAY_WHICH_SIDE_IS_UP = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TOO_MANY = f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels"


def read(path: str | Path) -> Image.Image:
    """Decode the first frame of a PNG, JPEG or WebP file, turned upright as its EXIF data says.

    Raises:
        DataError: giving the reason alone, if it is not a regular file, too large (which is judged
            before anything is decoded) or broken.
    """
    try:
        return _read(path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError("there is no such file, or it is a link that leads nowhere") from None
    except UnidentifiedImageError:
        raise DataError("it is not a PNG, JPEG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_TOO_MANY) from None
    except Exception as broken:  # Pillow raises whatever its decoders stumble over
        raise DataError(f"it is broken ({' '.join(str(broken).split())})") from None


def _read(path: str | Path) -> Image.Image:
    try:
        data = read_bytes(path, MAX_FILE_BYTES, links=True)
    except ValueError as refused:
        raise DataError(str(refused)) from None
    except IsADirectoryError:
        raise DataError("it is not a regular file") from None
    # Pillow asks for a few bytes at a time: from memory that takes half as long.
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(_TOO_MANY)
        image.load()
        if not _SAY_WHICH_SIDE_IS_UP.isdisjoint(image.info):
            ImageOps.exif_transpose(image, in_place=True)
    return image


def to_square(
    image: Image.Image,
    image_size: int,
    channels: int,
    fit: Literal["crop", "pad"] = "crop",
    fill: int = 0,
) -> UInt8[np.ndarray, "channel size size"]:
    """Make a picture `image_size` pixels wide and high: luminance (1 channel), RGB (3) or RGBA (4).

    `crop` keeps the central square, `pad` keeps everything and fills what is missing with `fill`
    (0 .. 255). What is transparent shows white, unless alpha is kept. Resampling is Pillow's
    antialiased Lanczos filter, as for EDM's data (Karras et al. 2022); what fits keeps its pixels.
    """
    image = _in_mode(image, _MODES[channels])
    square = _cropped(image, image_size) if fit == "crop" else _padded(image, image_size, fill)
    pixels = np.asarray(square).reshape(image_size, image_size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255
        grey = np.asarray(image, np.int32).clip(0, 65_535)
        grey += 128  # so that the division rounds; floats would take a gigabyte
        image = Image.fromarray((grey // 257).astype(np.uint8))
    if mode != "RGBA" and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == mode else image.convert(mode)


def _cropped(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return image if image.size == (size, size) else image.crop(box)
    return image.resize((size, size), Image.Resampling.LANCZOS, box)


def _padded(image: Image.Image, size: int, fill: int) -> Image.Image:
    if (longer := max(image.size)) != size:
        width, height = (max(1, round(side * size / longer)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new(image.mode, (size, size), (fill,) * len(image.getbands()))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
