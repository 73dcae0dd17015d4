"""How far something is: a bar on a terminal, a line now and then anywhere else."""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from rediffuse.words import encodable, tell, visible_lines

LINE_EVERY_S, SILENT_S = 10.0, 1.0
_WIDEST = 100  # columns of a line with its bar


class Progress:
    """Shows on standard error how many are done, the speed, the time left, and a few figures.

    What takes less than a second shows nothing. The bar of what is only a part of the work goes
    when it is done; with `stays` it is left to be read.
    """

    def __init__(
        self,
        total: int,
        what: str = "images",
        *,
        first: int = 0,
        stays: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._what, self._first = total, what, first
        self._began = self._last_line = time.monotonic()
        self._bar: Any = None
        self._shown: dict[str, float] = {}
        with suppress(OSError, ValueError):  # a stream that is closed
            if self._stream is not None and self._stream.isatty():
                self._bar = tqdm(
                    total=total,
                    initial=first,
                    bar_format="{percentage:3.0f}% |{bar}| {desc}",
                    file=self._stream,
                    delay=SILENT_S,
                    leave=stays,
                )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *failed: object) -> None:
        self.close()

    def move(self, done: int, shown: Mapping[str, float] | None = None) -> None:
        """Tell how many are done; what is shown stays until others of the same name come."""
        self._shown |= shown or {}
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.ncols = min(_WIDEST, _columns(self._stream))
                self._bar.set_description_str(self._line(done), refresh=False)
                self._bar.update(min(done, self._total) - self._bar.n)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            tell(self._line(done), self._stream)

    def say(self, line: str, stream: TextIO | None = None) -> None:
        """Print one line, above the bar if there is one."""
        stream = self._stream if stream is None else stream
        if self._bar is None:
            tell(line, stream)
        else:
            with suppress(OSError, ValueError):
                self._bar.write(encodable(visible_lines(line), stream), file=stream)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()

    def _line(self, done: int) -> str:
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = tqdm.format_interval((self._total - done) / rate) if rate else "?"
        shown = "".join(f"  {key} {value:.4g}" for key, value in self._shown.items())
        return f"{done:,} of {self._total:,} {self._what}  {_short(rate)}/s  {left} left{shown}"


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _columns(stream: TextIO) -> int:
    """How wide the terminal is now."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
