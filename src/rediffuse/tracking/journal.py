"""What training talks to: files in the run's directory first, copies for trackers later."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rediffuse.tracking.deliveries import Deliveries
from rediffuse.tracking.feeder import ARTIFACTS, CLOSE_S, Feeder, close_all
from rediffuse.tracking.jsonl import (
    append,
    append_metrics,
    cut_back,
    lines_since,
    metrics_since,
    read_metrics,
    write_atomically,
)
from rediffuse.tracking.resources import PREFIX
from rediffuse.tracking.tracker import Number, Row, Say, Tracker
from rediffuse.words import masked_tree


class Journal:
    """Writes what happens in a run; no method but `close` waits for a tracker.

    `params` is the configuration, as nested mappings. Training that goes back to a checkpoint
    repeats steps, as exactly as the run is exact. A row that comes out the same keeps what clock
    and machine said first, so that it equals the one that trackers may have already.
    """

    def __init__(
        self, directory: Path, trackers: Sequence[Tracker], params: Mapping[str, Any], say: Say
    ) -> None:
        self._directory = directory
        self._undone: dict[int, list[Row]] = {}
        flat = masked_tree(dict(leaves(params)))
        self._feeders = [Feeder(tracker, directory, flat, say) for tracker in trackers]

    def start(self, images_seen: int | None) -> None:
        """Begin at `images_seen`: metrics that an earlier process wrote after it are dropped.

        They are kept in `logs/undone.jsonl`.
        """
        (self._directory / "logs").mkdir(exist_ok=True)
        undone = self._directory / "logs" / "undone.jsonl"
        cut_back(self._directory / "metrics.jsonl", images_seen, undone)
        for row in read_metrics(undone):
            self._undone.setdefault(int(row["images"]), []).append(row)
        cut_back(self._directory / ARTIFACTS, None)
        for feeder in self._feeders:
            feeder.start()

    def metrics(self, values: Mapping[str, Number], images_seen: int) -> None:
        """Write one row of metrics."""
        again = (r for r in self._undone.get(images_seen, ()) if _trained(r) == _trained(values))
        first = next(again, None)
        kept = {k: v for k, v in (first or values).items() if k not in ("images", "time")}
        at = first["time"] if first else None
        append_metrics(self._directory / "metrics.jsonl", kept, images_seen, at)

    def images(
        self, name: str, grid: UInt8[np.ndarray, "height width channel"], images_seen: int
    ) -> Path:
        """Write a picture (1, 3 or 4 channels) to `samples/<name>-<images>.png`."""
        path = self._pictures / f"{name}-{images_seen:010d}.png"
        path.parent.mkdir(exist_ok=True)
        png = io.BytesIO()
        Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(png, "PNG")
        write_atomically(path, png.getvalue())
        self.artifact(path, images_seen)
        return path

    def pictures(self, name: str) -> list[int]:
        """After how many images the pictures of this name were drawn that are there."""
        numbers = (file.stem.rpartition("-")[2] for file in self._pictures.glob(f"{name}-*.png"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    @property
    def _pictures(self) -> Path:
        return self._directory / "samples"

    def artifact(self, path: Path, images_seen: int) -> None:
        """Have a file of the run sent to the trackers; it must stay as it is until the end.

        Raises:
            ValueError: if the file is not inside the run's directory.
        """
        name = path.relative_to(self._directory).as_posix()
        append(self._directory / ARTIFACTS, images_seen, {"file": name})

    def close(self, status: str, timeout_s: float = CLOSE_S) -> bool:
        """End as FINISHED, FAILED or KILLED; whether trackers got everything in `timeout_s`."""
        return close_all(self._feeders, status, timeout_s)


REPLAY_S = 300.0
"""A command waits no longer for trackers that take what they missed; those that fail end sooner."""


def replay(
    directory: Path,
    trackers: Sequence[Tracker],
    params: Mapping[str, Any],
    say: Say,
    status: str,
    timeout_s: float = REPLAY_S,
) -> bool:
    """Send trackers what they miss of a run that ended as `status`; hold the run's lock meanwhile.

    Each is tried once.

    Raises:
        RunError: if the record of what they have is damaged.
    """
    for file in (directory / "metrics.jsonl", directory / ARTIFACTS):
        cut_back(file, None)
    behind = [tracker for tracker in trackers if owes(directory, tracker.name)]
    flat = masked_tree(dict(leaves(params)))
    feeders = [Feeder(tracker, directory, flat, say, once=True) for tracker in behind]
    for feeder in feeders:
        feeder.start()
    return close_all(feeders, status, timeout_s)


def owes(directory: Path, tracker: str) -> bool:
    """Whether a tracker has not received, or not confirmed, all that an ended run has for it.

    Raises:
        RunError: if the record of what it has, or what there is, is damaged.
    """
    known = Deliveries(directory, tracker)
    rows = metrics_since(directory / "metrics.jsonl", 0)
    listed = lines_since(directory / ARTIFACTS, known.artifacts)
    return known.closed is None or any(r not in known for r, _ in rows) or any(True for _ in listed)


def leaves(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk nested mappings: `{"a": {"b": 0}}` has the leaf `a.b`, 0."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_clocked(metric: str) -> bool:
    """Whether the clock, the machine or a row's place decides a metric, and not the training."""
    return metric in ("images", "time", "images_per_s") or metric.startswith(PREFIX)


def _trained(row: Mapping[str, Number]) -> dict[str, str]:
    """What training decided of a row, as text, in which nan equals nan."""
    return {key: repr(float(value)) for key, value in row.items() if not is_clocked(key)}
