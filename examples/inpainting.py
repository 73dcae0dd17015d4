"""Hide half of an image and paint it anew, several times.

    uv run python examples/inpainting.py RUN [PICTURE]

RePaint (Lugmayr et al. 2022) goes back and forth so that both halves agree; what was given stays
as it was, pixel for pixel.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import rediffuse
from rediffuse.data.pixels import to_model
from rediffuse.drawing import painted
from rediffuse.pictures import grid, save_png


def main(run: str, picture: str = "inpainting.png") -> None:
    """The first column is the original, the others are painted."""
    model = rediffuse.load(run)
    data = model.config.data
    originals = rediffuse.sample(model, 4)
    mask = torch.ones(1, 1, data.image_size, data.image_size)
    mask[..., data.image_size // 2 :] = 0  # 1 is known
    rows = []
    for original in originals:
        known = to_model(torch.from_numpy(original[None]), data.mean, data.std)
        way = painted(known, mask, resamplings=5, jump=2)
        rows += [original[None], rediffuse.sample(model, 7, way=way)]
    images = np.concatenate(rows)
    print(save_png(grid(images, columns=8), Path(picture)))


if __name__ == "__main__":
    main(*sys.argv[1:])
