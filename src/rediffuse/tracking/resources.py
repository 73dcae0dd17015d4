"""What a run takes of its machine: `system/...` beside the metrics, for every tracker.

Nothing watches in between, and nothing waits for a GPU: now and then, when metrics are written
anyway, the machine is asked. What a GPU is doing, NVIDIA's library tells where it is installed.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

LOOK_EVERY_S = 10.0
PREFIX = "system/"
_GB = 1e9

Item = TypeVar("Item")
Found = dict[str, float]


class Waiting(Generic[Item]):
    """An iterator that counts the seconds for which others waited for it."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items, self.seconds = items, 0.0

    def __iter__(self) -> "Waiting[Item]":
        return self

    def __next__(self) -> Item:
        began = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.seconds += time.monotonic() - began


class Resources:
    """Looks at the machine, at most once in `LOOK_EVERY_S`.

    `directory` is on the disk that matters; `device` is a torch device; `waiting` counts the wait
    for data.
    """

    def __init__(self, directory: Path, device: Any, waiting: Waiting[Any]) -> None:
        self._directory, self._device, self._waiting = directory, device, waiting
        self._process, self._looked = psutil.Process(), False
        self._last, self._waited = time.monotonic(), waiting.seconds
        self._cpu()  # from here on

    def __call__(self) -> Found:
        """What there is to tell since the last look, or nothing if that was just now."""
        now = time.monotonic()
        if self._looked and now - self._last < LOOK_EVERY_S:
            return {}
        found = self._wait(now - self._last)
        self._last, self._looked = now, True
        looks: list[Callable[[], Found]] = [self._cpu, self._memory, self._disk]
        if self._device.type == "cuda":
            looks += [self._gpu_memory, self._gpu]
        for look in looks:
            # A machine that does not tell is no reason to stop.
            with suppress(OSError, RuntimeError, ImportError, psutil.Error):
                found |= look()
        return {PREFIX + name: value for name, value in found.items()}

    def _wait(self, elapsed: float) -> Found:
        waited, self._waited = self._waiting.seconds - self._waited, self._waiting.seconds
        return {"data_wait_percent": 100 * waited / max(elapsed, 1e-9)}

    def _cpu(self) -> Found:
        """All cores together are 100 for the machine; for this process, each is."""
        return {
            "cpu_percent": psutil.cpu_percent(),
            "process_cpu_percent": self._process.cpu_percent(),
        }

    def _memory(self) -> Found:
        return {
            "memory_percent": psutil.virtual_memory().percent,
            "process_memory_gb": self._process.memory_info().rss / _GB,
        }

    def _disk(self) -> Found:
        return {"disk_free_gb": shutil.disk_usage(self._directory).free / _GB}

    def _gpu_memory(self) -> Found:
        import torch

        return {"process_gpu_memory_gb": torch.cuda.memory_reserved(self._device) / _GB}

    def _gpu(self) -> Found:
        """By NVIDIA's library, in which torch finds the GPU; its errors are no RuntimeError."""
        import torch

        try:
            return {
                "gpu_percent": float(torch.cuda.utilization(self._device)),
                "gpu_memory_gb": torch.cuda.device_memory_used(self._device) / _GB,
            }
        except Exception as failed:
            raise RuntimeError from failed
