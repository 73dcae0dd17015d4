"""Processes: what a launcher announces, what signals do to a child, where a child imports from."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from rediffuse import processes
from rediffuse.errors import ConfigError
from rediffuse.training.devices import Devices
from rediffuse.training.hooks import Interrupts
from rediffuse.training.loop import Stop

VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
)
WHERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
OF_TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **WHERE}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        (WHERE, (0, 1)),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1)),
        ({"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "4"}, (0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, (0, 1)),
        (OF_TWO, (1, 2)),
    ],
)
def test_a_launchers_environment_says_which_process_this_is(
    launched: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int]
) -> None:
    for name, value in variables.items():
        launched.setenv(name, value)
    assert processes.announced() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set and RANK is not.*unset LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({**OF_TWO, "RANK": "2"}, "RANK=2, LOCAL_RANK=1, WORLD_SIZE=2"),
        ({**OF_TWO, "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4.*torchrun.*WORLD_SIZE=1"),
    ],
)
def test_several_processes_that_cannot_find_each_other_are_refused(
    launched: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        launched.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        processes.announced()


# A child that says that it is there, and ends with its own code at the first signal.
CHILD = """
import os, signal, sys
def end(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    os._exit(40)
for number in {numbers}:
    signal.signal(number, end)
print("child", flush=True)
while True:
    signal.pause()
"""
PARENT = """
import sys
from rediffuse import processes
code, received = processes.run([sys.executable, "-c", sys.argv[1]])
print("code", code, received and received.name, flush=True)
"""


def start(numbers: tuple[signal.Signals, ...]) -> "subprocess.Popen[str]":
    """A parent with a child that waits, and handles these signals."""
    child = CHILD.format(numbers=[int(number) for number in numbers])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    assert parent.stdout.readline() == "child\n"
    return parent


@pytest.mark.parametrize("number", processes.ENDING, ids=lambda number: number.name)
def test_a_signal_is_passed_on_to_the_child_whose_end_is_waited_for(
    number: signal.Signals,
) -> None:
    with start(processes.ENDING) as parent:
        parent.send_signal(number)
        told, _ = parent.communicate(timeout=60)
    assert told.splitlines() == [f"got {number.name}", f"code 40 {number.name}"]
    assert parent.returncode == 0


def test_a_child_is_told_to_end_when_its_parent_is_killed() -> None:
    with start(processes.ENDING) as parent:
        parent.kill()
        told, _ = parent.communicate(timeout=60)  # until nobody holds the pipe: the child has ended
    assert told.splitlines() == ["got SIGTERM"]


def test_a_child_that_a_signal_kills_has_the_exit_code_that_shells_tell() -> None:
    with start(()) as parent:
        parent.send_signal(signal.SIGUSR1)
        told, _ = parent.communicate(timeout=60)
    assert told.splitlines() == [f"code {128 + signal.SIGUSR1} SIGUSR1"]


def test_a_child_imports_nothing_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('the wrong module')")
    code = (
        "import subprocess, sys; sys.path = [p for p in sys.path if p]\n"
        "from rediffuse import processes\n"
        "subprocess.run(processes.command('train', '-h'), check=True)"
    )
    # As for the console script, where no entry of sys.path is the working directory.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


HERE = Devices(torch.device("cpu"))


@pytest.fixture
def handlers() -> Iterator[dict[signal.Signals, object]]:
    """The handlers of this process, which are put back."""
    before = {number: signal.getsignal(number) for number in processes.ENDING}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", processes.ENDING, ids=lambda number: number.name)
def test_every_signal_of_terminals_and_schedulers_asks_training_to_stop(
    number: signal.Signals, handlers: dict[signal.Signals, object]
) -> None:
    signal.signal(number, signal.SIG_DFL)
    with closing(Interrupts(HERE)) as interrupts:
        signal.raise_signal(number)
        signal.raise_signal(number)  # the same one, by another way
        with pytest.raises(Stop, match=f"{number.name} received"):
            interrupts.go_on()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_what_the_parent_ignores_stays_ignored_but_for_the_sigint_of_background_jobs(
    handlers: dict[signal.Signals, object],
) -> None:
    for number in processes.ENDING:
        signal.signal(number, signal.SIG_IGN)
    with closing(Interrupts(HERE)) as interrupts:
        for number in set(processes.ENDING) - {signal.SIGINT}:
            signal.raise_signal(number)
        interrupts.go_on()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stop):
            interrupts.go_on()


def test_a_thread_leaves_signals_to_the_main_thread(
    handlers: dict[signal.Signals, object],
) -> None:
    def there() -> None:
        with closing(Interrupts(HERE)) as interrupts:
            assert {n: signal.getsignal(n) for n in processes.ENDING} == handlers
            interrupts.go_on()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(there).result()
