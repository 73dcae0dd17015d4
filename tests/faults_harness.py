"""The command line in forked processes: real ones, without the seconds that imports take.

A zygote imports torch and the command line once and forks a child per command. A child has a
directory, an environment, outputs and a session of its own, and ends as the console script does.
No thread runs and nothing has been computed before a fork.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

TIMEOUT_S = 600.0  # a machine may be busy; what takes so long hangs
LATE = ("hydra", "sklearn.datasets", "torch._dynamo")  # what commands import when they run

Done = subprocess.CompletedProcess[str]


class Process:
    """One running command; its process id stays its own until `wait` has told how it ended."""

    def __init__(
        self, zygote: "Zygote", pid: int, words: tuple[str, ...], root: Path, outputs: Path
    ) -> None:
        self.pid, self.root = pid, root
        self._zygote, self._words, self._outputs = zygote, words, outputs
        self._done: Done | None = None

    def ends_within(self, seconds: float) -> bool:
        """Wait that long at most."""
        if self._done:
            return True
        handle = os.pidfd_open(self.pid)
        try:
            return bool(select.select([handle], [], [], seconds)[0])
        finally:
            os.close(handle)

    def send(self, number: int) -> None:
        """Send a signal; one that comes too late does nothing."""
        if not self._done:
            os.kill(self.pid, number)

    def stdout(self) -> str:
        """What it has said so far."""
        return self._said(".out")

    def stderr(self) -> str:
        """What it has complained of and told of its progress so far."""
        return self._said(".err")

    def _said(self, suffix: str) -> str:
        file = self._outputs.with_suffix(suffix)
        return file.read_text() if file.exists() else ""

    def wait(self, timeout_s: float = TIMEOUT_S) -> Done:
        """Its end: an exit code, or minus the number of the signal that killed it."""
        if not self._done:
            late = not self.ends_within(timeout_s)
            if late:
                self.send(signal.SIGKILL)
            code = self._zygote.ask(wait=self.pid)
            self._done = Done(self._words, code, self.stdout(), self.stderr())
            assert not late, f"{self._words} ran for {timeout_s} s\n{self.stdout()}{self.stderr()}"
        return self._done


class Zygote:
    """Forks a process per command, with the modules `early` imported as well."""

    def __init__(self, *early: str) -> None:
        self._early = early

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._server = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, *self._early],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
            self._count, self._stack = 0, stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin
        self._server.stdin.close()  # it ends when nobody can ask it any more
        self._stack.close()

    def start(
        self, *words: str, root: Path, before: str = "", env: Mapping[str, str] | None = None
    ) -> Process:
        """Start `rediffuse WORDS` in `root`; `before` is Python that the child runs first."""
        self._count += 1
        outputs = self._folder / str(self._count)
        environment = {"REDIFFUSE_ROOT": str(root), "COLUMNS": "80", **(env or {})}
        pid = self.ask(
            words=words, cwd=str(root), env=environment, before=before, outputs=str(outputs)
        )
        return Process(self, pid, words, root, outputs)

    def run(
        self,
        *words: str,
        root: Path,
        before: str = "",
        env: Mapping[str, str] | None = None,
        kill_after: float | None = None,
        signal: int = signal.SIGKILL,
        check: int | None = None,
    ) -> Done:
        """Run a command to its end, or send it a signal after so many seconds.

        `check` is the exit code it must have (None: any).
        """
        process = self.start(*words, root=root, before=before, env=env)
        if kill_after is not None and not process.ends_within(kill_after):
            process.send(signal)
        done = process.wait()
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    def ask(self, **request: Any) -> int:
        """Send one request to the server and read its answer."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the zygote has ended; its standard error says why"
        return int(answer)


def serve() -> tuple[list[str], str]:
    """Answer requests; returns in a child only, with its words and what it runs first."""
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif not (answer := os.fork()):
            _become(request)
            return request["words"], request["before"]
        os.write(1, b"%d\n" % answer)
    os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """Be the process that was asked for."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    create = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    files = [os.devnull, f"{request['outputs']}.out", f"{request['outputs']}.err"]
    for number, file in enumerate(files):
        handle = os.open(file, create if number else os.O_RDONLY, 0o644)
        os.dup2(handle, number)
        os.close(handle)


def _mute() -> None:
    """Keep from stderr what triton says of objects that were frozen and never collected."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    atexit.register(_mute)  # before any import, so that nothing of Python's comes after it

    import torch

    import rediffuse.cli

    torch.set_num_threads(1)
    ours = [m.name for m in pkgutil.walk_packages(rediffuse.__path__, "rediffuse.")]
    for name in (*LATE, *sys.argv[1:], *ours):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    # A shell may have started us with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # taking apart what was imported would take a child three seconds
    words, before = serve()
    sys.argv = ["rediffuse", *words]
    exec(before, {"__name__": "before"})
    rediffuse.cli.main()
