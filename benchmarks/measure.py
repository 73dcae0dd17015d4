"""Times of several ways to do one piece of work, in turns, so that all meet the same noise."""

import multiprocessing
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], None]


@dataclass(frozen=True)
class Times:
    """Seconds that one way took, round by round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Way:
    """A function that makes the work, and what it is given; both are sent to a process."""

    make: Callable[..., Work]
    given: tuple[Any, ...]
    compiled: bool | None = None

    def made(self) -> Work:
        """The work, ready to be done."""
        named = {} if self.compiled is None else {"compiled": self.compiled}
        return self.make(*self.given, **named)


def alternate(
    ways: Mapping[str, Way], device: torch.device, rounds: int, warm_up: int = 2
) -> tuple[dict[str, Times], dict[str, str]]:
    """Do every way's work in turn, `rounds` times after `warm_up` untimed ones, timing each.

    Each way lives in a process of its own, where nothing of the others, such as the state of the
    allocator, is in its way; only one of them works at a time. Returned are the times, and why the
    others could not be made.
    """
    context = multiprocessing.get_context("spawn")
    lines, failed = {}, {}
    for name, way in ways.items():
        line, theirs = context.Pipe()
        given = (theirs, way, str(device), torch.get_num_threads())
        context.Process(target=_serve, args=given, daemon=True).start()
        if why := line.recv():
            failed[name] = why
        else:
            lines[name] = line
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for turn in range(-warm_up, rounds):
        for name, line in lines.items():
            line.send(True)
            taken = line.recv()
            if turn >= 0:
                seconds[name].append(taken)
    for line in lines.values():
        line.send(False)
    return {name: Times(taken) for name, taken in seconds.items()}, failed


def _serve(line: Connection, way: Way, device: str, threads: int) -> None:
    warnings.filterwarnings("ignore")  # the peers'
    torch.set_num_threads(threads)
    try:
        work = way.made()
        work()
    except (ImportError, RuntimeError) as failed:
        line.send(str(failed).splitlines()[0][:120] or type(failed).__name__)
        return
    line.send(None)
    while line.recv():
        start = time.perf_counter()
        work()
        finish(torch.device(device))
        line.send(time.perf_counter() - start)


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in ("torch", "diffusers", "denoising-diffusion-pytorch", "torchvision"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    """The name of the processor and whether it multiplies bfloat16 by itself."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    named = {line.split(":")[0].strip(): line.split(":", 1)[1] for line in lines if ":" in line}
    flags = set(named.get("flags", "").split())
    units = [unit for unit in ("avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    name = named.get("model name", platform.processor()).strip()
    return " ".join([name, *units])
