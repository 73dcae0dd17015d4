"""What a tracker was given of a run: `<run>/logs/<tracker>.jsonl`, one line per delivery.

    {"images": 1280, "time": ..., "opened": "everything"}    what it held when a process began
    {"images": 1280, "time": ..., "rows": ["0f3a...", ...]}  rows of `metrics.jsonl`, by digest
    {"images": 1280, "time": ..., "artifacts": 2048}         bytes of `logs/artifacts.jsonl`
    {"images": 1280, "time": ..., "closed": "FINISHED"}      all of the above has arrived

A row is known by its content, so it does not matter where it stands in the file, in which order
rows were written, or whether it was removed and trained again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rediffuse.errors import RunError
from rediffuse.reading import read_object
from rediffuse.tracking.jsonl import append, lines_since, metrics_since
from rediffuse.tracking.tracker import Held, Row


class Deliveries:
    """The record of what one tracker was given; read at construction.

    Raises:
        RunError: if the record is damaged.
    """

    def __init__(self, directory: Path, tracker: str) -> None:
        self._path = directory / "logs" / f"{tracker}.jsonl"
        self.closed: str | None = None
        self.artifacts = 0
        """bytes of their list"""
        self._rows: set[str] = set()
        self._arrived: tuple[set[str], int] = set(), 0
        """what was there when the tracker was last closed"""
        self._old = directory / "logs" / f"{tracker}.json"
        if not self._path.exists() and self._old.exists():
            self._read_old(directory / "metrics.jsonl")
        else:
            for line, end in lines_since(self._path, 0):
                self._follow(line, end)

    def __contains__(self, row: Row) -> bool:
        return digest(row) in self._rows

    def opened(self, held: Held) -> None:
        """Note that a process begins to feed the tracker, and what it still has."""
        if self._old.exists():
            self._write(0, rows=sorted(self._rows), artifacts=self.artifacts)
            if self.closed:
                self._write(0, closed=self.closed)
            self._old.unlink()
        self._write(0, opened=held)

    def rows(self, rows: Sequence[Row]) -> None:
        """Note that it was given these rows."""
        self._write(int(rows[-1]["images"]), rows=[digest(row) for row in rows])

    def artifact(self, images_seen: int, end: int) -> None:
        """Note that it was given the artifacts up to this byte of their list."""
        self._write(images_seen, artifacts=end)

    def close(self, status: str) -> None:
        """Note that it has received everything, and was closed with this status."""
        self._write(0, closed=status)

    def _write(self, images_seen: int, **fields: Any) -> None:
        append(self._path, images_seen, fields)
        self._follow(fields, 0)

    def _follow(self, line: Mapping[str, Any], end: int) -> None:
        """Take over what a line says."""
        rows, artifacts = line.get("rows", []), line.get("artifacts", self.artifacts)
        held, closed = line.get("opened"), line.get("closed", self.closed)
        if not (
            isinstance(rows, list)
            and all(isinstance(row, str) for row in rows)
            and isinstance(artifacts, int)
            and isinstance(closed, str | None)
            and held in (None, "everything", "closed", "nothing")
        ):
            raise _damaged(self._path)
        self._rows.update(rows)
        self.artifacts, self.closed = artifacts, closed
        if "closed" in line:
            self._arrived = set(self._rows), self.artifacts
        if held:
            self.closed = None
        if held == "nothing":
            self._arrived = set(), 0
        if held in ("nothing", "closed"):
            self._rows, self.artifacts = set(self._arrived[0]), self._arrived[1]

    def _read_old(self, metrics: Path) -> None:
        """Read the record of an earlier version, which has the last images seen of each metric.

        A row was sent then if one of its metrics had none at as many images or more before.
        """
        try:
            record = read_object(self._old)
            last: dict[str, int] = {key: int(value) for key, value in record["metrics"].items()}
            self.artifacts, self.closed = int(record["artifacts"]), record["closed"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise _damaged(self._old) from None
        before: dict[str, float] = {}
        for row, _ in metrics_since(metrics, 0):
            images, names = row["images"], row.keys() - {"images", "time"}
            if any(before.get(name, -1) < images <= last.get(name, -1) for name in names):
                self._rows.add(digest(row))
            before |= {name: max(images, before.get(name, -1)) for name in names}
        if self.closed:
            self._arrived = set(self._rows), self.artifacts


def digest(row: Row) -> str:
    """Tell a row from all others; rows with equal values have equal digests."""
    text = json.dumps({key: float(value) for key, value in row.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _damaged(path: Path) -> RunError:
    return RunError(f"{path} is damaged; delete it to have everything sent again")
