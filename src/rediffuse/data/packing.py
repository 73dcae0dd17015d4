"""Decode once: a source becomes one memory-mapped uint8 array per part.

<folder>/facts.json           settings, class names, counts, what is left out, fingerprint, versions
<folder>/<part>/images.npy    [images, channels, size, size] uint8
<folder>/<part>/labels.npy    [images] int64, -1 where there are no classes
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from rediffuse import locks
from rediffuse.data.ahead import ahead
from rediffuse.data.decoding import to_square
from rediffuse.data.sources import AnySource, Broken, Example, Examples, FileExamples
from rediffuse.errors import DataError
from rediffuse.progress import Progress
from rediffuse.reading import read_object

FORMAT = 1
"""Raised when the files change, or the pixels that come of the same images."""

PARTS = ("train", "validation", "test")
FACTS = "facts.json"
_FACTS_BYTES = 500_000_000  # every image that was left out is named

_CHUNK, _CHUNK_BYTES = 256, 2**24  # the most that a thread or process decodes at a time
_WORTH_PROCESSES = 4096  # files: to start processes takes about a second

Square = Callable[[Image.Image], UInt8[np.ndarray, "channel size size"]]


@dataclass(frozen=True)
class Part:
    """Images, memory-mapped, and the numbers of their classes (None: without)."""

    images: UInt8[np.ndarray, "images channel size size"]
    labels: Int64[np.ndarray, " images"] | None


@dataclass(frozen=True)
class Packed:
    """A packed data set; `facts` is all that `facts.json` says."""

    folder: Path
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    fingerprint: str
    parts: Mapping[str, Part]
    facts: Mapping[str, Any]

    def part(self, name: str) -> Part:
        """One part by name.

        Raises:
            DataError: if the data set has no such part.
        """
        if name not in self.parts:
            raise DataError(f"{self.folder} has no {name} part; it has {', '.join(self.parts)}")
        return self.parts[name]


def pack(
    source: AnySource,
    folder: str | Path,
    *,
    image_size: int,
    channels: int,
    fit: Literal["crop", "pad"] = "crop",
    fill: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Packed:
    """Write a source's images, made square by `to_square`, into `folder`, or find them there.

    What was packed from the same files with the same settings is used again. The folder appears, or
    is replaced, when all is written. `workers` are threads, one per core if None. The fingerprint
    is the SHA-256 of pixels, labels and class names, and of nothing else.

    Raises:
        DataError: if an image is broken, if a part is empty, or if `folder` holds something else.
    """
    folder = Path(folder).absolute()
    settings = {
        "format": FORMAT,
        "identity": source.identity,
        "image_size": image_size,
        "channels": channels,
        "fit": fit,
        "fill": fill,
    }
    if found := _packed_before(folder, settings):
        return found
    square = partial(to_square, image_size=image_size, channels=channels, fit=fit, fill=fill)
    with _alone_at(folder):
        if found := _packed_before(folder, settings):  # by another process, meanwhile
            return found
        with _replacing(folder) as building:
            shape = (channels, image_size, image_size)
            parts = _write_parts(source, building, square, shape, workers, progress)
            facts = {
                **settings,
                "class_names": source.class_names,
                "parts": parts,
                "fingerprint": _fingerprint(source.class_names, parts),
                "versions": {name: version(name) for name in ("rediffuse", "pillow", "numpy")},
            }
            (building / FACTS).write_text(json.dumps(facts, indent=1))
        return open_packed(folder)


def open_packed(folder: str | Path) -> Packed:
    """Open what `pack` wrote, without reading its pixels.

    Raises:
        DataError: if there is nothing packed, or the arrays are not what `facts.json` says.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise DataError(f"{folder} holds no packed images; make them with `rediffuse data pack`")
    try:
        return _opened(folder, read_object(folder / FACTS, _FACTS_BYTES, links=True))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as broken:
        raise DataError(f"{folder} is damaged ({broken}); delete it and pack again") from None


def _opened(folder: Path, facts: dict[str, Any]) -> Packed:
    class_names, size, channels = facts["class_names"], facts["image_size"], facts["channels"]
    parts = {}
    for part in (name for name in PARTS if name in facts["parts"]):
        images, labels = (_mapped(folder / part / name) for name in ("images.npy", "labels.npy"))
        count = facts["parts"][part]["images"]
        _check(images, np.uint8, (count, channels, size, size), f"{part}/images.npy")
        _check(labels, np.int64, (count,), f"{part}/labels.npy")
        parts[part] = Part(images, labels if class_names else None)
    return Packed(folder, tuple(class_names), size, channels, facts["fingerprint"], parts, facts)


def _mapped(file: Path) -> np.ndarray:
    if not file.is_file():  # never wait for a pipe
        raise ValueError(f"{file.name} is missing, or is not a regular file")
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _check(array: np.ndarray, dtype: type, shape: tuple[int, ...], name: str) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype.__name__} {shape}")


def _packed_before(folder: Path, settings: Mapping[str, Any]) -> Packed | None:
    try:
        found = open_packed(folder)
    except DataError:
        return None
    return found if settings.items() <= found.facts.items() else None


class _Chunk(NamedTuple):
    pixels: list[UInt8[np.ndarray, "channel size size"]]
    labels: list[int]
    skipped: list[Broken]


