"""Read the PNG files of a run, whose size is judged before a pixel is decoded."""

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from rediffuse.reading import read_bytes, why

MAX_FILE_BYTES = 50_000_000
MAX_PIXELS = 64_000_000


def read_png(file: Path, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG file of up to so many pixels.

    Raises:
        OSError: if it cannot be read.
        ValueError: giving the reason, if it has more, is broken, a link, or no PNG file.
    """
    return _opened(file, most_pixels, load=True)


def png_header(file: Path) -> Image.Image:
    """Read the size and the texts of a PNG file, whose pixels cannot be used.

    Raises:
        OSError, ValueError: as `read_png` does.
    """
    return _opened(file, MAX_PIXELS, load=False)


def _opened(file: Path, most_pixels: int, *, load: bool) -> Image.Image:
    data, too_many = read_bytes(file, MAX_FILE_BYTES), f"{most_pixels / 1e6:.3g} million pixels"
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > most_pixels:
                raise ValueError(f"it has more than {too_many}")
            if load:
                image.load()
    except UnidentifiedImageError:
        raise ValueError("it is not a PNG image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"it has more than {too_many}") from None
    except Exception as broken:  # Pillow raises whatever its decoder stumbles over
        raise ValueError(why(broken)) from None
    return image
