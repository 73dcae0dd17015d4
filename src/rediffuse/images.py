"""From a configuration to packed images, and which of them are for what."""

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Int64

from rediffuse import build, drift, private
from rediffuse.config.compose import (
    checked,
    joined,
    leaves,
    read_yaml,
    set_values,
    typed_values,
)
from rediffuse.config.schema import Data
from rediffuse.data.packing import (
    FACTS,
    FORMAT,
    Packed,
    Part,
    differing,
    open_packed,
    pack,
    verify,
)
from rediffuse.data.sources import AnySource, counted
from rediffuse.data.splits import split
from rediffuse.errors import ConfigError, DataError, RunError
from rediffuse.runs import Run, locked
from rediffuse.words import tell

Rows = Int64[np.ndarray, " _"]  # any number of rows


@dataclass(frozen=True)
class Images:
    """A data set, ready to train on: which rows of which part are seen, and which are held out."""

    packed: Packed
    train_rows: Rows
    held_out: Part | None
    held_out_rows: Rows
    class_names: tuple[str, ...]  # empty where there are no classes, or they are not used

    @property
    def per_epoch(self) -> int:
        """How many images an epoch has."""
        return len(self.train_rows)

    def facts(self) -> dict[str, Any]:
        """What a run remembers of its data: enough to sample, and to notice when it has changed."""
        return {
            "fingerprint": self.packed.fingerprint,
            "class_names": list(self.class_names),
            "train_images": self.per_epoch,
            "validation_images": len(self.held_out_rows),
        }


def of_run(
    run: Run, data: Data, trusted: Sequence[str] | None = None, *, whole: bool = False
) -> Images:
    """The images that a run was trained on, packed or found packed beside it.

    All that was packed is verified with `whole`, else some of it. Where this version reads other
    files or pixels than the one that packed them, that one's packed copy is used, all verified.

    Raises:
        RunError: if they are others now.
        DataError: if they are missing, broken, or too few.
    """
    images = prepare(located(run, data, trusted), run.directory.parent, trusted, whole=whole)
    known, found = drift.began(run).get("data"), images.facts()
    if known == found:
        return images
    before = known if isinstance(known, dict) else {}
    if former := _packed_formerly(run, data, before, trusted):
        return former
    changed = [key for key, value in found.items() if before.get(key) != value]
    raise RunError(
        f"the images are not those that run {run.id} was trained on ({', '.join(changed)} "
        "changed): their files differ, or this version reads other files or pixels than the one "
        "that packed them; restore the files or use that version, or start a new run with "
        "parent_run_id"
    )


def _packed_formerly(
    run: Run, data: Data, known: Mapping[str, Any], trusted: Sequence[str] | None
) -> Images | None:
    """A run's images as an earlier version packed them, if they are still there and undamaged."""
    for folder in _former_folders(run, data, trusted):
        if not (folder / FACTS).is_file():
            continue
        try:
            packed = open_packed(folder)
            if packed.fingerprint != known.get("fingerprint"):
                continue
            verify(packed)
        except DataError as damaged:
            why = str(damaged).removesuffix("; delete it and pack again")  # which would not help
            tell(f"packed images of an earlier version: {why}", sys.stderr)
            continue
        images = _divided(packed, data)
        if images.facts() == known:
            tell(f"run {run.id}: with the images that an earlier version packed", sys.stderr)
            return images
    return None


def _former_folders(run: Run, data: Data, trusted: Sequence[str] | None) -> Iterator[Path]:
    """Where versions before format 2 packed a source: named after paths as they were typed."""
    data, there = private.restored(run, data), located(run, data, trusted)
    beside = run.directory.parent.parent.absolute()
    named = (data, there, *(_relative(there, to, trusted) for to in (beside, Path.cwd())))
    folders = (_folder_of(each, run.directory.parent) for each in named)
    yield from dict.fromkeys(folders)


def _relative(data: Data, to: Path, trusted: Sequence[str] | None) -> Data:
    """The same, with every place as a path relative to a folder."""
    places = {name: data.arguments.get(name) for name in place_keys(data, trusted)}
    found = {name: os.path.relpath(path, to) for name, path in places.items() if path}
    return data.model_copy(update=found)


