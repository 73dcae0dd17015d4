"""Fashion-MNIST."""

from pathlib import Path

from rediffuse.data.published import MNIST_FILES, idx_source
from rediffuse.data.sources import LateSource

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def fashion_mnist(*, root: str | Path = "datasets") -> LateSource:
    """60,000 + 10,000 articles of 28x28 pixels (Xiao et al. 2017), in `<root>/FashionMNIST/raw`.

    Raises:
        DataError: if the files are missing and cannot be downloaded.
    """

    def download() -> object:
        from torchvision.datasets import FashionMNIST

        return FashionMNIST(root, download=True)

    return idx_source(Path(root, "FashionMNIST", "raw"), MNIST_FILES, CLASSES, download)
