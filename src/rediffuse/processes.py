"""Processes: those that a launcher has started together, signals that end one, and children."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from rediffuse.errors import ConfigError


def announced() -> tuple[int, int]:
    """This process' number and how many there are, as a launcher's environment says: alone, (0, 1).

    Raises:
        ConfigError: if the environment announces several processes that could not find each other,
            each of which would do the whole work.
    """
    if os.environ.get("WORLD_SIZE") == "1":
        return 0, 1
    if not (present := [name for name in ("LOCAL_RANK", "WORLD_SIZE") if name in os.environ]):
        _refuse_mpi()
        return 0, 1
    if missing := [name for name in _LAUNCHED if name not in os.environ]:
        raise ConfigError(
            f"{present[0]} is set and {missing[0]} is not: a launcher sets {', '.join(_LAUNCHED)} "
            f"together; start several processes with torchrun, or unset {present[0]}"
        )
    try:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ["LOCAL_RANK"])
    except ValueError:
        rank, ranks, local = 0, 0, 0
    if not (0 <= rank < ranks and 0 <= local < ranks):
        found = ", ".join(f"{name}={os.environ[name][:20]}" for name in _LAUNCHED[:3])
        raise ConfigError(f"{found}: not the numbers of a process; start it with torchrun")
    return rank, ranks


_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def _refuse_mpi() -> None:
    """Refuse to be one of several processes of mpirun, which tells them nothing of each other."""
    for name in _MPI:
        if (count := os.environ.get(name, "")).isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{name}={count}: processes of mpirun do not work together; start them with "
                "torchrun, or set WORLD_SIZE=1 to let each of them work alone"
            )


def alone(what: str) -> None:
    """Refuse to do in several processes what does not divide its work among them.

    Raises:
        ConfigError: naming `what`.
    """
    if (ranks := announced()[1]) > 1:
        raise ConfigError(f"{what} works in one process, not {ranks}; start it without a launcher")


ENDING = tuple(
    s
    for s in signal.Signals
    if s.name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # Windows has fewer
)
"""Sent by terminals, people and job schedulers to end a process that may still save its work."""


def exit_code(number: int) -> int:
    """The exit code of a process that a signal has ended, as shells report it."""
    return 128 + number


def is_ignored(number: signal.Signals) -> bool:
    """Whether whoever started this process wants a signal ignored, as `nohup` does.

    SIGINT does not count: shells ignore it for every background job.
    """
    return number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


def command(*words: str) -> list[str]:
    """`rediffuse WORDS` for a child process, which imports modules from where this process does.

    `python -m` alone would also import from the working directory, whatever lies there.
    """
    here = {"", os.getcwd()} & {*sys.path}
    return [sys.executable, *([] if here else ["-P"]), "-m", "rediffuse", *words]


def run(words: Sequence[str]) -> tuple[int, signal.Signals | None]:
    """Run a child process to its end; return its exit code, and the signal that came meanwhile.

    Signals that end a command are passed on to the child, which decides how to end. On Linux it
    gets SIGTERM if this process dies before it.
    """
    received: list[signal.Signals] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if child:
            child.send_signal(number)

    handled = [number for number in ENDING if not is_ignored(number)]
    before = {number: signal.signal(number, pass_on) for number in handled}
    try:
        child = subprocess.Popen(words, preexec_fn=_ends_with_this_process())
        for number in received:  # that came before there was a child
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return exit_code(-code) if code < 0 else code, received[0] if received else None


def _ends_with_this_process() -> Callable[[], None] | None:
    """What a child runs before its program, to get SIGTERM when its parent dies (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it has died already
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
