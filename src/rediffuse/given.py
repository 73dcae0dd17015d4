"""Images that are given to be judged, ours or anybody's: a folder, a sampling job, a packed set.

All go through the decoder and the packing that training data goes through, so that both sides of a
comparison are read in the same way. They are kept in `<root>/evaluation/images`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rediffuse.data.decoding import header
from rediffuse.data.packing import FACTS, Packed, open_packed, pack
from rediffuse.data.sources import Source, identity_of
from rediffuse.data.sources.folder import Files, folder
from rediffuse.errors import DataError
from rediffuse.evaluation.card import digest_of
from rediffuse.reading import read_object
from rediffuse.references import Real, home, whole

_MANIFEST, _MANIFEST_BYTES = "manifest.json", 2_000_000_000
_GREY = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N"}


@dataclass(frozen=True)
class Side:
    """One side of a comparison as it was given, and what its files say before they are decoded.

    `sizes` has the first image of each width and height.
    """

    word: str
    part: str | None
    found: Source | Packed
    sizes: dict[tuple[int, int], str]
    channels: int
    formats: tuple[str, ...]


def pair(
    root: Path, images: str, reference: str, size: int | None, tell: Callable[[str], None]
) -> tuple[Real, dict[str, Real]]:
    """The images under judgement, and what they are held against, first, with its other parts.

    Either is a folder of images, the folder of a sampling job, or a packed data set, whose part may
    be named after a colon. Images of different sizes need a `size` that all are brought to.

    Raises:
        DataError: if one is missing, empty or broken, or cannot be compared with the other.
    """
    sides = [_side(word) for word in (images, reference)]
    wanted, channels = _size(sides, size), max(side.channels for side in sides)
    for side in sides:
        if "JPEG" in side.formats:
            tell(f"{side.word}: JPEG files; what compression did to them is in every figure")
    judged, real = (_real(root, side, wanted, channels) for side in sides)
    parts = {sides[1].part or "train": real}
    if isinstance(found := sides[1].found, Packed):
        parts |= {name: whole(found, name) for name in found.parts if name not in parts}
    return judged, parts


def _side(word: str) -> Side:
    """Find out what a word names, by what lies there."""
    path, part = _path_and_part(word)
    if (path / FACTS).is_file():
        found = open_packed(path)
        sizes = {(found.image_size, found.image_size): "packed images"}
        which = part or "train"
        found.part(which)
        return Side(word, which, found, sizes, found.channels, ())
    if part:
        raise DataError(f"{word}: only a packed data set has parts; {path} is a folder of files")
    source = _job(path) if (path / _MANIFEST).is_file() else folder(path=path)
    files = source.parts["train"]
    assert isinstance(files, Files)
    return Side(word, None, source, *_headers(files))


def _path_and_part(word: str) -> tuple[Path, str | None]:
    """The folder that a word names, and what follows a colon behind it."""
    name, _, part = word.rpartition(":")
    try:
        for text, rest in ((word, None), (name, part)):
            if text and (path := Path(text).expanduser()).is_dir():
                return path, rest
    except (OSError, RuntimeError, ValueError):  # a loop of links, ~nobody, a NUL
        pass
    raise DataError(f"{word[:200]!r}: there is no such folder of images or packed data set")


def _job(path: Path) -> Source:
    """The images of a sampling job, which knows their classes; its grid and film are none.

    Raises:
        DataError: if the manifest is not one, or an image that it names is missing.
    """
    try:
        told = read_object(path / _MANIFEST, _MANIFEST_BYTES)["images"]
        pairs = [(str(image["file"]), image["class"]) for image in told]
    except (OSError, ValueError, KeyError, TypeError) as broken:
        raise DataError(f"{path / _MANIFEST} is no manifest of a sampling job ({broken})") from None
    if any(Path(file).name != file for file, _ in pairs) or not pairs:
        raise DataError(f"{path / _MANIFEST} names no images, or images elsewhere")
    classes = tuple(sorted({str(c) for _, c in pairs})) if all(c for _, c in pairs) else ()
    names = tuple((file, classes.index(str(c)) if classes else None) for file, c in pairs)
    identity = identity_of(((file, path / file) for file, _ in pairs), *classes)
    return Source(classes, {"train": Files(path, names, False)}, identity)


def _headers(files: Files) -> tuple[dict[tuple[int, int], str], int, tuple[str, ...]]:
    sizes: dict[tuple[int, int], str] = {}
    formats, modes = set(), set()
    for name, _ in files.names:
        try:
            image = header(files.root / name)
        except DataError as reason:
            raise DataError(f"{files.root / name} cannot be used: {reason}") from None
        sizes.setdefault(image.size, name)
        formats.add(image.format)
        modes.add(image.mode)
    return sizes, 1 if modes <= _GREY else 3, tuple(sorted(formats))


def _size(sides: list[Side], asked: int | None) -> int:
    """The one size that both sides have, or are brought to."""
    named = ((side.word.rstrip("/"), side.sizes) for side in sides)
    sizes = {size: f"{word}/{name}" for word, found in named for size, name in found.items()}
    for side in sides:
        if isinstance(side.found, Packed) and asked not in (None, side.found.image_size):
            raise DataError(
                f"{side.word} is packed at {side.found.image_size} pixels; --size {asked} would "
                "change it: pack it anew with data.image_size"
            )
    if asked is not None:
        return asked
    (width, height), *others = sizes
    if others or width != height:
        told = ", ".join(f"{name} has {w}x{h}" for (w, h), name in list(sizes.items())[:3])
        raise DataError(
            f"the images are not squares of one size ({told}); --size N brings all to N pixels, "
            "which changes what is compared"
        )
    return width


def _real(root: Path, side: Side, size: int, channels: int) -> Real:
    if isinstance(side.found, Packed):
        if side.channels != channels:
            raise DataError(
                f"{side.word} has {side.channels} channels, and the other side {channels}; pack it "
                f"anew with data.channels={channels}"
            )
        return whole(side.found, side.part or "train")
    name = Path(side.word).expanduser().resolve().name[:40]
    digest = digest_of([side.found.identity, side.word, size, channels])
    place = home(root) / "images" / f"{name}-{digest}"
    packed = pack(side.found, place, image_size=size, channels=channels)
    resized = [f"{w}x{h}" for w, h in side.sizes if (w, h) != (size, size)][:8]
    return whole(packed, "train", {"formats": list(side.formats), "resized": resized})
