"""What images are held against: real ones, as a network saw them, looked at once and kept.

    <root>/evaluation/<digest>.safetensors      moments of all, vectors of the first ones
    <root>/evaluation/<digest>.json             what they depend on, and their SHA-256
    <root>/evaluation/classifier-<digest>/      the classifier of a data set

The digest is that of everything that the numbers depend on. What is damaged is made anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rediffuse import locks
from rediffuse.data.packing import Packed, Part
from rediffuse.data.splits import split
from rediffuse.errors import ConfigError, RunError
from rediffuse.evaluation.card import Facts, digest_of
from rediffuse.evaluation.classifier import (
    Classifier,
    enough,
    load_classifier,
    save_classifier,
    train_classifier,
)
from rediffuse.evaluation.digests import UNVERIFIED
from rediffuse.evaluation.features import Features, Seen
from rediffuse.evaluation.inception import find_weights, inception
from rediffuse.evaluation.local import local_features
from rediffuse.evaluation.measures import COLOUR, INCEPTION, Colours, Reference
from rediffuse.evaluation.moments import Moments, merge, moments
from rediffuse.images import Images
from rediffuse.progress import Progress
from rediffuse.reading import read_bytes, read_object
from rediffuse.tracking.jsonl import write_atomically

FORMAT = 1
"""Raised when what is kept changes, or is made in another way."""

Pixels = UInt8[np.ndarray, "_ channel height width"]

CHUNK = 64
"""Images that a network looks at at once: always so many, so that no figure depends on batches."""


@dataclass(frozen=True)
class Real:
    """Given images in a keyed order, so that the first are a fair sample; `what` names them."""

    what: str
    packed: Packed
    part: Part
    rows: Int64[np.ndarray, " rows"]
    read_from: Facts | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What these images are, whatever the machine and the folder."""
        rows = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()[:16]
        fingerprint = self.packed.fingerprint[:16]
        jpeg = (
            ", JPEG files among them" if "JPEG" in (self.read_from or {}).get("formats", ()) else ""
        )
        return {
            "told": f"{len(self):,} {self.what} images of {fingerprint[:8]}{jpeg}",
            "fingerprint": fingerprint,
            "what": self.what,
            "images": len(self),
            "rows": rows,
            **(self.read_from or {}),
        }

    @property
    def labels(self) -> Tensor | None:
        """The numbers of their classes, if they have any."""
        return None if self.part.labels is None else torch.from_numpy(self.part.labels[self.rows])

    def chunks(self, count: int | None = None) -> Iterator[Pixels]:
        """The first `count` of them, or all, a chunk at a time."""
        rows = self.rows[:count]
        for start in range(0, len(rows), CHUNK):
            yield self.part.images[rows[start : start + CHUNK]]

    def some(self, rows: slice | Int64[np.ndarray, " some"], what: str) -> "Real":
        """Some of them, under a name of their own."""
        return Real(what, self.packed, self.part, self.rows[rows], self.read_from)


def real_parts(images: Images) -> dict[str, Real]:
    """The images that a run saw, those it held out, and those that it was never near."""
    packed, train = images.packed, images.packed.part("train")
    parts = {"train": Real("train", packed, train, images.train_rows[_shuffled(images.per_epoch)])}
    if images.held_out is not None:
        parts["held-out"] = Real("held-out", packed, images.held_out, images.held_out_rows)
    if "test" in packed.parts:
        parts["test"] = whole(packed, "test")
    return parts


def whole(packed: Packed, part: str, read_from: Facts | None = None) -> Real:
    """All images of a part of a packed data set; `read_from` says of which files, for the card."""
    there = packed.part(part)
    return Real(part, packed, there, _shuffled(len(there.images)), read_from)


def _shuffled(count: int) -> Int64[np.ndarray, " rows"]:
    return split(count, 1.0)[1]


def looked_at(
    chunks: Iterable[Pixels], features: Features, done: Callable[[int], object] = lambda count: None
) -> Iterator[Seen]:
    """What a network says of each chunk; `done` is told how many images it saw."""
    count = 0
    for chunk in chunks:
        yield features(torch.from_numpy(chunk))
        done(count := count + len(chunk))


