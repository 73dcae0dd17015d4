"""Decode once: a source becomes one memory-mapped uint8 array per part.

<folder>/facts.json           settings, class names, counts, what is left out, fingerprint, digests
<folder>/<part>/images.npy    [images, channels, size, size] uint8
<folder>/<part>/labels.npy    [images] int64, -1 where there are no classes

Every block of a few MB has a digest. Some blocks are verified whenever a folder is opened, and all
of them by `verify`. Folders of format 1 have one digest per part, which `verify` compares.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple
from uuid import uuid4

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from rediffuse import locks
from rediffuse.data.ahead import ahead
from rediffuse.data.decoding import to_square
from rediffuse.data.sources import (
    AnySource,
    Broken,
    Example,
    Examples,
    FileExamples,
    counted,
    shown,
)
from rediffuse.errors import DataError
from rediffuse.progress import Progress
from rediffuse.reading import read_object
from rediffuse.words import tell

FORMAT = 2
"""Raised when the files change, or the pixels that come of the same images."""

PARTS = ("train", "validation", "test")
FACTS = "facts.json"
_ARRAYS = ("images.npy", "labels.npy")
_MARK = ".rediffuse-packing"  # in a folder that is being written: ours, and not whole
_FACTS_BYTES = 500_000_000  # every image that was left out is named

_CHUNK, _CHUNK_BYTES = 256, 2**24  # the most that a thread or process decodes at a time
_WORTH_PROCESSES = 4096  # files: to start processes takes about a second

_BLOCK_BYTES = 2**22  # what one digest is of
_SAMPLED_BLOCKS = 16  # of each part, whenever it is opened

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
    whole: bool = False,
    again: bool = False,
) -> Packed:
    """Write a source's images, made square by `to_square`, into `folder`, or find them there.

    What was packed from the same files with the same settings is used again, unless it is damaged:
    some of its blocks are verified, or all of them with `whole`. With `again` all is packed anew.
    The folder appears, or is replaced, when all is written and synced. `workers` are threads, one
    per core if None. The fingerprint is the SHA-256 of pixels, labels and class names, and of
    nothing else.

    Raises:
        DataError: if an image is broken, if a part is empty, if no image of a class can be used,
            or if `folder` holds something else.
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
    if not again and (found := _packed_before(folder, settings, whole)):
        return found
    square = partial(to_square, image_size=image_size, channels=channels, fit=fit, fill=fill)
    with _alone_at(folder):
        if not again and (
            found := _packed_before(folder, settings, whole, warn=True)
        ):  # by another process
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
            with (building / FACTS).open("wb") as out:
                out.write(json.dumps(facts, indent=1).encode())
                _sync(out)
        _tell_left_out(source, folder)
        return open_packed(folder)