def _write_parts(
    source: AnySource,
    folder: Path,
    square: Square,
    shape: tuple[int, int, int],
    workers: int | None,
    progress: bool,
) -> dict[str, Any]:
    """Decode and write every part; return what is to be known of each."""
    workers = workers or os.cpu_count() or 1
    total = sum(len(examples) for examples in source.parts.values())
    facts = {}
    with _bar(total, progress) as done:
        for part, examples in source.parts.items():
            rows = range(len(examples))
            size = max(1, min(_CHUNK, _CHUNK_BYTES // math.prod(shape)))
            chunks = (rows[start : start + size] for start in rows[::size])
            decode = partial(_decoded, square, len(source.class_names))
            worth_it = workers > 1 and len(examples) >= _WORTH_PROCESSES
            if worth_it and isinstance(examples, FileExamples):
                decoded = _in_processes(decode, examples, chunks, workers)
            else:
                decoded = _in_threads(decode, examples, chunks, workers)
            with closing(decoded) as made:
                facts[part] = _write_part(made, folder / part, shape, source.class_names, done)
    return facts


Decode = Callable[[Examples, range], _Chunk]


def _in_threads(
    decode: Decode, examples: Examples, chunks: Iterable[range], workers: int
) -> Generator[_Chunk]:
    with ThreadPoolExecutor(workers) as pool, _strict_pillow():
        yield from ahead(pool, partial(decode, examples), chunks, 2 * workers)


def _in_processes(
    decode: Decode, examples: FileExamples, chunks: Iterable[range], workers: int
) -> Generator[_Chunk]:
    from joblib.externals.loky import ProcessPoolExecutor

    pool = ProcessPoolExecutor(workers)
    parts = ((examples.some(rows), len(rows)) for rows in chunks)
    try:
        yield from ahead(pool, partial(_apart, decode), parts, 2 * workers)
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _apart(decode: Decode, part: tuple[Examples, int]) -> _Chunk:
    examples, count = part
    with _strict_pillow():
        return decode(examples, range(count))


def _decoded(square: Square, classes: int, examples: Examples, rows: range) -> _Chunk:
    chunk = _Chunk([], [], [])
    for row in rows:
        example = examples[row]
        if isinstance(example, Broken):
            chunk.skipped.append(example)
        else:
            chunk.pixels.append(square(example.image))
            chunk.labels.append(_label(example, classes))
    return chunk


def _label(example: Example, classes: int) -> int:
    if classes == 0 and example.label is None:
        return -1
    if example.label is None or not 0 <= example.label < classes:
        raise DataError(
            f"{example.name} has class {example.label}, but there are {classes} classes"
        )
    return example.label


def _write_part(
    chunks: Iterable[_Chunk],
    folder: Path,
    shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    done: Callable[[int], object],
) -> dict[str, Any]:
    labels: list[int] = []
    skipped: list[Broken] = []
    digest = hashlib.sha256(repr(shape).encode())
    folder.mkdir()
    with (folder / "images.npy").open("wb") as out:
        _write_header(out, (0, *shape))
        for chunk in chunks:
            for pixels in chunk.pixels:
                out.write(pixels.data)
                digest.update(pixels.data)
            labels += chunk.labels
            skipped += chunk.skipped
            done(len(chunk.labels) + len(chunk.skipped))
        _write_header(out, (len(labels), *shape))
    if not labels:
        raise DataError(f"the {folder.name} part has no image that can be used")
    classes = np.array(labels, np.int64)
    digest.update(classes.astype("<i8").tobytes())
    np.save(folder / "labels.npy", classes)
    counts = np.bincount(classes[classes >= 0], minlength=len(class_names)).tolist()
    return {
        "images": len(labels),
        "per_class": dict(zip(class_names, counts, strict=True)),
        "skipped": [broken._asdict() for broken in skipped],
        "sha256": digest.hexdigest(),
    }


def _write_header(out: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write a header, or write it anew: NumPy leaves room in it for the first axis to grow."""
    out.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)


def _fingerprint(class_names: tuple[str, ...], parts: Mapping[str, Any]) -> str:
    content = [class_names, sorted((name, part["sha256"]) for name, part in parts.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@contextmanager
def _alone_at(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`: what several processes want at once is packed once."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold(folder.with_name(f".{folder.name}.lock")):
            yield
    except OSError as failed:
        raise DataError(f"{folder} cannot be written ({failed})") from failed


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Lend a new folder, which takes the place of `folder` if all goes well and vanishes if not."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / FACTS).is_file():
        raise DataError(f"{folder} holds something else than packed images; name another folder")
    building, old = (folder.with_name(f".{folder.name}.{state}") for state in ("building", "old"))
    _remove(building, old)  # left by a pack that was killed: the lock is ours
    building.mkdir()
    try:
        yield building
        if folder.exists():
            folder.rename(old)
        building.rename(folder)
    finally:
        _remove(building, old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """What is told how many more images are packed, and shows it."""
    seen = 0

    def more(count: int) -> None:
        nonlocal seen
        seen += count
        if progress:
            bar.move(seen)

    with Progress(total, "images packed") as bar:
        yield more


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Refuse decompression bombs, and ignore odd metadata; filters hold for all threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
