"""What commands print: columns as wide as their words, and no wider than the terminal.

Where there is no terminal, nothing is cut or folded, unless $COLUMNS asks for it.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from textwrap import TextWrapper

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rediffuse.words import tell, tell_styled, visible, visible_lines

_NO_END = 100_000
_WIDEST_TEXT = 100
_LEAST_CUT = 8


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    cut: str = "",
    fold: Sequence[str] = (),
    styles: Mapping[str, str] | None = None,
) -> None:
    """Print rows under their heads: the columns `left` and `fold` on the left, others on the right.

    Where there is too little room, the column `cut` ends in an ellipsis, and those of `fold` go on
    below; where that does not suffice, each row is printed as a list. On a terminal, a cell whose
    whole content is in `styles` has that style.
    """
    console, rows = _console(), [[visible(cell) for cell in row] for row in rows]
    natural = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
    least = [
        min(width, _LEAST_CUT) if name == cut or name in fold else width
        for name, width in zip(head, natural, strict=True)
    ]
    if sum(least) + len(head) - 1 > console.width:
        for row in rows:
            _stacked(dict(zip(head, row, strict=True)), console)
            tell("", sys.stdout)
        return
    gap = 2 if sum(natural) + 2 * len(head) <= console.width else 1
    over = sum(natural) + gap * (len(head) - 1) - console.width
    drawn = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for name, width in zip(head, natural, strict=True):
        drawn.add_column(
            name,
            justify="left" if name in (*left, *fold) else "right",
            no_wrap=name not in fold,
            overflow="fold" if name in fold else "ellipsis",
            max_width=max(_LEAST_CUT, width - over) if name == cut and over > 0 else None,
        )
    for row in rows:
        drawn.add_row(*(Text(cell, (styles or {}).get(cell, "")) for cell in row))
    _show(drawn, console)


def facts(named: Mapping[str, str]) -> None:
    """Print names and their values, one per line; below each other on a narrow terminal."""
    console = _console()
    named = {visible(name): visible(value) for name, value in named.items()}
    if console.width < max(map(cell_len, named), default=0) + 2 + _LEAST_CUT:
        _stacked(named, console)
        return
    drawn = Table.grid(padding=(0, 2, 0, 0))
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in named.items():
        drawn.add_row(Text(name), Text(value))
    _show(drawn, console)


def _stacked(named: Mapping[str, str], console: Console) -> None:
    """Print each value below its name, for a terminal with no room for both side by side."""
    for name, value in named.items():
        _show(Text(name, overflow="fold"), console)
        _show(Padding(Text(value, overflow="fold"), (0, 0, 0, 2)), console)


def verdict(word: str, name: str, told: str) -> None:
    """Print one check: a word that is ok, warn or fail, what was checked, and what was found."""
    drawn = Table.grid(padding=(0, 2, 0, 0))
    for width in (4, 9):
        drawn.add_column(width=width, no_wrap=True)
    drawn.add_column(overflow="fold")
    drawn.add_row(Text(word, _OF_VERDICTS.get(word, "")), name, Text(visible(told)))
    console = _console()
    console.width = min(console.width, _WIDEST_TEXT) if console.is_terminal else console.width
    _show(drawn, console)


_OF_VERDICTS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def hanging(text: str, indent: int) -> None:
    """Print a line whose rest goes on below, `indent` columns in; words are not broken."""
    console = _console()
    width = console.width if console.width == _NO_END else min(console.width, _WIDEST_TEXT)
    whole = TextWrapper(
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    for line in whole.wrap(visible(text)):
        tell(line, sys.stdout)


def paragraph(text: str) -> None:
    """Print text that goes on below, in lines that can be read."""
    console = _console()
    console.width = min(console.width, _WIDEST_TEXT)
    _show(Text(visible_lines(text)), console)


def _console() -> Console:
    """A terminal as wide as it is; anything else has no end."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _NO_END
    return console


def _show(drawn: RenderableType, console: Console) -> None:
    with console.capture() as held:
        console.print(drawn)
    for line in held.get().splitlines():
        tell_styled(line.rstrip(), sys.stdout)
