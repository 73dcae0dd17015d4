"""One JSON object per line: `metrics.jsonl`, the source of truth of a run.

A line is `{"images": 1280, "time": 1790000000.0, "loss": 0.1}`. JSON has no word for what is not
finite: such values are the strings "nan", "inf" and "-inf", and are read back as floats.
"""

import errno
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any
from uuid import uuid4

from rediffuse.errors import RunError
from rediffuse.reading import (
    LINE_BYTES,
    LINES_BYTES,
    decoded_object,
    read_bytes,
    read_lines,
    why,
)
from rediffuse.tracking.tracker import Number, Row
from rediffuse.words import masked_tree

EVALUATION = "evaluation/"
"""How the names of all metrics of an evaluation begin."""


def append_metrics(
    path: Path, values: Mapping[str, Number], images_seen: int, at: float | None = None
) -> None:
    """Append one row, measured now or `at` a time, which a kill can no longer lose.

    Raises:
        ValueError: if a metric is called `images` or `time`, which every row has already.
    """
    if taken := {"images", "time"} & values.keys():
        raise ValueError(f"a metric cannot be called '{taken.pop()}', which every row has already")
    numbers = {key: float(value) for key, value in values.items()}
    fields = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
    append(path, images_seen, fields, at)


def read_metrics(path: Path) -> list[Row]:
    """Read all complete rows; a run that has not written any yet has none.

    Raises:
        RunError: if a line is not what `append_metrics` writes.
    """
    return [row for row, _ in metrics_since(path, 0)]


def metrics_since(path: Path, position: int) -> Iterator[tuple[Row, int]]:
    """Yield the rows from a byte position on, each with the position after it."""
    for line, end in lines_since(path, position):
        try:
            yield {key: _number(value) for key, value in line.items()}, end
        except ValueError:
            raise RunError(f"{path}: the line before byte {end} is not a row of metrics") from None


def cut_back(path: Path, images_seen: int | None, undone: Path | None = None) -> None:
    """Mend a torn last line, and remove the lines that were written after `images_seen` images.

    Rows of evaluations stay: they were measured on a checkpoint and are not trained again. Removed
    lines are appended to the file `undone`.

    Raises:
        RunError: if a line is damaged, or the file is not a regular file.
    """
    if not path.exists():
        return
    with _opened(path) as file:
        _mended(path, file)
    if images_seen is None:
        return
    try:
        content, start = read_bytes(path, LINES_BYTES), 0
    except (OSError, ValueError) as broken:
        raise RunError(f"{path} cannot be read: {why(broken)}; restore it") from None
    left, removed = bytearray(), bytearray()
    for line, end in lines_since(path, 0):
        if line["images"] > images_seen and not is_evaluation(line):
            removed += content[start:end]
        else:
            left += content[start:end]
        start = end
    if not removed:
        return
    if undone:
        _append_bytes(undone, removed)
    if content.startswith(left):
        os.truncate(path, len(left))  # needs no room on a full disk
    else:
        write_atomically(path, bytes(left))


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a row was measured by an evaluation and not while training."""
    metrics = line.keys() - {"images", "time"}
    return bool(metrics) and all(key.startswith(EVALUATION) for key in metrics)


def append(
    path: Path, images_seen: int, fields: Mapping[str, Any], at: float | None = None
) -> None:
    """Append one line with the images seen and the time; hold the run's lock.

    A last line that was torn by a kill or a full disk is mended before. The new line is written
    whole or not at all, with secrets masked.

    Raises:
        OSError: if it cannot be written.
        RunError: if the file is not a regular file.
    """
    line = {"images": images_seen, "time": round(time.time(), 3) if at is None else at, **fields}
    _append_bytes(path, json.dumps(masked_tree(line), allow_nan=False).encode() + b"\n")


def lines_since(path: Path, position: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the complete lines from a byte position on, each with the position after it.

    Raises:
        RunError: if the file cannot be read, or a line is damaged.
    """
    try:
        for line, end in read_lines(path, position):
            yield _decoded(path, line, end), end
    except FileNotFoundError:
        return
    except (OSError, ValueError) as broken:
        raise RunError(f"{path} cannot be read: {why(broken)}; restore it") from None


def write_atomically(path: Path, content: bytes, *, sync: bool = True, mode: int = 0o666) -> None:
    """Replace a file by another of the same name, so that a reader sees either and never a part.

    Without `sync`, a power cut may leave it empty; a kill never does. `mode` are the permissions,
    of which the process' umask takes away its own.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")  # mkstemp would not respect the umask
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _append_bytes(path: Path, lines: bytes | bytearray) -> None:
    """Append complete lines after a complete line, or nothing."""
    with _opened(path) as file:
        end = _mended(path, file)
        try:
            if file.write(lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as failed:
            file.truncate(end)
            raise OSError(failed.errno, failed.strerror, str(path)) from None


def _opened(path: Path) -> FileIO:
    """Open a regular file to read it and to append, without waiting and through no link."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = FileIO(os.open(str(path), flags, 0o666), "r+")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise RunError(f"{path} is not a regular file; remove it")
    return file


def _mended(path: Path, file: FileIO) -> int:
    """Complete or remove a last line that has no end; return where the next line begins.

    A line that lacks nothing but its end was saved so by an editor; any other was cut short.
    """
    end = file.seek(0, os.SEEK_END)
    if not end or os.pread(file.fileno(), 1, end - 1) == b"\n":
        return end
    tail = os.pread(file.fileno(), LINE_BYTES, max(0, end - LINE_BYTES))
    torn = tail[tail.rfind(b"\n") + 1 :]
    if len(torn) == LINE_BYTES:
        raise RunError(f"{path}: the last line has more than {LINE_BYTES:,} bytes; remove it")
    try:
        _decoded(path, torn, end)
    except RunError:
        file.truncate(end - len(torn))
        return end - len(torn)
    return end + file.write(b"\n")


def _decoded(path: Path, line: bytes, end: int) -> dict[str, Any]:
    try:
        fields = decoded_object(line)
    except ValueError:
        fields = {}
    images, at = fields.get("images"), fields.get("time")
    if type(images) is not int or images < 0 or type(at) is not float:
        raise RunError(
            f"{path}: the line before byte {end} is damaged; restore or delete that line"
        )
    return fields


def _number(value: Any) -> float:
    if type(value) in (int, float) or value in _NOT_FINITE:
        return float(value)
    raise ValueError


_NOT_FINITE = ("nan", "inf", "-inf")
