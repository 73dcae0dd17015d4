"""HTML of what is drawn and of what runs left. Every word is escaped where it is put in."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from rediffuse.gallery import class_of, of_image
from rediffuse.pictures import Pixels, columns_for, grid, png
from rediffuse.report.page import Picture, Section, told
from rediffuse.studio.asking import Drawing
from rediffuse.studio.frames import Frame
from rediffuse.studio.shelf import Card

_SIDE = {1: 320, 2: 240, 4: 150, 6: 110, 8: 84}
"""How wide a tile is, in CSS pixels, by the number of columns."""


def line(text: str, kind: str = "said") -> str:
    """One line about how things are; `kind` is said, good or bad."""
    return Markup('<p class="line {}" role="status">{}</p>').format(kind, text)


def refusal(refused: Exception) -> str:
    """Why something was not done; options are called as the fields are."""
    return line(re.sub(r"(?<!\S)--(?=[a-z])", "", " ".join(str(refused).split())), "bad")


def state(of: Drawing, frame: Frame) -> str:
    """How far a walk is, or how it came to its end."""
    said = {None: _under_way, "stopped": _cancelled, "done": _ended}
    return said[frame.end](of, frame)


def _under_way(of: Drawing, frame: Frame) -> str:
    most = max(of.steps or frame.step, frame.step)
    bar = Markup('<progress max="{}" value="{}"></progress>').format(most, frame.step)
    return line(f"step {_step(of, frame)}, {_evaluations(frame)}") + bar


def _cancelled(of: Drawing, frame: Frame) -> str:
    return line(f"cancelled in step {_step(of, frame)}, after {_evaluations(frame)}")


def _ended(of: Drawing, frame: Frame) -> str:
    count, scale = len(of.job.images), of.how.guidance.arguments.get("scale")
    words = [
        f"{count} image{'s' * (count != 1)} from {of.facts['weights']} weights at "
        f"{of.facts['checkpoint']}",
        f"{of.how.solver.name}, {of.how.steps} steps, guidance {told(scale)}",
        f"{_evaluations(frame)} in {frame.seconds:.1f} s",
    ]
    return line(" · ".join(words), "good")


def _step(of: Drawing, frame: Frame) -> str:
    return f"{frame.step:,}" if of.steps is None else f"{frame.step:,} of {of.steps:,}"


def _evaluations(frame: Frame) -> str:
    return f"{frame.evaluations:,} evaluation{'s' * (frame.evaluations != 1)} of the network"


def tiles(of: Drawing, frame: Frame, what: str = "x_t") -> str:
    """Images in a grid; finished ones are links to PNG files that hold how they were made."""
    pixels: Pixels = getattr(frame, what)
    done = frame.end == "done"
    names = [class_of(of.model, of.job, k) for k in range(len(pixels))]
    by_class = of.model.class_names if of.job.way is None and len({*names}) > 1 else ()
    columns = columns_for(len(pixels), by_class if len(by_class) <= 10 else ())
    side = next((px for most, px in _SIDE.items() if columns <= most), 72)
    cells = [
        _tile(of, done, j, name, image)
        for j, name, image in zip(of.job.images, names, pixels, strict=True)
    ]
    body = Markup('<div class="tiles" style="--columns: {}; --side: {}px">{}</div>').format(
        columns, side, Markup("").join(cells)
    )
    return body + (_all(of, pixels, columns) if done else Markup())


def _tile(of: Drawing, done: bool, j: int, class_name: str | None, image: np.ndarray) -> Markup:
    facts = of_image(of.facts, j, class_name) if done else None
    address = _address(png(image.transpose(1, 2, 0), facts))
    words = f"image {j}" if class_name is None else f"image {j}, class {class_name}"
    picture = Markup('<img class="pixels" src="{}" alt="{}">').format(address, words)
    if done:
        link = '<a href="{}" download="{}" title="{}: download the PNG">{}</a>'
        picture = Markup(link).format(address, f"{_stem(of)}-{j:06d}.png", words, picture)
    below = f"{j}" if class_name is None else f"{j} · {class_name}"
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(picture, below)


def _all(of: Drawing, pixels: Pixels, columns: int) -> Markup:
    facts = {**of.facts, "images": list(of.job.images)}
    address = _address(png(grid(pixels, columns), facts))
    return Markup(
        '<p class="line said"><a href="{}" download="{}-grid.png">download all as one picture</a>; '
        "a click on an image downloads it alone. Each PNG holds its settings.</p>"
    ).format(address, _stem(of))


def _stem(of: Drawing) -> str:
    return f"{of.facts['run'][:8]}-{of.facts['checkpoint']}"


def typed(command: str) -> str:
    """The same from the command line."""
    return Markup('<p class="line said">the same: <code>{}</code></p>').format(command)


def training(facts: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """A run's facts, curves and previews."""
    shown = {k: v for k, v in facts.items() if v is not None}
    rows = (
        Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(k, told(v)) for k, v in shown.items()
    )
    head = Markup('<dl class="facts">{}</dl>').format(Markup("").join(rows))
    return head + Markup("").join(map(_section, sections))


def _section(of: Section) -> Markup:
    notes = (Markup('<p class="line said">{}</p>').format(note) for note in of.notes)
    kind = "broad" if any(picture.wide for picture in of.pictures) else "curves"
    return Markup('<h3>{}</h3>{}<div class="{}">{}</div>').format(
        of.title, Markup("").join(notes), kind, Markup("").join(map(_picture, of.pictures))
    )


def _picture(of: Picture) -> Markup:
    """In the colours of the page: what is hidden is decided by its style."""
    if of.dark_address:
        drawn = _img("on-light", of.address, of.title) + _img("on-dark", of.dark_address, of.title)
    else:
        drawn = _img("", of.address, of.title)
    if of.still_address:
        still = '<picture><source media="(prefers-reduced-motion: reduce)" srcset="{}">{}</picture>'
        drawn = Markup(still).format(of.still_address, drawn)
    caption = Markup("<figcaption>{}</figcaption>").format(of.caption) if of.caption else ""
    return Markup('<figure id="{}"><h4>{}</h4><div class="scrolls">{}</div>{}</figure>').format(
        f"figure-{of.name}", of.title, drawn, caption
    )


def _img(kind: str, address: str, title: str) -> Markup:
    return Markup('<img class="{}" src="{}" alt="{}">').format(kind, address, title)


def _address(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def about(card: Card) -> str:
    """One line about a run."""
    config, data = card.config, card.config.data
    classes = f", {len(card.class_names)} classes" if card.class_names else ""
    words = [
        str(card.run.directory),
        f"{data.name}, {data.image_size} × {data.image_size}{classes}",
        f"schedule={config.schedule.name}, target={config.target.name}",
        "" if card.checkpoints else "no checkpoint yet",
    ]
    return line(" · ".join(filter(None, words)))


def empty(button: str) -> str:
    """What stands where images will be."""
    return Markup('<p class="empty">{} draws here.</p>').format(button)


def runs(choices: Iterable[tuple[str, str]], root: object) -> str:
    """How many runs there are, or what to do where there are none."""
    if count := len(list(choices)):
        return line(f"{count} run{'s' * (count != 1)} in {root}")
    return line(f"no runs in {root}; `rediffuse train` makes one")
