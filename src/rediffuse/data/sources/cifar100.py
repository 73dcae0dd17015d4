"""CIFAR-100."""

from pathlib import Path

from rediffuse.data.published import cifar_source
from rediffuse.data.sources import LateSource


def cifar100(*, root: str | Path = "datasets") -> LateSource:
    """50,000 + 10,000 photographs of 32x32 pixels in 100 classes (Krizhevsky 2009).

    They lie in `<root>/cifar-100-python`.

    Raises:
        DataError: if the files are missing and cannot be downloaded.
    """
    return cifar_source("CIFAR100", "cifar-100-python", root)
