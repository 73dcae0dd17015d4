"""What a step takes beside its forward and backward passes: `python -m benchmarks.overhead`.

Beside them are the optimizer, clipping, the average, sums for the metrics, the check for what is
not finite; and, now and then, the copy for a checkpoint. Steps are done in a row, and beside them
their forward and backward passes alone, in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import ours
from benchmarks.measure import finish
from benchmarks.sizes import SIZES
from rediffuse.training.checkpoint import snapshot
from rediffuse.training.step import accumulate, train_step


def main() -> None:
    """Train some steps and say where their time went."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--size", default="large", choices=list(SIZES))
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument("--batch", type=int, help="images of a step; else 128 and 16")
    parser.add_argument("--steps", type=int, default=4, help="in a row")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images-per-checkpoint", type=int, default=50_000)
    asked = parser.parse_args()
    device, size = torch.device(asked.device), SIZES[asked.size]
    if asked.batch:
        size = replace(size, batch_size=asked.batch)
    state, recipe, steps = ours.training(size, asked.precision, device, compiled=not asked.plain)

    def step() -> None:
        train_step(recipe, state, next(steps))

    def passes() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        accumulate(recipe, state, next(steps))

    taken: dict[Callable[[], None], list[float]] = {step: [], passes: []}
    for turn in range(asked.turns + 1):
        for work, seconds in taken.items():
            if turn == 0:
                _seconds(work, device, 4)  # the compiler, and what it records
            seconds.append(_seconds(work, device, asked.steps))
    whole, alone = (statistics.median(seconds[1:]) for seconds in taken.values())
    snapshot(state)  # the first one also takes memory
    copied = _seconds(lambda: snapshot(state), device, 1)
    per_step = copied * size.batch_size / asked.images_per_checkpoint
    print(f"{size.name}, {asked.precision}, batch {size.batch_size}: {whole:.4f} s a step")
    print(f"forward and backward, noise and loss: {alone:.4f} s")
    print(f"all else in a step: {(whole - alone) / whole:.1%}")
    print(f"copy for a checkpoint: {copied:.3f} s, {per_step / whole:.2%} of a step")
    print(f"together: {(whole - alone + per_step) / whole:.1%}")


def _seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one piece of work, when so many are done in a row."""
    finish(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    finish(device)
    return (time.perf_counter() - start) / times


if __name__ == "__main__":
    main()
