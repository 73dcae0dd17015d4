"""Copies for trackers, made in the background from the run's own files.

A tracker that fails is tried again with growing pauses, and never stops or slows training. What it
was given is recorded, and whatever stands in `metrics.jsonl` or in the list of artifacts and is not
in that record is sent by the next process that feeds the tracker: each row once. Training that went
back to a checkpoint writes some rows anew. Where they come out the same they are not sent again;
else a tracker has both, and `metrics.jsonl` the last.
"""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rediffuse.tracking.deliveries import Deliveries
from rediffuse.tracking.jsonl import lines_since, metrics_since
from rediffuse.tracking.tracker import Say, Tracker, in_one_line

FLUSH_S = 2.0
LONGEST_PAUSE_S = 60.0
CLOSE_S = 10.0  # all that the end of a run waits for trackers; training never does
ROWS_AT_ONCE = 500

ARTIFACTS = "logs/artifacts.jsonl"
"""The files that trackers get: `{"images": 1280, "time": ..., "file": "samples/preview.png"}`."""


class Feeder:
    """Feeds one tracker from a run's directory, in a daemon thread of its own.

    With `once`, a tracker that fails after `close_soon` is not tried again.
    """

    def __init__(
        self,
        tracker: Tracker,
        directory: Path,
        params: Mapping[str, Any],
        say: Say,
        *,
        once: bool = False,
    ) -> None:
        self._tracker, self._directory, self._params, self._say = tracker, directory, params, say
        self._once = once
        self._deliveries: Deliveries | None = None
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
            if self._once or self._given_up.wait(FLUSH_S):
                return

    def _succeeds(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as failure:
            if not self._warned:
                then = "nothing is lost" if self._once else "nothing is lost; trying again"
                self._say(f"{self._tracker.name}: {in_one_line(failure)} ({then})")
            self._warned = True
            return False
        return True

    def _feed(self) -> None:
        known = self._opened()
        rows = metrics_since(self._directory / "metrics.jsonl", self._position)
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            if owed := [row for row, _ in chunk if row not in known]:
                self._tracker.metrics(owed)
                known.rows(owed)
            self._position = chunk[-1][1]
        for line, end in lines_since(self._directory / ARTIFACTS, known.artifacts):
            self._feed_artifact(str(line["file"]), int(line["images"]))
            known.artifact(int(line["images"]), end)

    def _finish(self) -> None:
        self._feed()
        self._tracker.close(self._status)
        self._opened().close(self._status)
        self._done = True

    def _opened(self) -> Deliveries:
        if self._deliveries is None:
            known = Deliveries(self._directory, self._tracker.name)
            known.opened(self._tracker.open(self._params))
            self._deliveries = known
        return self._deliveries

    def _feed_artifact(self, name: str, images_seen: int) -> None:
        path = (self._directory / name).resolve()
        # The list may have come with somebody else's run: nothing outside of the run is ever sent.
        if path.is_relative_to(self._directory.resolve()) and path.is_file():
            self._tracker.artifact(path, name, images_seen)


def close_all(feeders: Sequence[Feeder], status: str, timeout_s: float = CLOSE_S) -> bool:
    """End all trackers' runs, waiting `timeout_s` seconds in total; whether all was delivered."""
    for feeder in feeders:
        feeder.close_soon(status)
    deadline = time.monotonic() + timeout_s
    done = [feeder.wait(max(0.0, deadline - time.monotonic())) for feeder in feeders]
    return all(done)
