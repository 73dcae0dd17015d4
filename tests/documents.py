"""Fenced blocks of Markdown, and what a reader would type of them.

A block that is not to be run says why in a comment that no reader sees:

    <!-- not run: needs ImageNet -->
    ```bash
    rediffuse train experiment=imagenet100_64 data.path=imagenet100/train
    ```

`ID` in a command or a Python block is the page's last run, `OTHER` the one before it. A block with
a title (```python title="my_lab.py"```) is the file of that name.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from rediffuse.cli import rediffuse

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")]
)
QUICK = {"README.md", "docs/adding.md"}
"""Pages that are followed in every run of the tests; the others are with -m slow."""
_FENCE = re.compile(r"^( *)```(\w*)(.*)$")
_EXCUSE = re.compile(r"<!-- not run: (.+?) -->")
_TITLE = re.compile(r'title="([^"]+)"')
COMMANDS = ("bash", "console")
OURS = {  # how a command of ours may begin, and what it is then
    ("uv", "run", "-m", "scripts.train"): ("train",),
    ("uv", "run", "-m", "scripts.sample"): ("sample",),
    ("uv", "run", "-m", "scripts.evaluate"): ("evaluate",),
    ("torchrun", "--nproc_per_node=2", "-m", "rediffuse"): (),
    ("uv", "run", "rediffuse"): (),
    ("python", "-m", "rediffuse"): (),
    ("rediffuse",): (),
}
OTHERS = {"cd", "curl", "export", "kill", "mlflow", "pip", "python", "source", "tensorboard", "uv"}


@dataclass(frozen=True)
class Block:
    """One fenced block; `excuse` is why it is not run."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    excuse: str | None

    def __str__(self) -> str:
        return f"{relative(self.page)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The commands of a block, as words; what follows a # is a remark."""
        text = self.text.replace("\\\n", " ")
        if self.language == "console":
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
        typed = (part for line in text.splitlines() for part in _apart(line))
        return [words for words in typed if words]


def _apart(line: str) -> list[list[str]]:
    """Words of the commands of one line, which && divides."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def relative(page: Path) -> str:
    """How messages call a page."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    found, opened, excuse = [], None, None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, inside = (number, fence), []
        elif opened is not None and fence and not fence[2]:
            at, start = opened
            title = _TITLE.search(start[3])
            text = "".join(f"{row.removeprefix(start[1])}\n" for row in inside)
            found.append(Block(page, at, start[2], title and title[1], text, excuse))  # type: ignore[arg-type]
            opened, excuse = None, None
        elif opened is not None:
            inside.append(line)
        elif comment := _EXCUSE.search(line):
            excuse = comment[1]
        elif line.strip():
            excuse = None  # it speaks of the next block, with nothing between
    assert opened is None, f"{page}:{opened[0] if opened else 0} is never closed"
    return found


def ours(words: list[str]) -> list[str] | None:
    """The words after `rediffuse`, or None for a command of somebody else's."""
    for beginning, meaning in OURS.items():
        if tuple(words[: len(beginning)]) == beginning:
            return [*meaning, *words[len(beginning) :]]
    return None


def parsed(words: list[str]) -> tuple[str, dict[str, object]]:
    """The command that is meant, and its options as click reads them; "" for a call for help."""
    command: click.Command = rediffuse
    rest, name = list(words), []
    while isinstance(command, click.Group):
        if not rest or rest[0] in ("--help", "-h", "--version"):
            return "", {}
        name.append(rest.pop(0))
        assert name[-1] in command.commands, f"rediffuse {' '.join(name)}: no such command"
        command = command.commands[name[-1]]
    if {"--help", "-h"} & {*rest}:
        return "", {}
    context = command.make_context(" ".join(name), rest)
    return " ".join(name), dict(context.params)
