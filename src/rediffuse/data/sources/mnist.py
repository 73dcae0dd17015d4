"""MNIST."""

from pathlib import Path

from rediffuse.data.published import MNIST_FILES, idx_source
from rediffuse.data.sources import LateSource


def mnist(*, root: str | Path = "datasets") -> LateSource:
    """60,000 + 10,000 digits of 28x28 pixels (LeCun et al. 1998), in `<root>/MNIST/raw`.

    Raises:
        DataError: if the files are missing and cannot be downloaded.
    """

    def download() -> object:
        from torchvision.datasets import MNIST

        return MNIST(root, download=True)

    return idx_source(Path(root, "MNIST", "raw"), MNIST_FILES, tuple("0123456789"), download)
