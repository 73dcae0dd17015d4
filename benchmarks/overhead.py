"""What a step takes beside its forward and backward passes: `python -m benchmarks.overhead`.

Beside them are the optimizer, clipping, the average, sums for the metrics, the check for what is
not finite; and, now and then, the copy for a checkpoint.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks import ours
from benchmarks.measure import finish, watch
from benchmarks.sizes import SIZES
from rediffuse.data.batches import Batch
from rediffuse.training import step as stepping
from rediffuse.training.checkpoint import snapshot
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe


def main() -> None:
    """Train some steps and say where their time went."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--size", default="large", choices=list(SIZES))
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument("--batch", type=int, help="images of a step; else 128 and 16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images-per-checkpoint", type=int, default=50_000)
    asked = parser.parse_args()
    device, size = torch.device(asked.device), SIZES[asked.size]
    if asked.batch:
        size = replace(size, batch_size=asked.batch)
    made = ours.training(size, asked.precision, device, compiled=not asked.plain)
    measured = _one_by_one if device.type == "cpu" else _in_a_row
    step, passes = measured(*made, asked.steps)
    snapshot(made[0])  # the first one also takes memory
    start = time.perf_counter()
    snapshot(made[0])
    copied = time.perf_counter() - start
    per_step = copied * size.batch_size / asked.images_per_checkpoint
    print(f"{size.name}, {asked.precision}, batch {size.batch_size}: {step:.4f} s a step")
    print(f"forward and backward, noise and loss: {passes:.4f} s")
    print(f"all else in a step: {(step - passes) / step:.1%}")
    print(f"copy for a checkpoint: {copied:.3f} s, {per_step / step:.2%} of a step")
    print(f"together: {(step - passes + per_step) / step:.1%}")


def _one_by_one(
    state: TrainState, recipe: Recipe, steps: Iterator[list[Batch]], count: int
) -> tuple[float, float]:
    """Seconds of a step, and of the passes in it: medians, without the first two steps."""
    step, passes = (
        watch(stepping, name, time.perf_counter) for name in ("train_step", "accumulate")
    )
    for _ in range(count + 2):
        stepping.train_step(recipe, state, next(steps))
    return statistics.median(step[2:]), statistics.median(passes[2:])


def _in_a_row(
    state: TrainState, recipe: Recipe, steps: Iterator[list[Batch]], count: int
) -> tuple[float, float]:
    """The same where a device is told the next step meanwhile: steps in a row, passes in a row.

    In turns, of which the first compiles and does not count.
    """

    def step() -> None:
        stepping.train_step(recipe, state, next(steps))

    def passes() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        stepping.accumulate(recipe, state, next(steps))

    taken: dict[Callable[[], None], list[float]] = {step: [], passes: []}
    for _ in range(5):
        for work, seconds in taken.items():
            finish(recipe.devices.device)
            start = time.perf_counter()
            for _ in range(count):
                work()
            finish(recipe.devices.device)
            seconds.append((time.perf_counter() - start) / count)
    whole, alone = (statistics.median(seconds[1:]) for seconds in taken.values())
    return whole, alone


if __name__ == "__main__":
    main()
