"""What a tracker is: a place for copies of a run, which may be slow, broken or away."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Number = int | float

Row = dict[str, float]
"""One line of `metrics.jsonl`: `images` seen so far, `time` in Unix seconds, and the metrics."""

Say = Callable[[str], None]
"""Takes one line for the user."""


@runtime_checkable
class Tracker(Protocol):
    """Receives copies of a run, from one background thread.

    Any method may raise; it is called again later with the same arguments, so each must bear
    repetition. Nothing is reached or written before `open`.
    """

    @property
    def name(self) -> str:
        """One word: how messages and `<run>/logs/<name>.json` call it."""

    def open(self, params: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run; `params` are its flat configuration."""

    def metrics(self, rows: Sequence[Row]) -> None:
        """Take rows in the order of their images."""

    def artifact(self, path: Path, name: str, images_seen: int) -> None:
        """Take a file; `name` is its path inside the run, `samples/preview-00001280.png`."""

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""


def in_one_line(failure: Exception) -> str:
    """Say what went wrong, without the pages that some libraries add."""
    return next(iter(str(failure).splitlines()), type(failure).__name__)[:300]
