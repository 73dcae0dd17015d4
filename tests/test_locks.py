"""One process at a time, also on a file system without flock."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rediffuse import doctor, locks
from rediffuse.errors import RunError
from rediffuse.runs import Run, create, locked, status_now

CODES = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK]
# A process without flock that holds a run until its standard input is closed.
OWNER = """
import errno, fcntl, os, sys
from pathlib import Path
from rediffuse.runs import Run, locked
def refuse(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = refuse
with locked(Run(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=CODES, ids=lambda code: errno.errorcode[code])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A kernel that says of every file that it cannot be locked."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    locks._warn_of.cache_clear()
    return request.param


@contextmanager
def owner(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run."""
    command = [sys.executable, "-W", "error", "-c", OWNER, str(run.directory)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "held\n"
        yield running
        running.kill()


def test_without_flock_a_lock_file_excludes_and_the_file_system_is_named_once(
    tmp_path: Path, missing: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        lock = tmp_path / name
        with locks.hold(lock):
            assert locks.marker(lock).exists()
            with pytest.raises(locks.Timeout), locks.hold(lock, timeout_s=0.0):
                pass
        assert not locks.marker(lock).exists()
    [line] = capsys.readouterr().err.splitlines()
    assert f"this file system has no flock ({os.strerror(missing)}): lock files are used" in line


def test_with_flock_no_marker_is_made(tmp_path: Path) -> None:
    with locks.hold(tmp_path / "lock"):
        assert not locks.marker(tmp_path / "lock").exists()
        with pytest.raises(locks.Timeout), locks.hold(tmp_path / "lock", timeout_s=0.0):
            pass


@pytest.mark.parametrize("missing", CODES[:1], indirect=True)
def test_without_flock_a_second_writer_is_told_what_to_remove_and_a_dead_one_is_in_nobodys_way(
    tmp_path: Path, missing: int
) -> None:
    run = create(tmp_path)
    with owner(run) as writer:
        wanted = f"in use by process {writer.pid} on .*, or remove .*{run.id}/.lock.held if it is"
        with pytest.raises(RunError, match=wanted), locked(run):
            pass
        assert status_now(run) == "RUNNING"
        writer.kill()
        writer.wait()
        assert status_now(run) == "stale"
        with locked(run):
            assert status_now(run) == "RUNNING"


def test_another_fault_of_flock_is_no_reason_for_lock_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), locks.hold(tmp_path / "lock"):
        pass


def test_doctor_names_a_file_system_without_flock(tmp_path: Path, missing: int) -> None:
    found = doctor.writing(tmp_path)
    assert found.verdict == "warn"
    assert f"it has no flock ({os.strerror(missing)})" in found.told