def place_keys(data: Data, trusted: Sequence[str] | None = None) -> list[str]:
    """The arguments of a source that are folders or files, by the types of its function."""
    source = build.find("data", data.name, "data", trusted)
    parameters = inspect.signature(source).parameters
    return [name for name, parameter in parameters.items() if _is_path(parameter.annotation)]


def absolute(data: Data, trusted: Sequence[str] | None = None) -> Data:
    """The same, with every place as an absolute path: a run is used from other directories, too."""
    return _with_places(data, trusted, lambda path: [path])


def located(run: Run, data: Data, trusted: Sequence[str] | None = None) -> Data:
    """The same with absolute paths, also for a run that kept relative ones, and with its secrets.

    Relative ones were so to the directory that it was started in: that of its root, or this one.

    Raises:
        RunError: if a secret that the configuration masks is not kept with the run.
    """
    beside = run.directory.parent.parent
    return _with_places(private.restored(run, data), trusted, lambda path: [beside / path, path])


def split_places(
    data: Data, words: Sequence[str], trusted: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """Split typed words into those that set places of the images, and all others."""
    names = place_keys(data, trusted)
    keys = {*names, *(f"data.{name}" for name in names)}
    places: list[str] = []
    others: list[str] = []
    for word in joined(words):
        (places if word.partition("=")[0] in keys else others).append(word)
    return places, others


def relocate(run: Run, words: Sequence[str], trusted: Sequence[str] | None = None) -> None:
    """Set the places of a run's images anew (`data.path=FOLDER`), and keep them with the run.

    Raises:
        ConfigError: for anything else than a place.
        RunError: if other images are there, or the run is in use.
        DataError: if there are none.
    """
    before = checked(read_yaml(run.config))
    keys = [f"data.{name}" for name in place_keys(before.data, trusted)]
    tree = before.model_dump()
    set_values(tree, typed_values(words))
    config, old = checked(tree), leaves(before.model_dump())
    for key, value in leaves(config.model_dump()).items():
        if value != old.get(key) and key not in keys:
            raise ConfigError(
                f"{key}: of a run that is used, only the places of its images can be given "
                f"({', '.join(keys) or 'this source has none'})"
            )
    data = absolute(config.data, trusted)
    if data == before.data:
        return
    of_run(run, data, trusted)
    with locked(run):
        now = checked(read_yaml(run.config))
        if data != now.data:
            kept = now.model_copy(update={"data": data})
            private.write_config(run, kept)


def _with_places(
    data: Data, trusted: Sequence[str] | None, candidates: Callable[[Path], Sequence[Path]]
) -> Data:
    """Replace each place by the first of its candidates that is there, or the first of all."""
    found = {}
    for name in place_keys(data, trusted):
        if isinstance(given := data.arguments.get(name), str | Path):
            with suppress(RuntimeError):  # ~nobody, which the source refuses
                paths = [path.expanduser().absolute() for path in candidates(Path(given))]
                there = (path for path in paths if os.path.exists(path))
                found[name] = str(next(there, paths[0]))
    return data.model_copy(update=found)


def _is_path(annotation: Any) -> bool:
    return annotation is Path or Path in get_args(annotation)


def prepare(
    data: Data, root: Path, trusted: Sequence[str] | None = None, *, whole: bool = False
) -> Images:
    """Pack the images, or find them packed, and split off what is held out.

    A source's own validation part is held out; without one, a keyed fraction of the training part
    is. All that was packed is verified with `whole`, else some of it.

    Raises:
        DataError: if the images are missing, broken, or too few.
    """
    return _divided(pack_as(data, root, trusted, whole=whole), data)


def _divided(packed: Packed, data: Data) -> Images:
    train = packed.part("train")
    if own := packed.parts.get("validation"):
        rows, (_, held_out) = np.arange(len(train.images)), split(len(own.images), 1.0)
        part: Part | None = own
    else:
        rows, held_out = split(len(train.images), data.validation_fraction)
        part = train if len(held_out) else None
    if not len(rows):
        raise DataError(f"there is no image to train on in {packed.folder}")
    names = packed.class_names if data.use_labels and train.labels is not None else ()
    return Images(packed, rows, part, held_out, names)


def pack_as(
    data: Data,
    root: Path,
    trusted: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    whole: bool = False,
    again: bool = False,
) -> Packed:
    """Pack a source as the configuration says, below `root` in a folder named after how.

    With `whole` all that was packed before is verified, with `again` it is packed anew.
    """
    data = absolute(data, trusted)
    source = source_of(data, trusted)
    settings = data.model_dump(include={"image_size", "channels", "fit"})
    folder = out or packed_folder(data, root, trusted)
    packed = pack(source, folder, **settings, whole=whole, again=again)
    if whole and data.verify and (others := differing(source, packed)):
        told = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if others[3:] else "")
        tell(f"{told}: replaced since they were packed; packing again", sys.stderr)
        return pack(source, folder, **settings, again=True)
    return packed


