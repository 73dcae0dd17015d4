"""How fast this machine can multiply at all: matrices and convolutions, in each precision."""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.measure import Times, finish


def peaks(device: torch.device, precision: torch.dtype, rounds: int = 9) -> dict[str, float]:
    """FLOP/s of a large matrix product and of the best of three 3x3 convolutions, forward."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=precision)
    batch = 32 if device.type == "cpu" else 512
    layouts = (torch.contiguous_format, torch.channels_last)
    ways: dict[str, Callable[[], object]] = {"matmul": partial(torch.mm, a, a)}
    flops = {"matmul": 2.0 * n**3}
    for channels, size in ((64, 28), (128, 32), (256, 16)):
        for layout in layouts:
            x = torch.randn(batch, channels, size, size, device=device, dtype=precision)
            w = torch.randn(channels, channels, 3, 3, device=device, dtype=precision)
            x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
            name = f"conv {channels} {size} {layout}"
            ways[name] = partial(F.conv2d, x, w, padding=1)
            flops[name] = 2.0 * batch * size**2 * channels**2 * 9
    with torch.inference_mode():
        rates = {name: flops[name] / _median(work, device, rounds) for name, work in ways.items()}
    return {
        "matmul": rates["matmul"],
        "conv": max(rate for name, rate in rates.items() if name != "matmul"),
    }


def _median(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    taken = []
    for _ in range(rounds + 2):
        finish(device)
        start = time.perf_counter()
        work()
        finish(device)
        taken.append(time.perf_counter() - start)
    return Times(taken[2:]).median
