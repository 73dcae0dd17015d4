"""Draw the same images with different solvers, side by side.

    uv run python examples/sampling.py RUN [PICTURE]

Image j depends on the seed and j alone, so each row shows what a solver makes of the same noise:
those of the probability-flow ODE nearly agree, and ancestral sampling goes its own way.
"""

import sys
from pathlib import Path

import numpy as np

import rediffuse
from rediffuse.pictures import grid, save_png

SOLVERS = [("heun", 100), ("ddim", 20), ("dpmpp_2m", 20), ("unipc", 10), ("ancestral", 100)]


def main(run: str, picture: str = "solvers.png") -> None:
    """One row of ten images for each solver."""
    model = rediffuse.load(run)
    rows = [rediffuse.sample(model, 10, solver=name, steps=steps) for name, steps in SOLVERS]
    for (name, steps), row in zip(SOLVERS, rows, strict=True):
        away = np.abs(row.astype(float) - rows[0]).mean()
        print(f"{name:10s} {steps:4d} steps  {away:5.1f} grey levels from the first row")
    print(save_png(grid(np.concatenate(rows), columns=10), Path(picture)))


if __name__ == "__main__":
    main(*sys.argv[1:])
