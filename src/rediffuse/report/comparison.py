"""Two runs on one page: what differs, their curves in the same plots, images of the same noise."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rediffuse.errors import DataError
from rediffuse.pictures import png
from rediffuse.report import curves, page
from rediffuse.report.images import picture_of
from rediffuse.report.page import Picture, Section
from rediffuse.tracking.tracker import Row


def write(file: Path, facts: Mapping[str, Any], rows: Sequence[Sequence[Row]]) -> None:
    """Write the page of what `rediffuse compare` found.

    Raises:
        RunError: if it cannot be written.
    """
    text = page.render(
        "comparison.html",
        title="Comparison",
        facts=facts,
        sections=[curves.curves(list(zip("AB", rows, strict=True))), _images(facts["samples"])],
        version=version("rediffuse"),
    )
    page.write(file, text)


def _images(samples: Mapping[str, Any]) -> Section:
    title = "Images of the same noise"
    if "none" in samples:
        return Section(title, notes=[f"None: {samples['none']}."])
    try:
        content = png(picture_of(Path(samples["grid"])))
    except DataError as refused:
        return Section(title, notes=[f"The grid cannot be read: {refused}."])
    apart = [pair["difference"] for pair in samples["pairs"]]
    caption = (
        f"Rows of A and B in turn. Mean pixel difference {samples['mean_difference']:.2f} of 255 "
        f"({min(apart):.2f} to {max(apart):.2f})."
    )
    return Section(title, [Picture("images", "png", "In pairs", caption, content)])
