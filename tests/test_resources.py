"""What the machine says is measured now and then, and never stops a run."""

import itertools
import math
import time
from pathlib import Path

import psutil
import pytest
import torch

from rediffuse.tracking.journal import is_clocked
from rediffuse.tracking.resources import Resources, Waiting

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OF_ANY_MACHINE = {
    *("system/cpu_percent", "system/process_cpu_percent", "system/memory_percent"),
    *("system/process_memory_gb", "system/disk_free_gb", "system/data_wait_percent"),
}


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The only clock there is."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def looking(folder: Path, device: torch.device = CPU) -> Resources:
    return Resources(folder, device, Waiting(itertools.count()))


def test_the_wait_for_data_is_the_share_of_time_spent_in_next(clock: Clock, tmp_path: Path) -> None:
    def slow():
        while True:
            clock.now += 3.0
            yield "a batch"

    steps = Waiting(slow())
    look = Resources(tmp_path, CPU, steps)
    for wanted in (75.0, 30.0):
        for _ in range(5):
            assert next(steps) == "a batch"
            clock.now += 1.0 if wanted == 75.0 else 7.0
        assert look()["system/data_wait_percent"] == pytest.approx(wanted)


def test_the_machine_is_asked_at_most_once_in_ten_seconds(clock: Clock, tmp_path: Path) -> None:
    look = looking(tmp_path)
    asked = []
    for seconds in range(25):
        clock.now = 1000.0 + seconds
        asked.append(bool(look()))
    assert [second for second, told in enumerate(asked) if told] == [0, 10, 20]


def test_every_machine_tells_its_cpu_memory_disk_and_wait(tmp_path: Path) -> None:
    found = looking(tmp_path)()
    assert found.keys() == OF_ANY_MACHINE
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["system/memory_percent"] <= 100
    assert found["system/process_memory_gb"] == pytest.approx(
        psutil.Process().memory_info().rss / 1e9, rel=0.2
    )


def test_what_a_machine_does_not_tell_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise psutil.AccessDenied

    look = looking(tmp_path / "gone")
    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    assert OF_ANY_MACHINE - look().keys() == {
        *("system/memory_percent", "system/process_memory_gb", "system/disk_free_gb")
    }


@pytest.mark.parametrize("installed", [True, False])
def test_a_gpu_tells_its_use_where_nvidias_library_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    def use(device: torch.device) -> int:
        if not installed:
            raise ModuleNotFoundError("nvidia-ml-py is not installed")
        return 97

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2_000_000_000)
    monkeypatch.setattr(torch.cuda, "utilization", use)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda device: 3_000_000_000)
    found = looking(tmp_path, CUDA)()
    told = {key: value for key, value in found.items() if key not in OF_ANY_MACHINE}
    by_nvidia = {"system/gpu_percent": 97.0, "system/gpu_memory_gb": 3.0}
    assert told == {"system/process_gpu_memory_gb": 2.0, **(by_nvidia if installed else {})}


def test_what_the_machine_says_is_no_part_of_the_training() -> None:
    assert all(map(is_clocked, OF_ANY_MACHINE))
    assert not is_clocked("loss")
