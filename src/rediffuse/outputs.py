"""Folders and files that a user names: only what carries our own mark is replaced.

A job's folder holds `.job.json`, what the job is, from before its first image until it is done, and
`manifest.json` from then on. A folder with neither has to be new or empty.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rediffuse import locks
from rediffuse.errors import ConfigError
from rediffuse.pictures import MARK
from rediffuse.rasters import png_header, read_png
from rediffuse.reading import decoded_object, open_regular, read_object
from rediffuse.tracking.jsonl import write_atomically

MANIFEST, BEGUN, LOCK = "manifest.json", ".job.json", ".lock"
_JSON_BYTES = 2_000_000_000
_LOCK_S = 0.5
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}")  # as `write_atomically` names them


@contextmanager
def folder_of(job: Mapping[str, Any], folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Hold the folder of a job, which will write files of these names into it.

    It is made, or is empty, or is that of the same job, which may have been killed: what that left
    half-written is removed.

    Raises:
        ConfigError: if it is of another job, in use, holds files that are not the job's, or cannot
            be written.
    """
    job = json.loads(json.dumps(job))
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check(folder, job, names, "--output-dir")
            held.enter_context(locks.hold(folder / LOCK, _LOCK_S))
            _check(folder, job, names, "--output-dir")  # it may have been another's until now
            for left in folder.iterdir():
                if (half := _TEMPORARY.fullmatch(left.name)) and half[1] in {*names, *_OURS}:
                    left.unlink(missing_ok=True)
            if not (folder / MANIFEST).is_file():
                write_atomically(folder / BEGUN, json.dumps(job).encode())
        except locks.Timeout:
            raise ConfigError(
                f"{folder} is in use by another process; wait for it, or name another --output-dir"
            ) from None
        except OSError as refused:
            why = refused.strerror
            raise ConfigError(f"{folder}: images cannot be written here ({why})") from None
        yield


def check_folder(
    job: Mapping[str, Any], folder: Path, names: Sequence[str], option: str = "--output-dir"
) -> None:
    """Refuse a folder that holds files of something else; one that is not there is made later.

    Raises:
        ConfigError: naming what it holds, and the option that names another folder.
    """
    if folder.is_dir():
        _check(folder, json.loads(json.dumps(job)), names, option)


def finish(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what was done beside what came of it, and with that end the job."""
    write_atomically(folder / MANIFEST, json.dumps(facts, indent=1).encode())
    (folder / BEGUN).unlink(missing_ok=True)


def facts_in(file: Path) -> dict[str, Any] | None:
    """The facts that one of our PNG files holds; None if it is no such file.

    Raises:
        OSError: if it cannot be opened.
    """
    try:
        return decoded_object(str(png_header(file).info[MARK]).encode())
    except (KeyError, ValueError):
        return None


def pixels_in(file: Path, facts: Mapping[str, Any], size: int) -> np.ndarray | None:
    """The `[size, size, channels]` pixels of a PNG if it holds these facts, else None."""
    if not file.is_file() or facts_in(file) != json.loads(json.dumps(facts)):
        return None
    try:
        image = read_png(file, size * size)
    except (OSError, ValueError):
        return None
    if image.size != (size, size):
        return None
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def check_replaceable(file: Path) -> None:
    """Refuse a file that is there and that we did not write.

    Raises:
        ConfigError: naming it.
    """
    if not _is_ours(file):
        raise ConfigError(
            f"{file} is there and was not written by rediffuse; name another file, or move it away"
        )


_OURS = (BEGUN, MANIFEST)


def _check(folder: Path, job: Mapping[str, Any], names: Sequence[str], option: str) -> None:
    """Refuse a folder that is another job's, or holds files that are not a job's."""
    there = _job_in(folder)
    if there is None:
        others = sorted(file.name for file in folder.iterdir() if not _is_beginning(file.name))
        if others:
            raise ConfigError(
                f"{folder} is not empty (it holds {others[0]}) and has no job's manifest; name a "
                f"new {option}"
            )
    elif any(there.get(name) != job[name] for name in job):
        raise ConfigError(
            f"{folder} holds the images of another job; name another {option}, or empty it"
        )
    elif not (folder / MANIFEST).is_file():
        for name in names:
            check_replaceable(folder / name)


def _is_beginning(name: str) -> bool:
    """Whether a file may be there before a job has begun."""
    half = _TEMPORARY.fullmatch(name)
    return name in (LOCK, locks.marker(Path(LOCK)).name) or (half is not None and half[1] == BEGUN)


def _job_in(folder: Path) -> dict[str, Any] | None:
    """What the job of a folder is; {} if that cannot be read, None if there is none."""
    for name in (MANIFEST, BEGUN):
        try:
            return read_object(folder / name, _JSON_BYTES)
        except FileNotFoundError:
            continue
        except ValueError:
            return {}
    return None


def _is_ours(file: Path) -> bool:
    """Whether a file may be replaced: it is not there, is empty, or has our mark."""
    if not file.exists() or (file.is_file() and not file.stat().st_size):
        return True
    if not file.is_file():
        return False
    if file.suffix.lower() in (".gif", ".jpg", ".jpeg"):  # its comment is in its head
        with open_regular(file, links=True) as stream:
            return MARK.encode() in stream.read(4096)
    return facts_in(file) is not None
