"""Sources: functions that find images and labels, one file each, and decode them one at a time."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from rediffuse.errors import DataError
from rediffuse.reading import open_regular


class Example(NamedTuple):
    """One decoded image, the number of its class (None: without), and a name for messages."""

    image: Image.Image
    label: int | None
    name: str


class Broken(NamedTuple):
    """An image that is left out, and why."""

    name: str
    reason: str


@runtime_checkable
class Examples(Protocol):
    """The images of one part. Items are asked for from many threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Example | Broken: ...


@runtime_checkable
class FileExamples(Examples, Protocol):
    """Examples that are names of files, small enough to be sent to other processes.

    Decoding holds Python's lock for half of its time, so that threads wait for one another.
    """

    def some(self, rows: range) -> Examples:
        """These rows alone, numbered from 0."""


@dataclass(frozen=True)
class Source:
    """Images by part: "train" and, where there are any, "validation" and "test".

    `identity` is a digest of where the images come from, cheap to make, that changes when they do.
    `left_out` counts, by part, what lies among the images and is none: by suffix, folders by name.
    """

    class_names: tuple[str, ...]
    parts: Mapping[str, Examples]
    identity: str
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


Contents = tuple[tuple[str, ...], Mapping[str, Examples]]
"""The names of classes, and images by part."""


class LateSource:
    """A source that is read when its classes or images are asked for: not where they are packed."""

    left_out: Mapping[str, Mapping[str, int]] = {}

    def __init__(self, identity: str, read: Callable[[], Contents]) -> None:
        self.identity, self._read = identity, read

    @cached_property
    def _found(self) -> Contents:
        try:
            return self._read()
        except OSError as failed:
            raise DataError(f"images cannot be read: {failed}") from failed

    @property
    def class_names(self) -> tuple[str, ...]:
        """Read now, if nobody asked before; so are the parts."""
        return self._found[0]

    @property
    def parts(self) -> Mapping[str, Examples]:
        """Raise what reading raises, as a DataError where files cannot be opened."""
        return self._found[1]


AnySource = Source | LateSource


@dataclass(frozen=True)
class ArrayExamples:
    """Images that lie in an array: `[n, height, width]` or `[n, height, width, 3]`, uint8."""

    images: np.ndarray
    labels: np.ndarray
    part: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Example:
        return Example(
            Image.fromarray(self.images[row]), int(self.labels[row]), f"{self.part}/{row}"
        )


def shown(name: str) -> str:
    """A name of a file as text; bytes that are not UTF-8 become escapes as `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def counted(left_out: Mapping[str, int], most: int = 8) -> str:
    """What was left out, in words: `12 .txt, 2 hidden, folder @eaDir`; the most frequent first."""
    words = [
        what if what.startswith("folder ") and count == 1 else f"{count:,} {what}"
        for what, count in sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    rest = [f"{len(words) - most} more kinds"] if len(words) > most else []
    return ", ".join([*words[:most], *rest])


_SAMPLED_FILES = 64
_SAMPLED_PIECES, _PIECE_BYTES = 16, 65_536


def identity_of(files: Iterable[tuple[str, str | os.PathLike[str]]], *settings: str) -> str:
    """Digest names, sizes and times of change of (name, path) pairs, and what else matters.

    Of some files the contents are digested, too: names, sizes and times stay as they are where
    images are made anew without compression and their times are set back.
    """
    digest = hashlib.sha256(repr(settings).encode())
    paths = []
    for name, path in files:
        try:
            facts = os.stat(path)
            seen = f"{facts.st_size} {facts.st_mtime_ns}"
        except OSError as error:  # a link that leads nowhere is found out when it is read
            seen = f"error {error.errno}"
        digest.update(os.fsencode(f"{name}\0{seen}\n"))
        paths.append(path)
    for path in paths[:: max(1, -(-len(paths) // _SAMPLED_FILES))]:
        digest.update(_sampled_content(path))
    return digest.hexdigest()


def _sampled_content(path: str | os.PathLike[str]) -> bytes:
    """A digest of a small file, or of pieces from all over a large one; empty if it is none."""
    digest = hashlib.sha256()
    try:
        with open_regular(os.fspath(path), links=True) as stream:
            most = max(0, os.fstat(stream.fileno()).st_size - _PIECE_BYTES)
            for start in sorted(
                {most * k // (_SAMPLED_PIECES - 1) for k in range(_SAMPLED_PIECES)}
            ):
                stream.seek(start)
                digest.update(stream.read(_PIECE_BYTES))
    except (OSError, ValueError):  # it is named when it is decoded
        return b""
    return digest.digest()
