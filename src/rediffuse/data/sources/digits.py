"""scikit-learn's own handwritten digits."""

import numpy as np

from rediffuse.data.sources import ArrayExamples, Contents, LateSource
from rediffuse.data.splits import split


def digits() -> LateSource:
    """1,797 real digits of 8x8 pixels, embedded in scikit-learn (Alpaydin & Kaynak 1998).

    A fixed fifth is the test part: scikit-learn ships none.
    """
    return LateSource("scikit-learn digits, a fifth for test", _read)


def _read() -> Contents:
    from sklearn.datasets import load_digits  # which takes a second or two

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)  # levels 0 .. 16
    rows = dict(zip(("train", "test"), split(len(images), 0.2), strict=True))
    return tuple("0123456789"), {
        part: ArrayExamples(images[at], bunch.target[at], part) for part, at in rows.items()
    }