def open_packed(folder: str | Path) -> Packed:
    """Open what `pack` wrote, and verify some of its blocks.

    Raises:
        DataError: if there is nothing packed, or the arrays are not what `facts.json` says.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise DataError(f"{folder} holds no packed images; make them with `rediffuse data pack`")
    try:
        found = _opened(folder, read_object(folder / FACTS, _FACTS_BYTES, links=True))
        for name in found.parts:
            _verify(found, name, _SAMPLED_BLOCKS)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as broken:
        raise DataError(f"{folder} is damaged ({broken}); delete it and pack again") from None
    return found


def verify(packed: Packed) -> None:
    """Read all pixels and labels, and compare them with the digests of when they were packed.

    Raises:
        DataError: naming the part, and of formats with digests of blocks the images, that differ.
    """
    try:
        for name in packed.parts:
            _verify(packed, name)
        if packed.fingerprint != _fingerprint(packed.class_names, packed.facts["parts"]):
            raise ValueError("the fingerprint is not that of the parts and class names")
    except (OSError, ValueError) as broken:
        raise DataError(
            f"{packed.folder} is damaged ({broken}); delete it and pack again"
        ) from None


def differing(source: AnySource, packed: Packed) -> list[str]:
    """Decode every image of a source again, and name those that were packed with other pixels.

    That finds files that were replaced by others of equal names, sizes and times.
    """
    names: list[str] = []
    facts = packed.facts
    square = partial(
        to_square,
        image_size=packed.image_size,
        channels=packed.channels,
        fit=facts["fit"],
        fill=facts["fill"],
    )
    shape = (packed.channels, packed.image_size, packed.image_size)
    with _decoding(source, square, shape, None, progress=True) as chunks_of:
        for part in source.parts:
            names += _differing(chunks_of(part), packed.parts.get(part))
    return names


def _differing(chunks: Iterable["_Chunk"], part: Part | None) -> Iterator[str]:
    row, count = 0, 0 if part is None else len(part.images)
    for chunk in chunks:
        for name, pixels, label in zip(chunk.names, chunk.pixels, chunk.labels, strict=True):
            if part is None or row >= count or not _is_row(part, row, pixels, label):
                yield name
            row += 1
    if row < count:
        yield f"{count - row:,} images that are not there any more"


def _is_row(part: Part, row: int, pixels: np.ndarray, label: int) -> bool:
    same_class = part.labels is None or part.labels[row] == label
    return bool(same_class) and np.array_equal(part.images[row], pixels)


def _verify(packed: Packed, part: str, most: int | None = None) -> None:
    """Compare all labels and all blocks of a part, or `most` of these, with their digests.

    A part of format 1 has one digest, which is compared unless `most` is given.

    Raises:
        ValueError: naming what differs.
    """
    if packed.facts["format"] == 1:
        if most is None:
            _verify_format_1(packed, part)
        return
    facts, images = packed.facts["parts"][part], packed.parts[part].images
    rows, digests = _rows_of_block(images.shape[1:]), facts["blocks"]
    labels = _mapped(packed.folder / part / "labels.npy")
    if _digest(labels) != facts["labels_sha256"]:
        raise ValueError(f"the digest of {part}/labels.npy differs")
    if len(digests) != -(-len(images) // rows):
        raise ValueError(f"{part} has {len(digests)} digests for {len(images):,} images")
    blocks = range(len(digests))
    for block in blocks if most is None or len(blocks) <= most else _some(blocks, most):
        first, last = block * rows, min((block + 1) * rows, len(images))
        if _digest(images[first:last]) != digests[block]:
            raise ValueError(f"the digest of {part} images {first:,} to {last - 1:,} differs")


def _verify_format_1(packed: Packed, part: str) -> None:
    images, rows = packed.parts[part].images, _rows_of_block(packed.parts[part].images.shape[1:])
    digest = hashlib.sha256(repr(images.shape[1:]).encode())
    for first in range(0, len(images), rows):
        digest.update(np.ascontiguousarray(images[first : first + rows]).data)
    digest.update(_mapped(packed.folder / part / "labels.npy").astype("<i8").tobytes())
    if digest.hexdigest() != packed.facts["parts"][part]["sha256"]:
        raise ValueError(f"the digest of {part} differs")


def _some(blocks: range, count: int) -> list[int]:
    """The first and the last block, and others by chance: another opening looks at others."""
    inner = np.random.default_rng().choice(len(blocks) - 2, count - 2, replace=False) + 1
    return [blocks[0], *sorted(inner.tolist()), blocks[-1]]


def _rows_of_block(shape: tuple[int, ...]) -> int:
    return max(1, _BLOCK_BYTES // math.prod(shape))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:32]


def _opened(folder: Path, facts: dict[str, Any]) -> Packed:
    class_names, size, channels = facts["class_names"], facts["image_size"], facts["channels"]
    parts = {}
    for part in (name for name in PARTS if name in facts["parts"]):
        images, labels = (_mapped(folder / part / name) for name in _ARRAYS)
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


def _packed_before(
    folder: Path, settings: Mapping[str, Any], whole: bool, warn: bool = False
) -> Packed | None:
    """What was packed with these settings, if it is there and undamaged; `warn` of damage."""
    if not (folder / FACTS).is_file():
        return None
    try:
        if not settings.items() <= read_object(folder / FACTS, _FACTS_BYTES, links=True).items():
            return None
        found = open_packed(folder)
        if whole:
            verify(found)
    except (DataError, OSError, ValueError) as damaged:
        if warn:
            why = str(damaged).removesuffix("; delete it and pack again")
            tell(f"packed images: {why}; packing again", sys.stderr)
        return None
    return found


def _tell_left_out(source: AnySource, folder: Path) -> None:
    """Say what lies among the images and was not packed; hidden files are not worth a line."""
    for part, counts in source.left_out.items():
        if shown := counted({what: n for what, n in counts.items() if what != "hidden"}):
            tell(f"{folder.name}: left out of the {part} images: {shown}", sys.stderr)


class _Chunk(NamedTuple):
    names: list[str]
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
    facts = {}
    with _decoding(source, square, shape, workers, progress) as chunks_of:
        for part, examples in source.parts.items():
            facts[part] = _write_part(chunks_of(part), folder / part, shape, source.class_names)
            if part == "train" and isinstance(examples, FileExamples):
                _refuse_empty_classes(facts[part])
    return facts


def _refuse_empty_classes(facts: Mapping[str, Any]) -> None:
    """Refuse classes all of whose images are broken: nothing could be learned of them."""
    if empty := [name for name, count in facts["per_class"].items() if not count]:
        raise DataError(
            f"no image of the class {empty[0]!r} can be used; repair them, or remove the folder"
        )


@contextmanager
def _decoding(
    source: AnySource,
    square: Square,
    shape: tuple[int, int, int],
    workers: int | None,
    progress: bool,
) -> Iterator[Callable[[str], Generator["_Chunk"]]]:
    """Lend a function from the name of a part to its chunks, decoded ahead and in order."""
    workers = workers or os.cpu_count() or 1
    total = sum(len(examples) for examples in source.parts.values())
    decode = partial(_decoded, square, len(source.class_names))
    size = max(1, min(_CHUNK, _CHUNK_BYTES // math.prod(shape)))

    with _bar(total, progress) as done:

        def chunks_of(part: str) -> Generator[_Chunk]:
            examples = source.parts[part]
            rows = range(len(examples))
            chunks = (rows[start : start + size] for start in rows[::size])
            if (
                workers > 1
                and len(examples) >= _WORTH_PROCESSES
                and isinstance(examples, FileExamples)
            ):
                decoded = _in_processes(decode, examples, chunks, workers)
            else:
                decoded = _in_threads(decode, examples, chunks, workers)
            with closing(decoded):
                for chunk in decoded:
                    yield chunk
                    done(len(chunk.labels) + len(chunk.skipped))

        yield chunks_of


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
    chunk = _Chunk([], [], [], [])
    for row in rows:
        example = examples[row]
        if isinstance(example, Broken):
            chunk.skipped.append(example)
        else:
            chunk.names.append(example.name)
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
    chunks: Generator[_Chunk],
    folder: Path,
    shape: tuple[int, int, int],
    class_names: tuple[str, ...],
) -> dict[str, Any]:
    labels: list[int] = []
    skipped: list[Broken] = []
    digest, blocks = hashlib.sha256(repr(shape).encode()), _Blocks(_rows_of_block(shape))
    folder.mkdir()
    with (folder / "images.npy").open("wb") as out, closing(chunks):
        _write_header(out, (0, *shape))
        for chunk in chunks:
            for pixels in chunk.pixels:
                out.write(pixels.data)
                digest.update(pixels.data)
                blocks.add(pixels)
            labels += chunk.labels
            skipped += chunk.skipped
        _write_header(out, (len(labels), *shape))
        _sync(out)
    if not labels:
        raise DataError(f"the {folder.name} part has no image that can be used")
    classes = np.array(labels, np.int64)
    digest.update(classes.astype("<i8").tobytes())
    with (folder / "labels.npy").open("wb") as out:
        np.save(out, classes)
        _sync(out)
    _sync_folder(folder)
    counts = np.bincount(classes[classes >= 0], minlength=len(class_names)).tolist()
    return {
        "images": len(labels),
        "per_class": dict(zip(class_names, counts, strict=True)),
        "skipped": [{"name": shown(b.name), "reason": shown(b.reason)} for b in skipped],
        "sha256": digest.hexdigest(),
        "labels_sha256": _digest(classes),
        "blocks": blocks.digests(),
    }


class _Blocks:
    """Digests of so many images at a time, as they come."""

    def __init__(self, rows: int) -> None:
        self._rows, self._held = rows, 0
        self._digests: list[str] = []
        self._digest = hashlib.sha256()

    def add(self, pixels: np.ndarray) -> None:
        if self._held == self._rows:
            self._end()
        self._digest.update(pixels.data)
        self._held += 1

    def digests(self) -> list[str]:
        if self._held:
            self._end()
        return self._digests

    def _end(self) -> None:
        self._digests.append(self._digest.hexdigest()[:32])
        self._digest, self._held = hashlib.sha256(), 0


def _sync(out: BinaryIO) -> None:
    """Have a file on the disk: a power cut would leave zeros, of the right length."""
    out.flush()
    os.fsync(out.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    """Lend a new folder, which takes the place of `folder` if all goes well and vanishes if not.

    What was in `folder` is removed after the new folder has its name, and put back if it cannot
    get it.
    """
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if os.path.lexists(folder) and not is_empty and not _holds_packed_images_alone(folder):
        raise DataError(f"{folder} holds something else than packed images; name another folder")
    _remove_abandoned(folder)
    unique = uuid4().hex
    building, old = (folder.with_name(f".{folder.name}.{s}-{unique}") for s in ("building", "old"))
    building.mkdir()
    try:
        (building / _MARK).touch()
        yield building
        _sync_folder(building)
        if folder.exists():
            if not is_empty:
                (folder / _MARK).touch()
            folder.rename(old)
        try:
            building.rename(folder)
        except BaseException:
            if old.exists():
                (old / _MARK).unlink(missing_ok=True)  # first: what has the mark may be removed
                old.rename(folder)
            raise
        (folder / _MARK).unlink()
        _sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _holds_packed_images_alone(folder: Path) -> bool:
    """Whether nothing would be lost with a folder but what `pack` wrote."""
    if folder.is_symlink() or not (folder / FACTS).is_file():
        return False
    names = {entry.name for entry in folder.iterdir()}
    if not names - {_MARK} <= {FACTS, *PARTS}:
        return False
    inside = {entry.name for part in names & {*PARTS} for entry in _entries(folder / part)}
    return bool(inside) and inside <= {*_ARRAYS}


def _entries(place: Path) -> list[Path]:
    return [*place.iterdir()] if place.is_dir() and not place.is_symlink() else [place]


def _remove_abandoned(folder: Path) -> None:
    """Remove what a pack that was killed left beside `folder`; its lock is ours.

    Only folders that carry our mark are removed, whatever their names.
    """
    starts = tuple(f".{folder.name}.{state}-" for state in ("building", "old"))
    for left in [*folder.parent.iterdir()]:
        if left.name.startswith(starts) and not left.is_symlink() and (left / _MARK).is_file():
            shutil.rmtree(left, ignore_errors=True)


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
