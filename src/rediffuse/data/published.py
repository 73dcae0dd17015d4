"""Data sets that torchvision knows how to download."""

import gzip
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rediffuse.data.sources import ArrayExamples, Contents, LateSource, identity_of
from rediffuse.errors import DataError

MAX_IDX_BYTES = 2**30
"""The largest published file, EMNIST's 731,668 letters and digits, unpacks to 0.57e9."""

MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx_source(
    folder: Path,
    files: Mapping[str, tuple[str, str]],
    class_names: tuple[str, ...],
    download: Callable[[], object],
    adapt: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda x, y: (x, y),
) -> LateSource:
    """Parts of images and labels in the IDX format of LeCun et al. 1998, plain or gzipped.

    They are downloaded if there are none to train on; a part other than "train" may be missing.

    Raises:
        DataError: if the files are missing and cannot be downloaded; on reading, if they are
            damaged.
    """
    folder = folder.expanduser()  # as torchvision does
    if not _all_found(folder, files["train"]):
        _fetch(download, folder, [name for pair in files.values() for name in pair])
    found = {part: paths for part, pair in files.items() if (paths := _all_found(folder, pair))}
    used = [(path.name, path) for paths in found.values() for path in paths]

    def read() -> Contents:
        return class_names, {
            part: ArrayExamples(*adapt(*_images_and_labels(*paths)), part)
            for part, paths in found.items()
        }

    return LateSource(identity_of(used, *class_names), read)


def cifar_source(name: str, base_folder: str, root: str | Path) -> LateSource:
    """CIFAR-10 or -100 (Krizhevsky 2009) through torchvision's class of this name.

    Their files are pickles, which can hold code; torchvision opens only those of the published MD5.

    Raises:
        DataError: if the files are missing and cannot be downloaded; on reading, if some are
            missing or damaged.
    """
    folder = Path(root).expanduser() / base_folder

    def read() -> Contents:
        data_set, files = _torchvisions(name)
        try:
            both = {part: data_set(root, train=part == "train") for part in ("train", "test")}
        except RuntimeError:
            raise DataError(
                f"{folder} lacks files, or they are damaged; delete it to get it anew, or put "
                f"{', '.join(files)} into it"
            ) from None
        return tuple(both["train"].classes), {
            part: ArrayExamples(found.data, np.asarray(found.targets), part)
            for part, found in both.items()
        }

    if not folder.is_dir():
        data_set, files = _torchvisions(name)
        _fetch(lambda: data_set(root, download=True), folder, files)
    there = [(path.name, path) for path in sorted(folder.iterdir())]
    return LateSource(identity_of(there), read)


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes.

    Raises:
        DataError: if it is damaged or of another kind.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            raw = stream.read(MAX_IDX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as broken:
        raise DataError(f"{path} cannot be read ({broken}); delete it to get it anew") from None
    if len(raw) > MAX_IDX_BYTES:
        raise DataError(f"{path} holds more than {MAX_IDX_BYTES:,} bytes; delete it to get it anew")
    start = 4 + 4 * raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    if not 4 < start <= len(raw):
        raise DataError(f"{path} is not an IDX file of bytes; delete it to get it anew")
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{path} has {len(raw) - start} bytes of data where its header says "
            f"{math.prod(shape)}; delete it to get it anew"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _torchvisions(name: str) -> tuple[Any, list[str]]:
    """torchvision's class of a CIFAR, whose import takes seconds, and the files it reads."""
    import torchvision.datasets

    data_set = getattr(torchvision.datasets, name)
    listed = (*data_set.train_list, *data_set.test_list)
    return data_set, [*(file for file, _ in listed), data_set.meta["filename"]]


def _images_and_labels(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or classes.shape != pixels.shape[:1] or 0 in pixels.shape[1:]:
        raise DataError(f"{images} has shape {pixels.shape}, but {labels} has {classes.shape}")
    return pixels, classes


def _all_found(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of these names, plain or gzipped; none unless all are there."""
    found = [
        next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        for name in names
    ]
    return [path for path in found if path] if all(found) else []


def _fetch(download: Callable[[], object], folder: Path, names: Sequence[str]) -> None:
    try:
        download()
    except (OSError, RuntimeError, EOFError) as failed:
        raise DataError(
            f"{folder} lacks files, and they cannot be downloaded "
            f"({' '.join(str(failed).split())[:200]}); put {', '.join(names)} into it, or set "
            "data.root to where they are"
        ) from failed
