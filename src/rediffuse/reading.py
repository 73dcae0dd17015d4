"""Read files that somebody else may have written, as data and nothing more.

Every file of a run is read here: a regular file and no link, of a bounded size, whose JSON is of a
bounded depth and has numbers and texts that everything else can work with.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

LINE_BYTES = 2**24
"""A line of a file of JSON lines is shorter."""
LINES_BYTES = 2**28
"""All lines of a file together are; a row of metrics takes a few hundred bytes."""
_OBJECT_BYTES = 10_000_000
_DEEPEST = 100
_LARGEST = 2**63


def open_regular(file: str | Path, *, links: bool = False) -> BufferedReader:
    """Open a regular file; never wait for a pipe, nor touch a device.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is no regular file, or a link and `links` are not followed.
    """
    mode = os.stat(file, follow_symlinks=links).st_mode
    if stat.S_ISLNK(mode):
        raise ValueError("it is a link")
    if not stat.S_ISREG(mode):
        raise ValueError("it is not a regular file")
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    stream = os.fdopen(os.open(file, flags), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # replaced meanwhile
        stream.close()
        raise ValueError("it is not a regular file")
    return stream


def read_bytes(file: str | Path, most_bytes: int, *, links: bool = False) -> bytes:
    """Read a regular file of at most `most_bytes`.

    Raises:
        OSError: if it cannot be read.
        ValueError: saying what is wrong with it, if it is too large, a link or no regular file.
    """
    with open_regular(file, links=links) as stream:
        size = os.fstat(stream.fileno()).st_size
        # A buffer as large as what is asked for is made first: no larger than the file, then, but
        # for one that grows meanwhile or does not tell its size.
        data = stream.read(size + 1) if size <= most_bytes else b""
        if len(data) > size:
            data += stream.read(max(0, most_bytes + 1 - len(data)))
        if max(size, len(data)) > most_bytes:
            raise ValueError(f"it has more than {most_bytes:,} bytes")
    return data


def read_lines(
    file: str | Path, position: int = 0, most_bytes: int = LINES_BYTES
) -> Iterator[tuple[bytes, int]]:
    """Yield the lines from a byte position on, each with the position after it.

    A last line that does not end is left out: it is being written, or was torn.

    Raises:
        OSError: if the file cannot be read.
        ValueError: saying what is wrong with it, if it or a line is too large, a link or no regular
            file.
    """
    with open_regular(file) as stream:
        stream.seek(position)
        while line := stream.readline(LINE_BYTES + 1):
            if len(line) > LINE_BYTES:
                raise ValueError(f"a line has more than {LINE_BYTES:,} bytes")
            if not line.endswith(b"\n"):
                return
            position += len(line)
            if position > most_bytes:
                raise ValueError(f"it has more than {most_bytes:,} bytes")
            yield line, position


def read_object(
    file: Path, most_bytes: int = _OBJECT_BYTES, *, links: bool = False
) -> dict[str, Any]:
    """Read a JSON object, as `decoded` takes it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: saying what is wrong with it.
    """
    return decoded_object(read_bytes(file, most_bytes, links=links))


def decoded_object(text: bytes, *, finite: bool = True) -> dict[str, Any]:
    """Decode a JSON object, as `decoded` does.

    Raises:
        ValueError: saying what is wrong with it.
    """
    found = decoded(text, finite=finite)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def decoded(text: bytes, *, finite: bool = True) -> Any:
    """Decode JSON in UTF-8 whose whole numbers are below 2^63, 100 levels deep at most.

    With `finite`, all numbers are finite.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        found = (_JSON if finite else _ANY_JSON).decode(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    _check(found, finite)
    return found


def why(broken: Exception) -> str:
    """The reason of a file that cannot be read, in one line."""
    told = getattr(broken, "strerror", None) or str(broken) or type(broken).__name__
    return str(told).splitlines()[0]


def _check(found: Any, finite: bool) -> None:
    """Refuse what JSON can say and the rest of a program cannot bear."""
    level = [found]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is float:
                if finite and not -math.inf < value < math.inf:
                    raise ValueError("a number in it is not finite")
            elif kind is int:
                if not -_LARGEST < value < _LARGEST:
                    raise ValueError("a number in it has too many digits")
            elif kind is str:
                _check_text(value)
            elif kind is dict:
                _check_text("".join(value))
                inner += value.values()
            elif kind is list:
                inner += value
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def _check_text(text: str) -> None:
    """Refuse lone surrogates, which cannot be written as UTF-8."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("a text in it is not Unicode")


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


_JSON, _ANY_JSON = json.JSONDecoder(parse_constant=_refused), json.JSONDecoder()
