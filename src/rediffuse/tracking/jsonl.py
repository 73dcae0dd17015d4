"""One JSON object per line: `metrics.jsonl`, the source of truth of a run.

A line is `{"images": 1280, "time": 1790000000.0, "loss": 0.1}`. JSON has no word for what is not
finite: such values are the strings "nan", "inf" and "-inf", and are read back as floats.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from rediffuse.errors import RunError
from rediffuse.tracking.tracker import Number, Row


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
            yield {key: float(value) for key, value in line.items()}, end
        except (TypeError, ValueError):
            raise RunError(f"{path}: the line before byte {end} is not a row of metrics") from None


def cut_back(path: Path, images_seen: int | None, undone: Path | None = None) -> None:
    """Drop a last line that was torn by a kill, and what comes after `images_seen` images.

    Whole lines that are dropped are appended to the file `undone`.
    """
    if not path.exists():
        return
    kept = 0
    for line, end in lines_since(path, 0):
        if images_seen is not None and line["images"] > images_seen:
            break
        kept = end
    if undone:
        cut_back(undone, None)
        with open(path, "rb") as source, open(undone, "ab") as sink:
            source.seek(kept)
            sink.writelines(line for line in source if line.endswith(b"\n"))
    os.truncate(path, kept)


def append(
    path: Path, images_seen: int, fields: Mapping[str, Any], at: float | None = None
) -> None:
    """Append one line with the images seen and the time, in one write."""
    line = {"images": images_seen, "time": round(time.time(), 3) if at is None else at, **fields}
    with open(path, "ab") as file:
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def lines_since(path: Path, position: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the complete lines from a byte position on, each with the position after it."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            yield _decoded(path, line, position), position


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by another of the same name, so that a reader sees either and never a part."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")  # mkstemp would not respect the umask
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _decoded(path: Path, line: bytes, end: int) -> dict[str, Any]:
    try:
        decoded = json.loads(line)
    except ValueError:
        decoded = None
    fields = decoded if isinstance(decoded, dict) else {}
    if not isinstance(fields.get("images"), int) or not isinstance(fields.get("time"), float):
        raise RunError(
            f"{path}: the line before byte {end} is damaged; restore or delete that line"
        )
    return fields
