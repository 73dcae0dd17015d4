"""Pixels to files: single images, grids of them, films."""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rediffuse.tracking.jsonl import write_atomically

MARK = "rediffuse"
"""The text of a PNG, and the comment of a GIF, by which a file of ours is known."""

Pixels = UInt8[np.ndarray, "count channels height width"]


def grid(
    images: Pixels, columns: int | None = None, gap: int = 2, least: int = 28, paper: int = 255
) -> UInt8[np.ndarray, "h w c"]:
    """Lay images out in rows, left to right, on white or another `paper`.

    Tiny ones are enlarged to `least` pixels.
    """
    images = enlarged(images, least)
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), paper, np.uint8
    )
    for k, image in enumerate(images):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return canvas


def enlarged(
    images: Pixels, least: int = 28
) -> UInt8[np.ndarray, "count channels zoomed_height zoomed_width"]:
    """Repeat the pixels of tiny images until they are `least` pixels wide."""
    zoom = max(1, -(-least // images.shape[-1]))
    return images.repeat(zoom, axis=2).repeat(zoom, axis=3)


def columns_for(count: int, class_names: Sequence[str]) -> int:
    """One column per class where that makes a picture, else a square."""
    classes = len(class_names)
    return classes if 1 < classes <= 20 and count >= classes else math.ceil(math.sqrt(count))


def save_png(
    pixels: UInt8[np.ndarray, "h w c"], file: Path, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write a PNG, complete or not at all; `facts` go into it as JSON, as the text `rediffuse`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, png(pixels, facts), sync=False)
    return file


PICTURES = (".png", ".jpg", ".jpeg")


def save_picture(pixels: UInt8[np.ndarray, "h w c"], file: Path, facts: Mapping[str, Any]) -> Path:
    """Write a PNG or a JPEG, as the name ends, with its facts; complete or not at all.

    A JPEG has no transparency: images of 4 channels lie on white.
    """
    if file.suffix.lower() == ".png":
        return save_png(pixels, file, facts)
    image, written = _image(pixels), io.BytesIO()
    if image.mode == "RGBA":
        below = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(below, image).convert("RGB")
    image.save(written, "JPEG", quality=95, comment=f"{MARK} {json.dumps(facts)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, written.getvalue(), sync=False)
    return file


def save_film(frames: Iterable[UInt8[np.ndarray, "h w c"]], file: Path) -> Path:
    """Write frames as a GIF that repeats for ever, 80 ms each; complete or not at all."""
    first, *rest = map(_image, frames)
    written = io.BytesIO()
    first.save(written, "GIF", save_all=True, append_images=rest, duration=80, loop=0, comment=MARK)
    write_atomically(file, written.getvalue(), sync=False)
    return file


def film(frames: Sequence[UInt8[np.ndarray, "h w c"]], last_ms: int = 1500) -> bytes:
    """Frames as the bytes of a GIF that rests on the last one.

    A bar below them says how far it is.
    """
    first, *rest = (
        _image(_with_bar(frame, k / len(frames))) for k, frame in enumerate(frames, start=1)
    )
    written = io.BytesIO()
    durations = [120] * len(rest) + [last_ms]
    first.save(written, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return written.getvalue()


def png(pixels: UInt8[np.ndarray, "h w c"], facts: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a PNG, as `save_png` writes it."""
    written, text = io.BytesIO(), PngInfo()
    if facts is not None:
        text.add_text(MARK, json.dumps(facts))
    _image(pixels).save(written, "PNG", pnginfo=text)
    return written.getvalue()


def _with_bar(frame: np.ndarray, share: float, height: int = 4) -> np.ndarray:
    bar = np.full((2 * height, *frame.shape[1:]), 136, np.uint8)
    bar[height:] = 200
    bar[height:, : round(share * frame.shape[1])] = 90
    bar[..., 3:] = 255
    return np.concatenate((frame, bar))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
