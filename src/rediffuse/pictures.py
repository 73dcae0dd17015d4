"""Pixels to files: single images, grids of them, films."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "count channels height width"]


def grid(
    images: Pixels, columns: int | None = None, gap: int = 2, least: int = 28
) -> UInt8[np.ndarray, "h w c"]:
    """Lay images out in rows, left to right, on white; tiny ones are enlarged to `least` pixels."""
    zoom = max(1, -(-least // images.shape[-1]))
    images = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for k, image in enumerate(images):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return canvas


def columns_for(count: int, class_names: Sequence[str]) -> int:
    """One column per class where that makes a picture, else a square."""
    classes = len(class_names)
    return classes if 1 < classes <= 20 and count >= classes else math.ceil(math.sqrt(count))


def save_png(pixels: UInt8[np.ndarray, "h w c"], file: Path) -> Path:
    """Write a PNG, complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    building = file.with_name(f".{file.name}.{os.getpid()}")
    _image(pixels).save(building, "PNG")
    building.replace(file)
    return file


def save_film(frames: Iterable[UInt8[np.ndarray, "h w c"]], file: Path) -> Path:
    """Write frames as a GIF that repeats for ever, 80 ms each."""
    first, *rest = map(_image, frames)
    first.save(file, save_all=True, append_images=rest, duration=80, loop=0)
    return file


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
