"""Read a small file that somebody else may have written, as data and nothing more."""

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn


def read_bytes(file: str | Path, most_bytes: int) -> bytes:
    """Read a regular file; never wait for a pipe, nor read a device without an end.

    Raises:
        OSError: if it cannot be read.
        ValueError: saying what is wrong with it, if it is too large or no regular file.
    """
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        facts = os.fstat(stream.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a regular file")
        # What is asked for is taken from memory first, so no more than there is, but for a file
        # that grows meanwhile.
        data = stream.read(min(facts.st_size, most_bytes) + 1)
        if len(data) > facts.st_size:
            data += stream.read(max(0, most_bytes + 1 - len(data)))
        if len(data) > most_bytes:
            raise ValueError(f"it has more than {most_bytes:,} bytes")
    return data


def read_object(file: Path, most_bytes: int = 10_000_000) -> dict[str, Any]:
    """Read a JSON object, in which every number is finite.

    Raises:
        OSError: if the file cannot be read.
        ValueError: saying what is wrong with it.
    """
    try:
        found = json.loads(read_bytes(file, most_bytes), parse_constant=_refused)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")
