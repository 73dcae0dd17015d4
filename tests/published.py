"""Files in the format of MNIST and its kin (LeCun et al. 1998)."""

import gzip
import struct
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    header = b"\0\0\x08" + bytes([array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(
    place: Path, prefix: str, images: np.ndarray, labels: np.ndarray, *, compress: bool = False
) -> None:
    """Write images and labels of one part, as they are published."""
    place.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        data, name = idx(array), f"{prefix}-{kind}-ubyte"
        if compress:
            data, name = gzip.compress(data), f"{name}.gz"
        (place / name).write_bytes(data)
