"""What a step takes beside its forward and backward passes: `python -m benchmarks.overhead`.

Beside them are the optimizer, clipping, the average, sums for the metrics, the check for what is
not finite; and, now and then, the copy for a checkpoint and a row for the trackers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import ours
from benchmarks.measure import finish
from benchmarks.sizes import SIZES
from rediffuse.training import step as stepping
from rediffuse.training.checkpoint import snapshot
from rediffuse.training.devices import keep_freed_memory


def main() -> None:
    """Train some steps and say where their time went."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--size", default="large", choices=list(SIZES))
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images-per-checkpoint", type=int, default=50_000)
    asked = parser.parse_args()
    device, size = torch.device(asked.device), SIZES[asked.size]
    keep_freed_memory()
    state, recipe, steps = ours.training(size, asked.precision, device, compiled=not asked.plain)
    passes = _Stopwatch(stepping.accumulate, device)
    stepping.accumulate = passes  # type: ignore[assignment]
    whole = []
    for _ in range(asked.steps + 2):
        finish(device)
        start = time.perf_counter()
        batches = next(steps)
        stepping.train_step(recipe, state, batches)
        finish(device)
        whole.append(time.perf_counter() - start)
    step, inner = (statistics.median(times[2:]) for times in (whole, passes.seconds))
    start = time.perf_counter()
    snapshot(state)
    copied = time.perf_counter() - start
    per_step = copied * size.batch_size / asked.images_per_checkpoint
    print(f"{size.name}, {asked.precision}, batch {size.batch_size}: {step:.3f} s a step")
    print(f"forward and backward, noise and loss: {inner:.3f} s")
    print(f"all else in a step: {(step - inner) / step:.1%}")
    print(f"copy for a checkpoint: {copied:.3f} s, {per_step / step:.2%} of a step")
    print(f"together: {(step - inner + per_step) / step:.1%}")


@dataclass
class _Stopwatch:
    """A function, and how long each of its calls took."""

    function: Callable[..., Any]
    device: torch.device
    seconds: list[float] = field(default_factory=list)

    def __call__(self, *given: Any) -> Any:
        start = time.perf_counter()
        answer = self.function(*given)
        finish(self.device)
        self.seconds.append(time.perf_counter() - start)
        return answer


if __name__ == "__main__":
    main()
