"""How far a run is: a bar on a terminal, a line now and then anywhere else."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from rediffuse.tracking.tracker import Number
from rediffuse.words import tell

LINE_EVERY_S = 10.0


class Console:
    """Shows images seen, images per second, the time left and a few metrics."""

    def __init__(self, planned_images: int, images_seen: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._planned, self._first = planned_images, images_seen
        self._began = self._last_line = time.monotonic()
        self._bar: Any = None
        self._shown: dict[str, Number] = {}

    def metrics(self, values: Mapping[str, Number], images_seen: int) -> None:
        """Move on; `values` are shown until others of the same name come."""
        self._shown |= values
        if self._stream is not None and self._stream.isatty():
            with suppress(OSError, ValueError):
                self._move_bar(images_seen)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(self._line(images_seen))

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._bar is None:
            tell(line, self._stream)
        else:
            with suppress(OSError, ValueError):
                self._bar.write(line, file=self._stream)

    def close(self) -> None:
        """Leave the bar as it is and begin a new line."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()

    def _move_bar(self, images_seen: int) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=self._planned,
                initial=self._first,
                unit="img",
                unit_scale=True,
                dynamic_ncols=True,
                file=self._stream,
            )
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(images_seen - self._bar.n)

    def _line(self, images_seen: int) -> str:
        rate = (images_seen - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = tqdm.format_interval((self._planned - images_seen) / rate) if rate else "?"
        shown = "".join(f"  {key} {value:.4g}" for key, value in self._shown.items())
        return f"{images_seen:,} of {self._planned:,} images  {rate:.0f} img/s  {left} left{shown}"
