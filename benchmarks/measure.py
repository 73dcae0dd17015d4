"""Times of several ways to do one piece of work, in turns, so that all meet the same noise."""

import multiprocessing
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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
    named: Mapping[str, Any] = field(default_factory=dict)

    def made(self) -> Work:
        """The work, ready to be done."""
        return self.make(*self.given, **self.named)


def alternate(
    ways: Mapping[str, Way], device: torch.device, rounds: int, warm_up: int = 2
) -> tuple[dict[str, Times], dict[str, str]]:
    """Do every way's work in turn, `rounds` times after `warm_up` untimed ones, timing each.

    Each way lives in a process of its own, where nothing of the others, such as the state of the
    allocator, is in its way; only one of them works at a time, once all are made. A GPU does
    several pieces of work before it is waited for, as training does: the next one is told
    meanwhile. Returned are the times of one piece, and why the others could not be made.
    """
    context = multiprocessing.get_context("spawn")
    lines, failed = {}, {}
    for name, way in ways.items():
        line, theirs = context.Pipe()
        given = (theirs, way, str(device), torch.get_num_threads())
        context.Process(target=_serve, args=given, daemon=True).start()
        lines[name] = line
        if device.type == "cpu" and (why := line.recv()):  # where making takes the machine's time
            failed[name] = why
    if device.type != "cpu":
        failed = {name: why for name, line in lines.items() if (why := line.recv())}
    lines = {name: line for name, line in lines.items() if name not in failed}
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
        torch.backends.cudnn.benchmark = False  # its search would meet the others' work
        _patiently(work)
    except (ImportError, RuntimeError) as failed:
        line.send(str(failed).splitlines()[0][:120] or type(failed).__name__)
        return
    pieces = 1 if device == "cpu" else PIECES
    finish(torch.device(device))
    line.send(None)
    while line.recv():
        start = time.perf_counter()
        for _ in range(pieces):
            work()
        finish(torch.device(device))
        line.send((time.perf_counter() - start) / pieces)
        if device != "cpu":
            torch.cuda.empty_cache()  # which the others may need


PIECES = 20
"""Of work that a GPU is told in a row."""


def _patiently(work: Work) -> None:
    """Do it once; while the others are made too, a GPU's memory may be short for a time."""
    for _ in range(60):
        with suppress(torch.OutOfMemoryError):
            return work()
        torch.cuda.empty_cache()
        time.sleep(2)
    return work()


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def watch(owner: Any, name: str, clock: Callable[[], float]) -> list[float]:
    """Have a function of a module or a class note how long each call takes."""
    function, taken = getattr(owner, name), list[float]()

    def timed(*given: Any, **named: Any) -> Any:
        start = clock()
        try:
            return function(*given, **named)
        finally:
            taken.append(clock() - start)

    setattr(owner, name, timed)
    return taken


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
