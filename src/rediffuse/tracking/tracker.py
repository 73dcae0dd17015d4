"""What a tracker is: a place for copies of a run, which may be slow, broken or away."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from rediffuse.words import masked

Number = int | float

Row = dict[str, float]
"""One line of `metrics.jsonl`: `images` seen so far, `time` in Unix seconds, and the metrics."""

Held = Literal["everything", "closed", "nothing"]
"""What a tracker still has of what it was given: all, all up to its last `close`, or nothing."""

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

    def open(self, params: Mapping[str, Any]) -> Held:
        """Begin, or go on with, the run; `params` are its flat configuration.

        What the tracker does not hold any more is sent again.
        """

    def metrics(self, rows: Sequence[Row]) -> None:
        """Take rows; an evaluation of an old checkpoint has fewer images than rows before it."""

    def artifact(self, path: Path, name: str, images_seen: int) -> None:
        """Take a file; `name` is its path inside the run, `samples/preview-00001280.png`."""

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""


def in_one_line(failure: Exception) -> str:
    """Say what went wrong, without secrets and the pages that some libraries add."""
    return masked(next(iter(str(failure).splitlines()), type(failure).__name__))[:300]
