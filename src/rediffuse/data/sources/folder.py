"""Your own images."""

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from rediffuse.data.decoding import KINDS, SUFFIXES, read
from rediffuse.data.sources import Broken, Example, Source, counted, identity_of
from rediffuse.errors import DataError

SYSTEM_FOLDERS = frozenset(
    ("@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
"""Folders that operating systems and file servers make among images; hidden ones are others."""


@dataclass(frozen=True)
class Files:
    """Image files below one folder, by relative name, each with the number of its class."""

    root: Path
    names: tuple[tuple[str, int | None], ...]
    skip_broken: bool

    def __len__(self) -> int:
        return len(self.names)

    def some(self, rows: range) -> "Files":
        """These rows alone, numbered from 0."""
        return replace(self, names=self.names[rows.start : rows.stop : rows.step])

    def __getitem__(self, row: int) -> Example | Broken:
        name, label = self.names[row]
        try:
            return Example(read(os.path.join(self.root, name)), label, name)
        except DataError as reason:
            if self.skip_broken:
                return Broken(name, str(reason))
            raise DataError(
                f"{self.root / name} cannot be used: {reason}; repair or remove it, or set "
                "data.on_broken=skip to leave such images out"
            ) from None


class Listing(NamedTuple):
    """Names in a folder, sorted: images (by suffix), folders, and counts of all else."""

    images: list[str]
    folders: list[str]
    left_out: Counter[str]


def image_names(place: str | Path) -> Listing:
    """List a folder: files that are images by their suffix, and folders that may be classes.

    Hidden entries, `._*` files of macOS among them, and SYSTEM_FOLDERS are left out. What is left
    out is counted by suffix, or by name where it is a folder.

    Raises:
        DataError: if the folder cannot be read.
    """
    images, folders, left_out = [], [], Counter[str]()
    try:
        with os.scandir(place) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (OSError, ValueError) as failed:  # ValueError: a NUL in its name
        why = getattr(failed, "strerror", None) or failed
        raise DataError(f"{str(place)[:200]!r} cannot be read ({why})") from None
    for entry in entries:
        hidden = entry.name.startswith(".")
        if not hidden and entry.name.lower().endswith(SUFFIXES):
            images.append(entry.name)
        elif _is_folder(entry):
            if hidden or entry.name in SYSTEM_FOLDERS:
                left_out[f"folder {entry.name}"] += 1
            else:
                folders.append(entry.name)
        else:
            suffix = os.path.splitext(entry.name)[1][:20].lower() or "without suffix"
            left_out["hidden" if hidden else suffix] += 1
    return Listing(images, folders, left_out)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a loop
        return False


def folder(
    *,
    path: str | Path,
    validation_path: str | Path | None = None,
    test_path: str | Path | None = None,
    on_broken: Literal["refuse", "skip"] = "refuse",
) -> Source:
    """Image files: a folder per class, sorted by name, or all in one folder without classes.

    Files are known by their suffix, links are followed. Other files, hidden ones and folders of the
    system are left out and counted. `on_broken` says whether a broken image ends the packing, or is
    left out and recorded. The name of a class is that of its folder in Unicode's form NFC.

    Raises:
        DataError: if a folder is missing, empty or both kinds at once, if the name of a class is
            not UTF-8 or there twice, or if validation or test have classes that training has not.
    """
    given = {"train": path, "validation": validation_path, "test": test_path}
    roots = {part: _home(root) for part, root in given.items() if root is not None}
    left_out = {part: Counter[str]() for part in roots}
    names = {part: _listed(root, left_out[part]) for part, root in roots.items()}
    class_names = tuple(sorted({c for c, _ in names["train"] if c is not None}))
    for part, listed in names.items():
        _refuse_other_classes(part, roots[part], {c for c, _ in listed}, class_names)
    number = {name: label for label, name in enumerate(class_names)}
    parts = {
        part: Files(
            roots[part],
            tuple((name, None if c is None else number[c]) for c, name in listed),
            on_broken == "skip",
        )
        for part, listed in names.items()
    }
    files = (
        (f"{part}/{name}", os.path.join(roots[part], name))  # a `Path` takes ten times as long
        for part, listed in names.items()
        for _, name in listed
    )
    return Source(class_names, parts, identity_of(files, on_broken), left_out)


def _home(root: str | Path) -> Path:
    try:
        return Path(root).expanduser()
    except RuntimeError:  # ~nobody
        raise DataError(f"there is no folder {root}; give one with data.path=FOLDER") from None


def _listed(root: Path, left_out: Counter[str]) -> list[tuple[str | None, str]]:
    """(class, relative name) of every image, by class and name; count what is left out."""
    if not root.is_dir():  # nor is what has a NUL in its name
        raise DataError(f"there is no folder {str(root)[:200]!r}; give one with data.path=FOLDER")
    images, folders, others = image_names(root)
    left_out.update(others)
    if images and folders:
        raise DataError(
            f"{root} holds both images ({images[0]}) and folders ({folders[0]}); use one folder "
            "per class, or all images in one folder"
        )
    if not images and not folders:
        raise DataError(f"{root} holds no {KINDS} files{_left_out(left_out)}")
    classes = _class_names(root, folders)
    return [(None, name) for name in images] + [
        (name, f"{classes[name]}/{image}")
        for name in sorted(classes)
        for image in _of_class(root / classes[name], left_out)
    ]


def _class_names(root: Path, folders: list[str]) -> dict[str, str]:
    """The folder of each class; macOS keeps names decomposed (NFD), other systems as typed."""
    found: dict[str, str] = {}
    for folder in folders:
        try:
            name = unicodedata.normalize("NFC", folder.encode().decode())
        except UnicodeEncodeError:
            raise DataError(
                f"{os.fsencode(root / folder)!r}: the name of a class has to be UTF-8; rename "
                "this folder"
            ) from None
        if name in found:
            raise DataError(
                f"{root} has two folders named {name!r}, which differ in their bytes alone "
                "(Unicode's NFC and NFD); merge them, or rename one"
            )
        found[name] = folder
    return found


def _of_class(place: Path, left_out: Counter[str]) -> list[str]:
    images, folders, others = image_names(place)
    left_out.update(others)
    if folders:
        raise DataError(
            f"{place} is read as a class, but holds a folder ({folders[0]}); if its folders are "
            f"the classes, set data.path={place}"
        )
    if not images:
        raise DataError(
            f"{place} is read as a class, but holds no {KINDS} files{_left_out(others)}; fill or "
            "remove it"
        )
    return images


def _left_out(counts: Mapping[str, int]) -> str:
    """What was left out, in brackets at the end of a sentence; nothing if all was used."""
    return f" (left out: {counted(counts)})" if counts else ""


def _refuse_other_classes(
    part: str, root: Path, found: set[str | None], class_names: tuple[str, ...]
) -> None:
    other = found - ({*class_names} if class_names else {None})
    if other:
        what = "images without classes" if None in other else f"the class {min(map(str, other))}"
        known = f"has only {', '.join(class_names)}" if class_names else "has no classes"
        raise DataError(f"{root}, given for {part}, has {what}, but training {known}")