def joined(parts: Iterable[Seen]) -> Seen:
    """What a network said of chunks, as of one set of images."""
    features, logits, spatial = (_together(column) for column in zip(*parts, strict=True))
    assert features is not None
    return Seen(features, logits, spatial)


def _together(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def identity(features: Features) -> dict[str, Any]:
    """What a card says of a network."""
    return {"digest": features.digest, **features.facts}


def versions() -> dict[str, str]:
    """The packages that compute figures."""
    return {name: version(name) for name in ("rediffuse", "torch", "numpy", "scipy", "pillow")}


# Kept on the disk


def home(root: Path) -> Path:
    """Where everything is kept that belongs to a data set and not to a run."""
    return root / "evaluation"


def kept_or_made(
    file: Path, facts: Facts, make: Callable[[], Mapping[str, Tensor]], tell: Callable[[str], None]
) -> dict[str, Tensor]:
    """Read tensors that depend on `facts` alone, or make and keep them.

    Who wants the same at the same time waits. A file that is damaged, or was made from other facts,
    is made anew, with a word about it.

    Raises:
        ConfigError: if nothing can be written there.
    """
    facts = json.loads(json.dumps({"format": FORMAT, **facts}, allow_nan=False))
    with _alone_at(file):
        found = _kept(file, facts, tell)
        if found is None:
            found = {name: tensor.contiguous() for name, tensor in make().items()}
            _keep(file, facts, found)
    return dict(sorted(found.items()))  # as they were made, or as they are read: in one order


@contextmanager
def _alone_at(place: Path) -> Iterator[None]:
    """Hold the lock beside a file or folder that is made once."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold(place.with_name(f".{place.name}.lock")):
            yield
    except OSError as failed:
        raise ConfigError(
            f"{place.parent} cannot be written ({failed.strerror or failed}); name another --root"
        ) from failed


def _keep(file: Path, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    content = save_tensors(dict(tensors))
    beside = {"sha256": hashlib.sha256(content).hexdigest(), **facts}
    write_atomically(file.with_suffix(".safetensors"), content)
    write_atomically(file.with_suffix(".json"), json.dumps(beside, indent=1).encode())


def _kept(file: Path, facts: Facts, tell: Callable[[str], None]) -> dict[str, Tensor] | None:
    try:
        beside = read_object(file.with_suffix(".json"))
        tensors = file.with_suffix(".safetensors")
        content = read_bytes(tensors, tensors.stat().st_size)
        digest = beside.pop("sha256", None)
        if beside != facts:
            raise ValueError("it was made from something else")
        if digest != hashlib.sha256(content).hexdigest():
            raise ValueError("its SHA-256 differs")
        return dict(load_tensors(content))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, SafetensorError) as broken:
        tell(f"{file.name} in {file.parent} is damaged ({broken}); made anew")
        return None


def looked_up(root: Path, real: Real, features: Features, tell: Callable[[str], None]) -> Reference:
    """What a network sees in real images: as it was kept, or looked at now and kept."""
    facts = {
        "real": real.facts,
        "through": {"name": features.name, **identity(features)},
        "kept": KEPT,
        "versions": versions(),
    }

    def look() -> dict[str, Tensor]:
        if features.name != COLOUR:
            tell(f"looking at {len(real):,} {real.what} images through {features.name}")
        with Progress(len(real)) as bar:
            seen = looked_at(real.chunks(), features, bar.move)
            return _tensors(seen, 0 if features.name == COLOUR else KEPT)

    found = kept_or_made(home(root) / digest_of(facts), facts, look, tell)
    spatial = _moments(found, "spatial_") if "spatial_n" in found else None
    seen = Seen(found["features"], found.get("logits"))
    return Reference(_moments(found, ""), seen, spatial)


KEPT = 50_000
"""Vectors that are kept of a set of real images: for what compares images one by one."""


def _tensors(chunks: Iterator[Seen], most: int) -> dict[str, Tensor]:
    """Moments of all that was seen, and the vectors of the first images."""
    held: list[Seen] = []
    whole: Moments | None = None
    spatial: Moments | None = None
    for seen in chunks:
        whole = _added(whole, seen.features)
        spatial = spatial if seen.spatial is None else _added(spatial, seen.spatial)
        if whole.n - len(seen.features) < most:
            held.append(seen._replace(spatial=None))
    assert whole
    first = joined(held) if held else Seen(torch.empty(0, len(whole.mean)))
    found = {"features": first.features[:most], **_plain(whole, "")}
    if first.logits is not None:
        found["logits"] = first.logits[:most]
    return found if spatial is None else {**found, **_plain(spatial, "spatial_")}


def _added(so_far: Moments | None, vectors: Tensor) -> Moments:
    more = moments(vectors)
    return more if so_far is None else merge(so_far, more)


def _plain(of: Moments, prefix: str) -> dict[str, Tensor]:
    named = {"n": torch.tensor(of.n), "mean": of.mean, "covariance": of.covariance}
    return {f"{prefix}{name}": value for name, value in named.items()}


def _moments(found: Mapping[str, Tensor], prefix: str) -> Moments:
    n, mean, covariance = (found[f"{prefix}{name}"] for name in Moments._fields)
    return Moments(int(n), mean, covariance)


def networks(
    root: Path,
    train: Real,
    wanted: Sequence[str],
    device: torch.device,
    tell: Callable[[str], None],
) -> list[Features]:
    """The networks of these names: `classifier`, `inception`, or a local folder of weights.

    Without a name it is the classifier of the data. Colours are looked at in any case. Inception's
    weights lie in `<root>/evaluation/inception`.

    Raises:
        RediffuseError: for what is not there, with what to do about it.
    """
    made = [_network(root, train, name, device, tell) for name in wanted or ("classifier",)]
    names = [features.name for features in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two networks are called {twice[0]}; their figures would be, too")
    return [*made, Colours()]


def _network(
    root: Path, train: Real, name: str, device: torch.device, tell: Callable[[str], None]
) -> Features:
    if name == "classifier":
        return classifier_of(root, train, device, tell)
    if name == INCEPTION:
        return inception(find_weights(home(root) / INCEPTION), device)
    return local_features(Path(name).expanduser(), device)


def classifier_of(
    root: Path, train: Real, device: torch.device, tell: Callable[[str], None]
) -> Classifier:
    """The classifier of a data set, or of its quarter turns where it has no two classes.

    It is trained once, on as many images as 2 GB hold, and kept in
    `<root>/evaluation/classifier-<digest>/`; who wants the same at the same time waits.

    Raises:
        RediffuseError: if there are too few images, or it cannot be kept.
    """
    facts = {
        "format": FORMAT,
        "images_seen": CLASSIFIER_IMAGES,
        "real": train.facts,
        "device": device.type,
        "versions": versions(),
    }
    folder = home(root) / f"classifier-{digest_of(facts)}"
    classes, rows = len(train.packed.class_names), train.rows[: _most(train)]
    labels = None if train.part.labels is None or classes < 2 else train.part.labels[rows]
    with _alone_at(folder):
        with suppress(RunError):  # there is none yet, or it is damaged
            found = load_classifier(folder, device)
            if not found.verified:
                tell(f"{folder.name} is {UNVERIFIED}; delete {folder} to train it anew")
            return found
        tell(f"training a classifier on {len(rows):,} {train.what} images, once; it is kept")
        count = CLASSIFIER_IMAGES or enough(len(rows))
        with Progress(count, "images learned from") as bar:
            found = train_classifier(
                train.part.images[rows],
                labels,
                classes,
                0,
                images_seen=count,
                device=device,
                tell=bar.move,
            )
        folder.mkdir(exist_ok=True)
        save_classifier(found, folder)
    return found


def _most(train: Real) -> int:
    """How many images a classifier has room for; they are in a keyed order."""
    return max(5_000, _MOST_BYTES // train.part.images[0].nbytes)


_MOST_BYTES = 2_000_000_000

CLASSIFIER_IMAGES: int | None = None
"""How many images a classifier sees until it is taken as trained; None: as many as it likes."""
