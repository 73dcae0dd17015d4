"""Turn guidance up: more typical images, fewer different ones.

    uv run python examples/guidance.py RUN [PICTURE]

Scale 0 ignores the class, 1 is the model as it was trained, above 1 the class is exaggerated
(Ho & Salimans 2022; their w is the scale less 1).
"""

import sys
from pathlib import Path

import numpy as np

import rediffuse
from rediffuse.pictures import grid, save_png

SCALES = (0, 1, 2, 4)


def main(run: str, picture: str = "guidance.png") -> None:
    """One row per scale, one column per class, the same noise in every column."""
    model = rediffuse.load(run)
    count = len(model.class_names)
    rows = [rediffuse.sample(model, count, guidance=scale) for scale in SCALES]
    for scale, row in zip(SCALES, rows, strict=True):
        print(f"scale {scale}: contrast {row.astype(float).std():.1f} grey levels")
    print(save_png(grid(np.concatenate(rows), columns=count), Path(picture)))


if __name__ == "__main__":
    main(*sys.argv[1:])
