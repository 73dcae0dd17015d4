"""What training talks to: files in the run's directory first, copies for trackers later."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rediffuse.tracking.feeder import ARTIFACTS, CLOSE_S, Feeder, close_all
from rediffuse.tracking.jsonl import append, append_metrics, cut_back, write_atomically
from rediffuse.tracking.tracker import Number, Say, Tracker


class Journal:
    """Writes what happens in a run; no method but `close` waits for a tracker.

    `params` is the configuration, as nested mappings.
    """

    def __init__(
        self, directory: Path, trackers: Sequence[Tracker], params: Mapping[str, Any], say: Say
    ) -> None:
        self._directory = directory
        flat = dict(leaves(params))
        self._feeders = [Feeder(tracker, directory, flat, say) for tracker in trackers]

    def start(self, images_seen: int | None) -> None:
        """Begin at `images_seen`: metrics that an earlier process wrote after it are dropped."""
        (self._directory / "logs").mkdir(exist_ok=True)
        cut_back(self._directory / "metrics.jsonl", images_seen)
        cut_back(self._directory / ARTIFACTS, None)
        for feeder in self._feeders:
            feeder.start()

    def metrics(self, values: Mapping[str, Number], images_seen: int) -> None:
        """Write one row of metrics."""
        append_metrics(self._directory / "metrics.jsonl", values, images_seen)

    def images(
        self, name: str, grid: UInt8[np.ndarray, "height width channel"], images_seen: int
    ) -> Path:
        """Write a picture (1, 3 or 4 channels) to `samples/<name>-<images>.png`."""
        path = self._directory / "samples" / f"{name}-{images_seen:010d}.png"
        path.parent.mkdir(exist_ok=True)
        png = io.BytesIO()
        Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(png, "PNG")
        write_atomically(path, png.getvalue())
        self.artifact(path, images_seen)
        return path

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


def replay(
    directory: Path,
    trackers: Sequence[Tracker],
    params: Mapping[str, Any],
    say: Say,
    status: str,
    timeout_s: float = CLOSE_S,
) -> bool:
    """Send what trackers miss of a run that ended as `status`; hold the run's lock meanwhile."""
    late = Journal(directory, trackers, params, say)
    late.start(None)
    return late.close(status, timeout_s)


def leaves(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk nested mappings: `{"a": {"b": 0}}` has the leaf `a.b`, 0."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
