"""From any picture file to a square of uint8."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from rediffuse.errors import DataError
from rediffuse.reading import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".jp2", ".heic", ".heif",
)  # fmt: skip
KINDS = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or HEIC"
MAX_FILE_BYTES = 50_000_000
MAX_PIXELS = 64_000_000

_ORIENTATION_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_CONVERTIBLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_SIXTEEN_BITS = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_TOO_MANY = f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels"


class Header(NamedTuple):
    """What a file says of its image before pixels are decoded; `format` is one of FORMATS."""

    size: tuple[int, int]
    mode: str
    format: str


def read(path: str | Path) -> Image.Image:
    """Decode the first frame of an image file, turned upright as its EXIF data says.

    Raises:
        DataError: giving the reason alone, if it is not a regular file, too large (which is judged
            before anything is decoded), broken, or of a kind that is not read.
    """
    data = _content(path)
    with _opened(data) as image:
        raw_mode = _raw_mode(image)
        image.load()
        if image.mode == "I" and not _has_16_bits(image):
            raise DataError("it has more than 16 bits per channel")
        _mend_transparency(image, raw_mode, data)
        if not _ORIENTATION_KEYS.isdisjoint(image.info):
            ImageOps.exif_transpose(image, in_place=True)
    return image


def header(path: str | Path) -> Header:
    """Read the size, mode and format of an image file, without decoding it.

    Raises:
        DataError: giving the reason alone, as `read` does.
    """
    with _opened(_content(path)) as image:
        # A JPEG file with a second picture behind the first is called MPO by Pillow.
        return Header(image.size, image.mode, str(image.format).replace("MPO", "JPEG"))


def _content(path: str | Path) -> bytes:
    try:
        return read_bytes(path, MAX_FILE_BYTES, links=True)
    except FileNotFoundError:
        raise DataError("there is no such file, or it is a link that leads nowhere") from None
    except IsADirectoryError:
        raise DataError("it is not a regular file") from None
    except OSError as failed:
        raise DataError(f"it cannot be read ({failed.strerror or failed})") from None
    except ValueError as refused:
        raise DataError(str(refused)) from None


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image whose size and mode can be used; what goes wrong is raised as a DataError."""
    try:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            _register_heif()
        # Pillow asks for a few bytes at a time: from memory that takes half as long.
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(_TOO_MANY)
            if image.mode not in _CONVERTIBLE | _SIXTEEN_BITS:
                raise DataError(f"its pixels are of a kind that is not read ({image.mode})")
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"it is not a {KINDS} image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_TOO_MANY) from None
    except Exception as broken:  # Pillow raises whatever its decoders stumble over
        raise DataError(f"it is broken ({' '.join(str(broken).split())[:200]})") from None


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        raise DataError(
            "it is an HEIC image, which needs pillow-heif: pip install 'rediffuse[heif]'"
        ) from None
    pillow_heif.register_heif_opener()


def _known_formats() -> list[str]:
    """Those of FORMATS for which this Pillow has a decoder; it refuses to be asked for others."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _raw_mode(image: Image.Image) -> str:
    """How a PNG file stores its pixels, as Pillow calls it (`L;4`, `RGB;16B`)."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    args = tiles[0][3] if image.format == "PNG" and tiles else ""
    return str(args[0] if isinstance(args, tuple) else args)


def _has_16_bits(image: Image.Image) -> bool:
    levels = np.asarray(image)
    return bool(levels.min() >= 0 and levels.max() <= 65_535)


def _mend_transparency(image: Image.Image, raw_mode: str, data: bytes) -> None:
    """Correct the transparent level of a PNG file where Pillow changes levels and not that one."""
    level = image.info.get("transparency")
    if raw_mode in ("L;2", "L;4") and isinstance(level, int):
        most = 3 if raw_mode == "L;2" else 15
        image.info["transparency"] = (level & most) * (255 // most)
    elif raw_mode == "RGB;16B" and isinstance(level, tuple):
        high, low = np.asarray(image, np.uint16), np.asarray(_low_bytes(data), np.uint16)
        opaque = (high * 256 + low != np.array(level, np.uint16)).any(-1)
        del image.info["transparency"]
        image.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))


def _low_bytes(data: bytes) -> Image.Image:
    """The lower 8 of the 16 bits of each channel, of which Pillow keeps the upper ones."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        assert isinstance(image, ImageFile.ImageFile)
        # The files are big-endian: read as little-endian, the lower byte is the upper one.
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        image.load()
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
    if image.mode in _SIXTEEN_BITS:  # which Pillow would clip at 255
        image = _in_8_bits(image)
    if mode != "RGBA" and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == mode else image.convert(mode)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, rounded to 8; a level that is transparent becomes alpha."""
    levels = np.array(image, np.int32)
    transparent = image.info.get("transparency")
    opaque = levels != transparent if isinstance(transparent, int) else None
    levels += 128  # so that the division rounds; floats would take a gigabyte
    levels //= 257
    grey = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if opaque is not None:
        grey.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return grey


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
