"""EMNIST."""

from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Literal

import numpy as np

from rediffuse.data.published import idx_source
from rediffuse.data.sources import LateSource

# Merging 15 lower-case letters with their capitals leaves 11 (Cohen et al. 2017, Sec. II).
CLASSES = {
    "byclass": digits + ascii_uppercase + ascii_lowercase,
    "bymerge": digits + ascii_uppercase + "abdefghnqrt",
    "balanced": digits + ascii_uppercase + "abdefghnqrt",
    "letters": ascii_lowercase,
    "digits": digits,
    "mnist": digits,
}


def emnist(
    *,
    root: str | Path = "datasets",
    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced",
) -> LateSource:
    """Handwritten letters and digits of 28x28 pixels (Cohen et al. 2017), in `<root>/EMNIST/raw`.

    Raises:
        DataError: if the files are missing and cannot be downloaded.
    """

    def download() -> object:
        from torchvision.datasets import EMNIST

        return EMNIST(root, split=split, download=True)

    def adapt(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn the files' columns into rows, and count letters, which start at 1, from 0."""
        return images.transpose(0, 2, 1), labels - (split == "letters")

    files = {
        part: (
            f"emnist-{split}-{part}-images-idx3-ubyte",
            f"emnist-{split}-{part}-labels-idx1-ubyte",
        )
        for part in ("train", "test")
    }
    return idx_source(Path(root, "EMNIST", "raw"), files, tuple(CLASSES[split]), download, adapt)
