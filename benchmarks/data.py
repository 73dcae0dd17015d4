"""Packing and loading a folder of images, beside torchvision: `python -m benchmarks.data FOLDER`.

FOLDER has a folder per class. The peer is what tutorials do: ImageFolder, ToTensor, Normalize and a
DataLoader with two workers that decodes every image in every epoch.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import facts
from rediffuse.data.batches import Batches
from rediffuse.data.packing import pack
from rediffuse.data.sources.folder import folder

_BATCH = 128


def main() -> None:
    """Pack, load and compare, in turns; print medians in images a second."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    taken: dict[str, list[float]] = {"packing": [], "loading what is packed": [], "torchvision": []}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(asked.rounds):
            home = Path(place) / "packed"
            shutil.rmtree(home, ignore_errors=True)
            start = time.perf_counter()
            packed = pack(
                folder(path=asked.folder),
                home,
                image_size=asked.image_size,
                channels=3,
                progress=False,
            )
            images = packed.part("train").images
            taken["packing"].append(len(images) / (time.perf_counter() - start))
            taken["loading what is packed"].append(_loading(images))
            taken["torchvision"].append(_torchvision(asked.folder))
    medians = {name: statistics.median(rates) for name, rates in taken.items()}
    for name, rate in medians.items():
        print(f"{name}: {rate:,.0f} images/s, {rate / medians['torchvision']:.2f} x torchvision")
    if asked.out:
        told = {"facts": facts(torch.device("cpu")), "images": len(images), "images_per_s": taken}
        asked.out.write_text(json.dumps(told, indent=1) + "\n")


def _loading(images: np.ndarray) -> float:
    """Images a second of three epochs: gathered, flipped, in the model's range."""
    steps = Batches(images=images, seed=0, batch_size=_BATCH, flip=True, workers=1).since(0)
    next(steps)
    count = 3 * len(images) // _BATCH
    start = time.perf_counter()
    for _ in range(count):
        next(steps)
    return count * _BATCH / (time.perf_counter() - start)


def _torchvision(place: Path) -> float:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    change = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    images = ImageFolder(str(place), change)
    start = time.perf_counter()
    for _ in torch.utils.data.DataLoader(images, _BATCH, shuffle=True, num_workers=2):
        pass
    return len(images) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
