"""`rediffuse data duplicates`: images of a data set that are there more than once.

<root>/duplicates/<name of the packed folder>/
    report.json       every group, with file names where the source has them
    groups.png        a row for each of the largest groups
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from rediffuse import build, tables
from rediffuse.config.schema import Data
from rediffuse.data.packing import Packed
from rediffuse.data.sources import AnySource, shown
from rediffuse.data.sources.folder import Files
from rediffuse.errors import DataError
from rediffuse.evaluation.digests import add_digest
from rediffuse.evaluation.duplicates import QUALITY, SHIFT, Found, Group, find, rounds
from rediffuse.images import Images, prepare
from rediffuse.pictures import grid, save_png
from rediffuse.progress import Progress
from rediffuse.reading import read_object
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.words import json_text, say

Facts = dict[str, Any]

_COLUMNS, _ROWS, _TOLD = 8, 20, 20


class Place(NamedTuple):
    """Where an image of a data set is: what it is for, and its file or its row in the part."""

    use: str  # train, held out, validation or test
    name: str


def duplicates(
    data: Data, root: Path, folder: Path | None, *, mirrored: bool = True, as_json: bool = False
) -> int:
    """Find duplicates in a data set, write them down and tell; return the exit code.

    Raises:
        DataError: if the images cannot be read, or the folder not be written or holds other files
            of the names that are written.
    """
    if folder:
        _refuse_other_files(folder)
    images = prepare(data, root)
    packed = images.packed
    pixels = np.concatenate([part.images for part in packed.parts.values()])
    places = placed(images, build.bind("data", data.source, "data")())
    with Progress(len(pixels) * rounds(mirrored), "images compared") as bar:
        found = find(torch.from_numpy(pixels), mirrored=mirrored, done=bar.move)
    facts = report(packed, places, found, mirrored)
    folder = folder or root / "duplicates" / packed.folder.name
    facts["folder"] = str(folder)
    _write(folder, facts, _picture(pixels, found.groups))
    say(json_text(facts)) if as_json else _tell(facts)
    return 0


def placed(images: Images, source: AnySource) -> list[Place]:
    """Every image of a packed data set, in the order of its parts."""
    places = []
    held_out = {*images.held_out_rows.tolist()}
    for name, part in images.packed.parts.items():
        names = _names(source, images.packed, name)
        split_here = name == "train" and images.held_out is part
        places += [
            Place("held out" if split_here and row in held_out else name, names[row])
            for row in range(len(part.images))
        ]
    return places


def report(packed: Packed, places: Sequence[Place], found: Found, mirrored: bool) -> Facts:
    """All that was found, as plain data."""
    groups: list[Facts] = [
        {
            "kind": group.kind,
            "farthest": group.farthest,
            "images": [places[row]._asdict() for row in group.rows],
            "uses": sorted({places[row].use for row in group.rows}),
        }
        for group in found.groups
    ]
    return {
        "data": str(packed.folder),
        "fingerprint": packed.fingerprint,
        "images": len(places),
        "mirrored": mirrored,
        "in_groups": sum(len(group.rows) for group in found.groups),
        "expected_false": found.expected_false,
        "leaks": sum(_leaks(group["uses"]) for group in groups),
        "groups": groups,
    }


def _leaks(uses: Sequence[str]) -> bool:
    """Whether images that are trained on are among those that are meant to be unseen."""
    return "train" in uses and len(uses) > 1


def _names(source: AnySource, packed: Packed, part: str) -> list[str]:
    """A name for every packed image: its file's, where the source has files."""
    examples, facts = source.parts[part], packed.facts["parts"][part]
    if not isinstance(examples, Files):
        return [f"{part}/{row}" for row in range(facts["images"])]
    skipped = {broken["name"] for broken in facts["skipped"]}
    return [text for name, _ in examples.names if (text := shown(name)) not in skipped]


def _picture(pixels: np.ndarray, groups: Sequence[Group]) -> UInt8[np.ndarray, "h w c"]:
    """A row for each of the first groups, filled with white."""
    blank = np.full((1, *pixels.shape[1:]), 255, np.uint8)
    rows = [
        np.concatenate(
            (shown := pixels[[*group.rows[:_COLUMNS]]], *[blank] * (_COLUMNS - len(shown)))
        )
        for group in groups[:_ROWS]
    ]
    return grid(np.concatenate(rows or [blank]), columns=_COLUMNS)


def _refuse_other_files(folder: Path) -> None:
    """Refuse to replace a report or a picture that no search for duplicates wrote."""
    report, picture = folder / "report.json", folder / "groups.png"
    if not os.path.lexists(report) and not os.path.lexists(picture):
        return
    try:
        ours = {"fingerprint", "expected_false", "groups"} <= read_object(report, 2**30).keys()
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise DataError(
            f"{folder} holds a report.json or groups.png of something else; name another "
            "--output-dir"
        )


def _write(folder: Path, facts: Facts, picture: np.ndarray) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_png(picture, folder / "groups.png")
        write_atomically(folder / "report.json", json_text(add_digest(facts)).encode())
    except OSError as failed:
        raise DataError(
            f"{folder} cannot be written ({failed.strerror}); name another --output-dir"
        ) from None


def _tell(facts: Facts) -> None:
    groups, kinds = facts["groups"], Counter(group["kind"] for group in facts["groups"])
    say(f"{facts['images']:,} images, {facts['in_groups']:,} of them in {len(groups):,} groups")
    for kind, what in _KINDS.items():
        if kinds[kind]:
            say(f"  {kinds[kind]:,} of {what}")
    if facts["leaks"]:
        say(f"  {facts['leaks']:,} with images that are trained on and images held out")
    if groups:
        _table(groups[:_TOLD])
    if len(groups) > _TOLD:
        say(f"and {len(groups) - _TOLD:,} more groups")
    say(f"by chance, {facts['expected_false']:.2g} images may be in a group of near ones")
    say(f"grid    {facts['folder']}/groups.png")
    say(f"all     {facts['folder']}/report.json")


_KINDS = {
    "same": "the same pixels",
    "mirrored": "mirror images, or mirrored and altered",
    "near": f"near ones: brighter or darker by up to {SHIFT} levels, or JPEG of {QUALITY}",
}


def _table(groups: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for group in groups:
        shown = [f"{image['name']} ({image['use']})" for image in group["images"][:3]]
        more = len(group["images"]) - len(shown)
        which = ", ".join([*shown, *([f"{more:,} more"] if more else [])])
        rows.append((f"{len(group['images']):,}", group["kind"], f"{group['farthest']:.1f}", which))
    tables.table(("images", "kind", "levels apart", "which"), rows, left=("kind",), fold=("which",))
