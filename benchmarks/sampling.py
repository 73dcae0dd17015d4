"""Seconds of the same images by several solvers: `python -m benchmarks.sampling ID`.

All ways draw in turns, from the same noise, with a run's averaged weights. Printed are medians
without the first turn, and how many times less than the last way each takes.
"""

import argparse
import statistics
import time
from pathlib import Path

from rediffuse.drawing import Job, classes_for, draw
from rediffuse.gallery import Options, wanted
from rediffuse.models import load


def main() -> None:
    """Draw, and tell how long each way took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("run", help="an id, or the beginning of one")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--ways", default="dpmpp_2m@15,unipc@10,ancestral@1000")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    asked = parser.parse_args()
    model = load(asked.run, root=asked.root)
    numbers = tuple(range(asked.n))
    job = Job(numbers, classes_for(numbers, model.class_names))
    taken: dict[str, list[float]] = {way: [] for way in asked.ways.split(",")}
    for _ in range(asked.turns):
        for way, seconds in taken.items():
            solver, _, steps = way.partition("@")
            how = wanted(model.config.sampling, Options(solver=solver, steps=int(steps)))
            begun = time.perf_counter()
            for _ in draw(model, how, job):
                pass  # on the CPU, as bytes
            seconds.append(time.perf_counter() - begun)
    medians = {way: statistics.median(seconds[1:]) for way, seconds in taken.items()}
    *_, slowest = medians.values()
    for way, median in medians.items():
        told = ", ".join(f"{s:.2f}" for s in taken[way])
        print(f"{way:<20} {median:8.2f} s  {slowest / median:6.1f} times  ({told})")


if __name__ == "__main__":
    main()
