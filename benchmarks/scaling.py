"""How time and memory grow: `python -m benchmarks.scaling --out FOLDER`.

With the batch, the resolution and the blocks of a level, for the small U-Net; with the number of
images, for the epoch's order.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ours
from benchmarks.measure import facts, finish
from benchmarks.sizes import SMALL, Size
from rediffuse.data.batches import Batch
from rediffuse.randomness import order
from rediffuse.training import memory
from rediffuse.training.devices import keep_freed_memory
from rediffuse.training.step import train_step

Row = dict[str, Any]

BATCHES = 1, 4, 16, 64, 256
RESOLUTIONS = 16, 32, 64, 128
BLOCKS = 1, 2, 4, 8
IMAGES = 10**3, 10**4, 10**5, 10**6, 10**7


def main() -> None:
    """Measure, write scaling.json and scaling.png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    keep_freed_memory()
    small = replace(SMALL, image_size=32, batch_size=16)
    grown = {
        "batch": [(n, replace(small, batch_size=n)) for n in BATCHES],
        "resolution": [(n, replace(small, image_size=n)) for n in RESOLUTIONS],
        "blocks": [(n, replace(small, blocks=n)) for n in BLOCKS],
    }
    rows = [
        {"grows": what, "to": to, **_step(size, asked.precision, device)}
        for what, sizes in grown.items()
        for to, size in sizes
    ]
    rows += list(_orders())
    told = {"facts": facts(device), "precision": asked.precision, "rows": rows}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "scaling.json").write_text(json.dumps(told, indent=1) + "\n")
    _plot(rows, asked.out / "scaling.png")
    for row in rows:
        print(
            ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )


def _step(size: Size, precision: str, device: torch.device, steps: int = 4) -> Row:
    """Seconds and megabytes of a training step, by the clock and by the estimate."""
    memory.give_back()
    before = memory.resident(device)
    state, recipe, batches = ours.training(size, precision, device)
    some: Batch = next(batches)[0]
    two = Batch(some.index[:2], some.x_0[:2], None)
    wanted = memory.estimated(state, recipe, two)
    memory.forget_peak(device)
    taken = []
    for _ in range(steps):
        finish(device)
        start = time.perf_counter()
        train_step(recipe, state, next(batches))
        finish(device)
        taken.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(taken[1:]),
        "estimated_MB": wanted.total(size.batch_size) / 1e6,
        "measured_MB": (memory.peak(device) - before) / 1e6,
    }


def _orders() -> Iterable[Row]:
    """The order of 16,384 images of ever larger epochs: it should not depend on their size."""
    index = torch.arange(16_384)
    for images in IMAGES:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            order(index, images, 0)
            taken.append(time.perf_counter() - start)
        yield {"grows": "images in an epoch", "to": images, "seconds": statistics.median(taken)}


def _plot(rows: list[Row], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["grows"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.2), layout="constrained")
    for axis, kind in zip(axes, kinds, strict=True):
        some = [row for row in rows if row["grows"] == kind]
        at = [row["to"] for row in some]
        axis.loglog(at, [row["seconds"] for row in some], "o-", label="seconds a step")
        if "measured_MB" in some[0]:
            axis.loglog(at, [row["measured_MB"] / 1e3 for row in some], "s--", label="GB, measured")
            axis.loglog(
                at, [row["estimated_MB"] / 1e3 for row in some], "x:", label="GB, estimated"
            )
        axis.set_xlabel(kind)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