def packed_folder(data: Data, root: Path, trusted: Sequence[str] | None = None) -> Path:
    """Where `pack_as` packs a source; each format has a folder of its own."""
    return _folder_of(absolute(data, trusted), root, pack_format=FORMAT)


def _folder_of(data: Data, root: Path, **more: int) -> Path:
    settings = data.model_dump(include={"image_size", "channels", "fit"}) | more
    key = json.dumps({**data.source.model_dump(mode="json"), **settings}, sort_keys=True)
    return root / "packed" / f"{data.name.rpartition('.')[2]}-{_short_digest(key)}"


@dataclass(frozen=True)
class Verified:
    """What `verified` found: a sentence, and the images whose files have other pixels now."""

    told: str
    differing: tuple[str, ...] = ()
    is_whole: bool = False


def verified(data: Data | None, folder: Path) -> Verified:
    """Verify all that was packed, and with `data` decode its images again and compare them.

    Raises:
        DataError: if nothing was packed there, or the images are missing.
    """
    try:
        packed = open_packed(folder)
        verify(packed)
    except DataError as damaged:
        if (folder / FACTS).is_file():
            return Verified(str(damaged))
        raise
    count = sum(len(part.images) for part in packed.parts.values())
    if data is None:
        return Verified(f"{count:,} packed images are whole: {folder}", is_whole=True)
    if others := differing(source_of(data), packed):
        return Verified(f"{len(others):,} images are not those in {folder}:", tuple(others))
    return Verified(
        f"{count:,} images are whole, and those of their files: {folder}", is_whole=True
    )


def source_of(data: Data, trusted: Sequence[str] | None = None) -> AnySource:
    """The images that a configuration names, listed and not yet decoded.

    Raises:
        DataError: if they are missing, or not what the source reads.
    """
    source: AnySource = build.bind("data", data.source, "data", trusted)()
    return source


def describe(packed: Packed, left_out: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What is in a packed data set, with pixel statistics and what was left out, as plain data."""
    parts = {}
    for name, part in packed.parts.items():
        told: dict[str, Any] = {"images": len(part.images)}
        if part.labels is not None:
            counts = np.bincount(part.labels, minlength=len(packed.class_names)).tolist()
            told["per class"] = dict(zip(packed.class_names, counts, strict=True))
        parts[name] = told
    pixels = packed.part("train").images
    some = pixels[:: max(1, len(pixels) // 10_000)] / 255  # ten thousand images tell enough
    return {
        "folder": str(packed.folder),
        "image size": packed.image_size,
        "channels": packed.channels,
        "parts": parts,
        "left out": {name: counted(counts) for name, counts in left_out.items() if counts},
        "skipped": {name: facts["skipped"] for name, facts in packed.facts["parts"].items()},
        "mean": some.mean(axis=(0, 2, 3)).round(4).tolist(),
        "std": some.std(axis=(0, 2, 3)).round(4).tolist(),
        "fingerprint": packed.fingerprint,
    }


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
