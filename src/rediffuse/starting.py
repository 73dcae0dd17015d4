"""`rediffuse init`: a folder to begin in."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from rediffuse.errors import ConfigError

_NAMES = {"gitignore": ".gitignore"}


def begin(folder: Path) -> list[Path]:
    """Write a project for images of one's own; return its files.

    Raises:
        ConfigError: if one of them is there already, or the folder cannot be written.
    """
    here = folder.expanduser().absolute()
    content = {here / name: text for name, text in _content(files("rediffuse") / "starter")}
    there = [file for file in content if file.exists()]
    if there:
        raise ConfigError(
            f"{there[0]} is there already, and nothing was written; name a new folder"
        )
    try:
        for file, text in content.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x") as out:
                out.write(text.replace("PROJECT", here.name))
    except OSError as failed:
        raise ConfigError(f"{failed.filename or here}: {failed.strerror}") from None
    return list(content)


def _content(folder: Traversable, above: str = "") -> list[tuple[str, str]]:
    """Every file below a folder: its path, and what it says."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        name = f"{above}{_NAMES.get(entry.name, entry.name)}"
        if entry.is_dir():
            found += _content(entry, f"{name}/") if entry.name != "__pycache__" else []
        else:
            found.append((name, entry.read_text()))
    return found
