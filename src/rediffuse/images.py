"""From a configuration to packed images, and which of them are for what."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from rediffuse import build, drift
from rediffuse.config.schema import Data
from rediffuse.data.packing import Packed, Part, pack
from rediffuse.data.sources import AnySource
from rediffuse.data.splits import split
from rediffuse.errors import RunError
from rediffuse.runs import Run

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

    All that was packed is verified with `whole`, else some of it.

    Raises:
        RunError: if they are others now.
        DataError: if they are missing, broken, or too few.
    """
    images = prepare(data, run.directory.parent, trusted, whole=whole)
    known, found = drift.began(run).get("data"), images.facts()
    if known != found:
        before = known if isinstance(known, dict) else {}
        differing = [key for key, value in found.items() if before.get(key) != value]
        raise RunError(
            f"the images are not those that run {run.id} was trained on ({', '.join(differing)} "
            "changed); restore them, or start a new run with parent_run_id"
        )
    return images


def prepare(
    data: Data, root: Path, trusted: Sequence[str] | None = None, *, whole: bool = False
) -> Images:
    """Pack the images, or find them packed, and split off what is held out.

    A source's own validation part is held out; without one, a keyed fraction of the training part
    is. All that was packed is verified with `whole`, else some of it.

    Raises:
        DataError: if the images are missing, broken, or too few.
    """
    packed = pack_as(data, root, trusted, whole=whole)
    train = packed.part("train")
    if own := packed.parts.get("validation"):
        rows, (_, held_out) = np.arange(len(train.images)), split(len(own.images), 1.0)
        part: Part | None = own
    else:
        rows, held_out = split(len(train.images), data.validation_fraction)
        part = train if len(held_out) else None
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
    source = source_of(data, trusted)
    settings = data.model_dump(include={"image_size", "channels", "fit"})
    key = json.dumps({**data.source.model_dump(mode="json"), **settings}, sort_keys=True)
    folder = out or root / "packed" / f"{data.name.rpartition('.')[2]}-{_short_digest(key)}"
    return pack(source, folder, **settings, whole=whole, again=again)


def source_of(data: Data, trusted: Sequence[str] | None = None) -> AnySource:
    """The images that a configuration names, listed and not yet decoded.

    Raises:
        DataError: if they are missing, or not what the source reads.
    """
    source: AnySource = build.bind("data", data.source, "data", trusted)()
    return source


def describe(packed: Packed) -> dict[str, Any]:
    """Tell what is in a packed data set, pixel statistics included, as plain data."""
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
        "skipped": {name: facts["skipped"] for name, facts in packed.facts["parts"].items()},
        "mean": some.mean(axis=(0, 2, 3)).round(4).tolist(),
        "std": some.std(axis=(0, 2, 3)).round(4).tolist(),
        "fingerprint": packed.fingerprint,
    }


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
