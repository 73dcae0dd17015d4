"""Your own images."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rediffuse.data.decoding import SUFFIXES, read
from rediffuse.data.sources import Broken, Example, Source, identity_of
from rediffuse.errors import DataError

KINDS = "PNG, JPEG or WebP"


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


def folder(
    *,
    path: str | Path,
    validation_path: str | Path | None = None,
    test_path: str | Path | None = None,
    on_broken: Literal["refuse", "skip"] = "refuse",
) -> Source:
    """PNG, JPEG and WebP files: a folder per class, sorted by name, or all in one without classes.

    Files are known by their suffix; others and hidden ones are left alone, links are followed.
    `on_broken` says whether a broken image ends the packing, or is left out and recorded.

    Raises:
        DataError: if a folder is missing, empty or both kinds at once, or if validation or test
            have classes that training has not.
    """
    given = {"train": path, "validation": validation_path, "test": test_path}
    roots = {part: _home(root) for part, root in given.items() if root is not None}
    names = {part: _listed(root) for part, root in roots.items()}
    class_names = tuple(sorted({str(c) for c, _ in names["train"] if c is not None}))
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
    return Source(class_names, parts, identity_of(files, on_broken))


def _home(root: str | Path) -> Path:
    try:
        return Path(root).expanduser()
    except RuntimeError:  # ~nobody
        raise DataError(f"there is no folder {root}; give one with data.path=FOLDER") from None


def _listed(root: Path) -> list[tuple[str | None, str]]:
    """(class, relative name) of every image, in order of the names."""
    if not root.is_dir():  # nor is what has a NUL in its name
        raise DataError(f"there is no folder {str(root)[:200]!r}; give one with data.path=FOLDER")
    images, folders = _inside(root)
    if images and folders:
        raise DataError(
            f"{root} holds both images ({images[0]}) and folders ({folders[0]}); use one folder "
            "per class, or all images in one folder"
        )
    if not images and not folders:
        raise DataError(f"{root} holds no {KINDS} files")
    return [(None, name) for name in images] + [
        (c, f"{c}/{name}") for c in folders for name in _of_class(root / c)
    ]


def _of_class(place: Path) -> list[str]:
    images, folders = _inside(place)
    if folders:
        raise DataError(
            f"{place} is read as a class, but holds a folder ({folders[0]}); if its folders are "
            f"the classes, set data.path={place}"
        )
    if not images:
        raise DataError(
            f"{place} is read as a class, but holds no {KINDS} files; fill or remove it"
        )
    return images


def _inside(place: Path) -> tuple[list[str], list[str]]:
    """Names of images (by suffix) and of folders, sorted; hidden ones are left out."""
    with os.scandir(place) as found:
        entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    images = [e.name for e in entries if e.name.lower().endswith(SUFFIXES)]
    return images, [e.name for e in entries if e.is_dir() and e.name not in set(images)]


def _refuse_other_classes(
    part: str, root: Path, found: set[str | None], class_names: tuple[str, ...]
) -> None:
    other = found - ({*class_names} if class_names else {None})
    if other:
        what = "images without classes" if None in other else f"the class {min(map(str, other))}"
        known = f"has only {', '.join(class_names)}" if class_names else "has no classes"
        raise DataError(f"{root}, given for {part}, has {what}, but training {known}")
