"""A page that is complete in itself: pictures inside, no scripts, nothing that is fetched.

Every word that comes from a run is escaped by the template engine. The policy in the page's head
lets a browser load nothing but its own pictures, and use no style but ours.
"""

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from rediffuse import outputs, plots
from rediffuse.errors import ConfigError, RunError
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.words import masked

_HERE = Path(__file__).parent
_ENDINGS = {"svg": "image/svg+xml", "png": "image/png", "gif": "image/gif"}


@dataclass(frozen=True)
class Picture:
    """A picture, also for dark pages and for readers who want nothing to move, where it differs."""

    name: str  # of its file, without the ending
    kind: str  # svg, png or gif
    title: str
    caption: str
    content: bytes
    dark: bytes | None = None
    still: bytes | None = None  # a PNG in the place of a film
    wide: bool = False
    draw: Callable[[], Figure] | None = None

    @property
    def address(self) -> str:
        """The picture itself, as an address."""
        return _address(self.content, self.kind)

    @property
    def dark_address(self) -> str | None:
        """The same for dark pages, if it has a picture of its own there."""
        return _address(self.dark, self.kind) if self.dark else None

    @property
    def still_address(self) -> str | None:
        """What stands still in its place."""
        return _address(self.still, "png") if self.still else None


@dataclass(frozen=True)
class Section:
    """Pictures under one heading, or the reason why there are none."""

    title: str
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()


def figure(
    name: str, draw: Callable[[], Figure], title: str, caption: str = "", *, wide: bool = False
) -> Picture:
    """Draw a figure for light and for dark pages."""
    light, dark = (plots.svg(draw, style) for style in (plots.LIGHT, plots.DARK))
    return Picture(name, "svg", title, caption, light, dark, wide=wide, draw=draw)


def render(template: str, **facts: Any) -> str:
    """Fill a template of this folder."""
    engine = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        finalize=_without_secrets,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters["value"] = told
    style = (_HERE / "style.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return engine.get_template(template).render(style=Markup(style), style_digest=digest, **facts)


def _without_secrets(value: Any) -> Any:
    """Mask text of the run; markup is our own."""
    return masked(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def told(value: Any) -> str:
    """A value as text: numbers with four digits, lists with commas."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(told, value)) or "none"
    return str(value)


def check_output(file: Path) -> None:
    """Refuse a place where no page can be written.

    Raises:
        ConfigError: naming it.
    """
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{str(file)[:200]}: a page's name ends in .html")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name a file in it")
    if file.exists() and not _is_page(file):
        raise ConfigError(f"{file} is there and is no page of Rediffuse; name another file")
    home = next(folder for folder in file.absolute().parents if folder.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise ConfigError(f"{file} cannot be written, as {home} is; name another file")


def _is_page(file: Path) -> bool:
    """Whether a file ends as every page does that was ever written here."""
    if not file.is_file():
        return False
    with file.open("rb") as there:
        there.seek(-min(_FOOTER_BYTES, file.stat().st_size), os.SEEK_END)
        return b"Written by Rediffuse" in there.read()


_FOOTER_BYTES = 500


def write(file: Path, page: str) -> None:
    """Write a page, complete or not at all.

    Raises:
        RunError: if it cannot be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, page.encode("utf-8", "replace"))
    except OSError as failed:
        raise RunError(
            f"{file} cannot be written ({failed.strerror}); name another file for the page"
        ) from None


def write_pictures(folder: Path, run_id: str, sections: Sequence[Section]) -> None:
    """Write every picture of a run's report as a file of its own.

    Raises:
        ConfigError: if the folder holds something else than pictures of this run's reports.
        RunError: if a picture cannot be written there.
    """
    files: dict[str, bytes] = {}
    for picture in (picture for section in sections for picture in section.pictures):
        files[f"{picture.name}.{picture.kind}"] = picture.content
        if picture.dark:
            files[f"{picture.name}-dark.{picture.kind}"] = picture.dark
        if picture.wide and picture.draw:  # of images, which not every program takes in an SVG
            files[f"{picture.name}.png"] = plots.png(picture.draw)
    job = {"pictures_of_run": run_id}
    outputs.check_folder(job, folder, list(files), "--pictures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
        outputs.finish(folder, job)
    except OSError as failed:
        raise RunError(f"{folder} cannot be written ({failed.strerror})") from None


def _address(content: bytes, kind: str) -> str:
    return f"data:{_ENDINGS[kind]};base64,{base64.b64encode(content).decode()}"
