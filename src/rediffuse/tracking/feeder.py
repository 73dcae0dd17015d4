"""Copies for trackers, made in the background from the run's own files.

A tracker that fails is tried again with growing pauses, and never stops or slows training. What it
was given is remembered in `<run>/logs/<tracker>.json`, so that the next process that feeds it sends
what is missing: each metric once per images seen. Training that went back to a checkpoint writes
some rows anew; a tracker that had them already keeps the first. They are equal where the run is
exact and nothing was changed on resuming; else `metrics.jsonl` has the last.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rediffuse.errors import RunError
from rediffuse.tracking.jsonl import lines_since, metrics_since, write_atomically
from rediffuse.tracking.tracker import Row, Say, Tracker, in_one_line

FLUSH_S = 2.0
LONGEST_PAUSE_S = 60.0
CLOSE_S = 10.0  # all that the end of a run waits for trackers; training never does
ROWS_AT_ONCE = 500

ARTIFACTS = "logs/artifacts.jsonl"
"""The files that trackers get: `{"images": 1280, "time": ..., "file": "samples/preview.png"}`."""


@dataclass
class Delivered:
    """What a tracker was given."""

    metrics: dict[str, int] = field(default_factory=dict)  # the last images seen of each
    artifacts: int = 0  # bytes of their list
    closed: str | None = None  # the status it was closed with

    @classmethod
    def read(cls, path: Path) -> "Delivered":
        """Read it back; without a file nothing was delivered."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (TypeError, ValueError):
            raise RunError(f"{path} is damaged; delete it to have everything sent again") from None

    def write(self, path: Path) -> None:
        """Keep it for the next process."""
        write_atomically(path, json.dumps(asdict(self)).encode())


class Feeder:
    """Feeds one tracker from a run's directory, in a daemon thread of its own."""

    def __init__(
        self, tracker: Tracker, directory: Path, params: Mapping[str, Any], say: Say
    ) -> None:
        self._tracker, self._directory, self._params, self._say = tracker, directory, params, say
        self._book = directory / "logs" / f"{tracker.name}.json"
        self._delivered: Delivered | None = None
        self._position = 0
        self._status = ""
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._warned = self._done = False
        self._thread = threading.Thread(target=self._run, name=f"feed {tracker.name}", daemon=True)

    def start(self) -> None:
        """Begin to feed, from wherever the last process came to."""
        self._thread.start()

    def close_soon(self, status: str) -> None:
        """Ask for the rest to be delivered, and the tracker's run to be ended."""
        self._status = status
        self._closing.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is delivered; False, with a word to the user, if that takes too long."""
        self._thread.join(timeout_s)
        self._given_up.set()
        if not self._done:
            self._say(
                f"{self._tracker.name}: not everything was delivered in time; the run's own files "
                f"are complete, and `rediffuse resume {self._directory.name}` sends the rest"
            )
        return self._done

    def _run(self) -> None:
        pause = FLUSH_S
        while not self._closing.wait(pause):
            pause = FLUSH_S if self._succeeds(self._feed) else min(2 * pause, LONGEST_PAUSE_S)
        while not self._succeeds(self._finish):
            if self._given_up.wait(FLUSH_S):
                return

    def _succeeds(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as failure:
            if not self._warned:
                why = in_one_line(failure)
                self._say(f"{self._tracker.name}: {why} (nothing is lost; trying again)")
            self._warned = True
            return False
        return True

    def _feed(self) -> None:
        delivered = self._opened()
        rows = metrics_since(self._directory / "metrics.jsonl", self._position)
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            self._feed_metrics(delivered, [row for row, _ in chunk])
            self._position = chunk[-1][1]
        for line, end in lines_since(self._directory / ARTIFACTS, delivered.artifacts):
            self._feed_artifact(str(line["file"]), int(line["images"]))
            delivered.artifacts = end
            delivered.write(self._book)

    def _finish(self) -> None:
        self._feed()
        delivered = self._opened()
        self._tracker.close(self._status)
        delivered.closed = self._status
        delivered.write(self._book)
        self._done = True

    def _opened(self) -> Delivered:
        if self._delivered is None:
            delivered = Delivered.read(self._book)
            if self._tracker.open(self._params):
                delivered = Delivered()
            delivered.closed = None
            delivered.write(self._book)
            self._delivered = delivered
        return self._delivered

    def _feed_metrics(self, delivered: Delivered, rows: Sequence[Row]) -> None:
        last = dict(delivered.metrics)
        fresh = [new for row in rows if len(new := _advance(last, row)) > 2]
        if fresh:
            self._tracker.metrics(fresh)
            delivered.metrics = last
            delivered.write(self._book)

    def _feed_artifact(self, name: str, images_seen: int) -> None:
        path = (self._directory / name).resolve()
        # The list may have come with somebody else's run: nothing outside of the run is ever sent.
        if path.is_relative_to(self._directory.resolve()) and path.is_file():
            self._tracker.artifact(path, name, images_seen)


def is_behind(directory: Path, tracker: str) -> bool:
    """Whether a tracker of an ended run still misses something."""
    return Delivered.read(directory / "logs" / f"{tracker}.json").closed is None


def close_all(feeders: Sequence[Feeder], status: str, timeout_s: float = CLOSE_S) -> bool:
    """End all trackers' runs, waiting `timeout_s` seconds in total; whether all was delivered."""
    for feeder in feeders:
        feeder.close_soon(status)
    deadline = time.monotonic() + timeout_s
    done = [feeder.wait(max(0.0, deadline - time.monotonic())) for feeder in feeders]
    return all(done)


def _advance(last: dict[str, int], row: Row) -> Row:
    """What of a row comes after the last images of its metrics, which move on."""
    images = int(row["images"])
    fresh = {k: v for k, v in row.items() if k in ("images", "time") or last.get(k, -1) < images}
    last.update((key, images) for key in fresh if key not in ("images", "time"))
    return fresh
