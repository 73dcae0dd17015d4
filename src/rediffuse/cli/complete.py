"""What a shell completes: read from names of files, so that nothing heavy is imported for it."""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from rediffuse.reading import read_object

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

_OURS = Path(__file__).parent.parent / "configs"
_OF_SAMPLING = ("solver", "grid", "guidance", "threshold")
_SCHEMA = Path(__file__).parent.parent / "config" / "schema.py"
_ID = re.compile(r"[0-9a-f]{32}")
_KEY, _INNER, _FIELD = (re.compile(rf"^{n}(\w+):", re.MULTILINE) for n in ("", "  ", "    "))
_INDENTED = re.compile(r"(?:  .*\n)*")
_MOST_RUNS = 200


def run_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The runs in the root, newest first, with their names."""
    root = Path(ctx.params.get("root") or os.environ.get("REDIFFUSE_ROOT") or "runs").expanduser()
    found = []
    with suppress(OSError):
        for entry in os.scandir(root):
            if _ID.fullmatch(entry.name) and entry.name.startswith(incomplete):
                found.append((entry.stat().st_mtime, entry.name))
    newest = sorted(found, reverse=True)[:_MOST_RUNS]
    return [CompletionItem(run, help=_name(root / run)) for _, run in newest]


def parts(axis: str, lists: bool = False) -> Complete:
    """The parts of an axis; with `lists`, also after a comma."""

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if lists else ("", "", incomplete)
        return _items(f"{before}{comma}{name}" for name in _parts(axis) if name.startswith(last))

    return complete


def checkpoints(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The ways to name a checkpoint without a number."""
    return _items(word for word in ("latest", "best") if word.startswith(incomplete))


def words(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys of the configuration, and after a group's = its parts.

    bash takes `schedule=fl` for three words, other shells for one.
    """
    key, equals, value = incomplete.partition("=")
    if equals:
        return _items(f"{key}={name}" for name in _parts(key) if name.startswith(value))
    before = [word for word in ctx.params.get("words") or () if word != "="]
    if before and before[-1] in _groups():
        return _items(name for name in _parts(before[-1]) if name.startswith(incomplete))
    keys = [f"{key}=" for key in _keys() if key.startswith(incomplete)]
    if len(keys) == 1 and (there := _parts(keys[0][:-1])):
        return _items(keys[0] + name for name in there)
    return _items(keys)


def _keys() -> list[str]:
    """Every group, every key of the schema, and every key that stands in a group's files."""
    found = dict.fromkeys((*_groups(), *_declared()))
    for group in _groups():
        if group != "experiment":
            above = f"sampling.{group}" if group in _OF_SAMPLING else group
            found |= dict.fromkeys(f"{above}.{key}" for key in _keys_of(group))
    return list(found)


def _declared() -> Iterable[str]:
    """The keys that the schema's classes name, read as text: Training has those of `training.`."""
    for section in _SCHEMA.read_text().split("\nclass ")[1:]:
        name = section[: section.index("(")]
        above = "" if name == "Config" else f"{name.lower()}."
        if name not in ("Section", "Part"):
            yield from (f"{above}{key}" for key in _FIELD.findall(section))


def _keys_of(group: str) -> Iterable[str]:
    """What stands in a group's files, or in its section of those that set more than the group."""
    for file in _files(group):
        with suppress(OSError, ValueError):
            text = file.read_text()
            _, several, rest = text.partition(f"\n{group}:\n")
            inner = _INDENTED.match(rest) if several else None
            yield from _INNER.findall(inner[0]) if inner else _KEY.findall(text)


def _groups() -> list[str]:
    return sorted(folder.name for folder in _OURS.iterdir() if folder.name != "root")


def _parts(group: str) -> list[str]:
    return sorted({file.stem for file in _files(group)})


def _files(group: str) -> list[Path]:
    """A group's files: our own, and those of a `configs` folder where the user stands."""
    if not group.isidentifier():
        return []
    return [f for home in (_OURS, Path("configs")) for f in sorted((home / group).glob("*.yaml"))]


def _items(values: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(value) for value in values]


def _name(run: Path) -> str | None:
    """What a run is called, in a line that a shell can show."""
    with suppress(OSError, ValueError):
        name = read_object(run / "run.json").get("name")
        return re.sub(r"[^\w .,=+-]", "?", str(name)[:40]) if name else None
    return None
