"""CIFAR-10."""

from pathlib import Path

from rediffuse.data.published import cifar_source
from rediffuse.data.sources import LateSource


def cifar10(*, root: str | Path = "datasets") -> LateSource:
    """50,000 + 10,000 photographs of 32x32 pixels in 10 classes (Krizhevsky 2009).

    They lie in `<root>/cifar-10-batches-py`.

    Raises:
        DataError: if the files are missing and cannot be downloaded.
    """
    return cifar_source("CIFAR10", "cifar-10-batches-py", root)
