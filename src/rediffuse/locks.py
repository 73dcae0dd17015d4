"""A lock between processes, on any file system."""

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from rediffuse.words import tell

__all__ = ["Timeout", "hold", "marker", "no_flock"]


@contextmanager
def hold(file: Path, timeout_s: float = -1.0) -> Iterator[None]:
    """Hold the lock `file`, waiting for it up to `timeout_s` seconds; -1 waits for ever.

    It is a lock of the operating system (flock), which ends with its process. On a file system
    without flock it is the existence of `marker(file)`: one that a dead process of this machine
    left is taken over, one of another machine has to be removed by hand.

    Raises:
        Timeout: if another process holds it.
        OSError: if the file cannot be written.
    """
    lock: FileLock | SoftFileLock = FileLock(file)
    if reason := no_flock(file.parent):
        _warn_of(_mount_point(file.parent), reason)
        lock = SoftFileLock(marker(file))
    with lock.acquire(timeout=timeout_s, poll_interval=0.05):
        yield


def marker(file: Path) -> Path:
    """The file whose existence is the lock where there is no flock.

    It has another name than the flock's file, which stays there when nobody holds it.
    """
    return file.with_name(f"{file.name}.held")


@cache
def no_flock(folder: Path) -> str | None:
    """Why the file system of a folder refuses flock, or None if it does not."""
    if os.name != "posix":
        return None
    import fcntl

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as refused:
        return os.strerror(refused.errno) if refused.errno in _NO_FLOCK else None
    return None


# Lustre and some FUSE mounts; NFS without a lock daemon.
_NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@cache
def _warn_of(mount_point: Path, reason: str) -> None:
    tell(
        f"{mount_point}: this file system has no flock ({reason}): lock files are used instead, "
        "and one left by a process that died on another machine has to be removed by hand",
        sys.stderr,
    )


def _mount_point(folder: Path) -> Path:
    return next(place for place in (folder, *folder.resolve().parents) if os.path.ismount(place))
