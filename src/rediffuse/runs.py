"""A run is a directory named by its id; the id, or an unambiguous beginning of it, finds it."""

import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rediffuse import locks
from rediffuse.errors import RunError
from rediffuse.reading import read_bytes, why
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.training.committed import LEFT_OVER
from rediffuse.words import masked, masked_words

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

RECORD_BYTES = 1_000_000
_ID, _WORD = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{6,32}")


class Record(BaseModel):
    """What `run.json` holds.

    `created` is UTC in ISO 8601; `images_seen` is that of the newest checkpoint.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    id: str
    name: str | None = None
    created: str
    status: Status = "RUNNING"
    parent: str | None = None
    images_seen: int = Field(default=0, ge=0, lt=2**63)
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run's directory and what lies where in it; nothing here is kept in memory."""

    directory: Path

    @property
    def id(self) -> str:
        """32 hex digits."""
        return self.directory.name

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.directory / "config.yaml"

    @property
    def private(self) -> Path:
        """Values that the configuration masks, for the owner's eyes alone."""
        return self.directory / "private.yaml"

    @property
    def environment(self) -> Path:
        """Where the run began: code, packages, machine."""
        return self.directory / "environment.json"

    @property
    def metrics(self) -> Path:
        """Every metric, one row per line: the source of truth."""
        return self.directory / "metrics.jsonl"

    @property
    def epochs(self) -> Path:
        """Metrics per epoch."""
        return self.directory / "metrics.json"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.directory / "checkpoints"

    @property
    def samples(self) -> Path:
        """Previews and sampling jobs."""
        return self.directory / "samples"

    @property
    def logs(self) -> Path:
        """What trackers were given, and what they wrote."""
        return self.directory / "logs"

    @property
    def digests(self) -> Path:
        """What the run began with, and digests of its state now and then."""
        return self.logs / "digests.jsonl"

    def read(self) -> Record:
        """Read `run.json`.

        Raises:
            RunError: if it is missing, too large, damaged, or of another run.
        """
        path = self.directory / "run.json"
        try:
            record = Record.model_validate_json(read_bytes(path, RECORD_BYTES))
        except FileNotFoundError:
            raise RunError(f"{self.directory} has no run.json; it is not a run") from None
        except ValidationError as damage:
            raise RunError(f"{path} is damaged: {wrong(damage)}") from None
        except (OSError, ValueError) as broken:  # ValidationError is a ValueError, too
            raise RunError(f"{path} is not a run's record: {why(broken)}") from None
        if record.id != self.id:
            raise RunError(f"{path} belongs to run {record.id}; a run's directory keeps its name")
        return record

    def update(self, *, status: Status | None = None, images_seen: int | None = None) -> Record:
        """Change what is given in `run.json`, atomically; hold the run's lock."""
        changes = {"status": status, "images_seen": images_seen}
        given = {key: value for key, value in changes.items() if value is not None}
        record = self.read().model_copy(update=given)
        _write(self, record)
        return record


def wrong(damage: ValidationError) -> str:
    """The first thing that a schema refuses, in one line: where it is, and what is expected."""
    what = damage.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, what['loc']))[:80] or 'JSON'}: {what['msg'][:200]}"


def runs_root(option: str | Path | None) -> Path:
    """Where runs live: `--root`, else `$REDIFFUSE_ROOT`, else `./runs`; absolute."""
    return Path(option or os.environ.get("REDIFFUSE_ROOT") or "runs").expanduser().resolve()


def create(
    root: Path,
    run_id: str | None = None,
    *,
    name: str | None = None,
    parent: str | None = None,
    command: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
) -> Run:
    """Make a run's directory with its record and `files`, all at once; without an id it gets one.

    Secrets are masked in name and command. `private.yaml` is readable by its owner alone.

    Raises:
        RunError: if there is such a run already.
    """
    run_id = run_id or uuid4().hex
    if not _ID.fullmatch(run_id):
        raise RunError(f"a run id is 32 hex digits (0-9, a-f), not {run_id!r}")
    run = Run(root / run_id)
    created = datetime.now(UTC).isoformat(timespec="milliseconds")
    record = Record(
        id=run_id,
        name=name and masked(name),
        created=created,
        parent=parent,
        command=tuple(masked_words(command)),
    )
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    building = Run(root / f".building-{run_id}")
    try:
        building.directory.mkdir()
    except FileExistsError:
        raise RunError(f"{building.directory} exists already; a run is created once") from None
    try:
        (building.directory / _MARK).touch()
        building.logs.mkdir()
        for file, content in (files or {}).items():
            mode = 0o600 if file == building.private.name else 0o666
            write_atomically(building.directory / file, content, mode=mode)
        _write(building, record)
        if run.directory.exists():
            raise FileExistsError
        (building.directory / _MARK).unlink()
        building.directory.rename(run.directory)
    except FileExistsError:
        raise RunError(f"{run.directory} exists already; a run is created once") from None
    finally:
        shutil.rmtree(building.directory, ignore_errors=True)
    return run


_MARK = ".unfinished"
"""A file in the folder of a run that is being created; only such a folder is ever removed."""


def _remove_abandoned(root: Path) -> None:
    """Remove what a process left that was killed while it created a run, an hour ago or longer."""
    for left in root.glob(".building-*"):
        with suppress(OSError):  # another process may have just finished it
            old = time.time() - left.lstat().st_mtime > _ABANDONED_S
            if old and not left.is_symlink() and (left / _MARK).is_file():
                shutil.rmtree(left, ignore_errors=True)


def find_run(root: Path, word: str) -> Run:
    """Find a run by its id or by any beginning of it, of 6 digits or more.

    Raises:
        RunError: if `word` cannot be an id, fits no run or several, or there is a link in the run.
    """
    if not _WORD.fullmatch(word):
        raise RunError(
            f"{word[:80]!r} is not a run id: give its 32 hex digits (0-9, a-f), or the first 6 or "
            "more"
        )
    found = [run for run in _runs_in(root) if run.id.startswith(word)]
    if len(found) == 1:
        _refuse_links(found[0])
        return found[0]
    if found:
        raise RunError(f"'{word}' fits {len(found)} runs: {_named(found)}; give more digits")
    runs = list_runs(root)
    others = f"the newest there are {_named(runs)}" if runs else "there are no runs"
    raise RunError(
        f"no run '{word}' in {root}; {others} (another place: --root or $REDIFFUSE_ROOT)"
    )


def _refuse_links(run: Run) -> None:
    """A link may lead out of the run, to be read, overwritten or emptied there."""
    for folder, folders, files in os.walk(run.directory):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink():
                raise RunError(
                    f"{path} is a link; a run keeps its own files, put {path.name} there"
                )


def list_runs(root: Path) -> list[Run]:
    """List the runs in `root`, newest first; those whose record cannot be read come last."""
    return sorted(_runs_in(root), key=_created, reverse=True)


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Be the only writer of a run (`locks.hold`).

    Raises:
        RunError: if another process is, naming its host and process id; if there is something else
            in place of the files that say so.
    """
    for file in (_lock_of(run), run.directory / ".owner"):
        if file.exists() and not file.is_file():
            raise RunError(f"{file} is not a regular file; remove it")
    with ExitStack() as held:
        try:
            held.enter_context(locks.hold(_lock_of(run), _LOCK_S))
        except locks.Timeout:
            raise _in_use(run) from None
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        _sweep(run)
        write_atomically(run.directory / ".owner", owner.encode())
        with _heartbeat(run.directory / ".owner"):
            yield


def _in_use(run: Run) -> RunError:
    owner = _first_line(run.directory / ".owner") or "another process"
    message = f"run {run.id} is in use by {owner}; wait for it or end it"
    if locks.no_flock(run.directory):
        message += f", or remove {locks.marker(_lock_of(run))} if it is dead"
    return RunError(message)


def _lock_of(run: Run) -> Path:
    return run.directory / ".lock"


_ABANDONED_S = 3600.0
# A look at the status holds the lock for an instant, which must not turn a writer away.
_LOCK_S = 0.5
HEARTBEAT_S, SILENT_S = 10.0, 60.0


def status_now(run: Run) -> str:
    """The status in `run.json`, or `stale` for a run that says RUNNING and has no process.

    It is `silent` if a process holds the run and has shown no sign of life for a minute: it is
    stopped, or on another machine whose locks are not seen here.
    """
    status = run.read().status
    if status != "RUNNING":
        return status
    if _is_free(run):
        return "stale"
    heard = last_heard(run)
    return "silent" if heard is not None and time.time() - heard > SILENT_S else status


def last_heard(run: Run) -> float | None:
    """When the last writer of a run showed that it lives, in Unix seconds."""
    try:
        return (run.directory / ".owner").stat().st_mtime
    except OSError:
        return None


def _sweep(run: Run) -> None:
    """Remove what a killed writer left half-made, and nothing else; a link may lead anywhere."""
    for folder in (run.directory, run.logs, run.samples):
        for left in () if folder.is_symlink() else folder.glob(".*"):
            if _TEMPORARY.fullmatch(left.name):
                left.unlink(missing_ok=True)
    checkpoints = run.checkpoints
    for half in () if checkpoints.is_symlink() else checkpoints.glob(".*"):
        if LEFT_OVER.fullmatch(half.name):
            shutil.rmtree(half, ignore_errors=True)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # as `write_atomically` names them


@contextmanager
def _heartbeat(file: Path) -> Iterator[None]:
    """Touch a file now and then, for as long as this lasts."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def environment() -> dict[str, Any]:
    """Describe code, packages and machine, as far as they can be known; takes a second or so."""
    import torch  # takes seconds, and listing runs does without

    return {
        "git": _git(Path.cwd()),
        "code_sha256": _code_sha256(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            found.name: found.version
            for found in sorted(metadata.distributions(), key=lambda found: str(found.name))
        },
        "torch": {
            "version": torch.__version__,
            "build": torch.__config__.show().splitlines(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cpu": {"count": os.cpu_count(), **_cpu()},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "gpu_driver": _first_line(Path("/proc/driver/nvidia/version")),
    }


def _code_sha256() -> str:
    """A digest of every Python file of this package, by its name in it."""
    package, found = Path(__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        found.update(f"{file.relative_to(package).as_posix()}\0".encode())
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def _git(directory: Path) -> dict[str, Any] | None:
    """Commit, whether anything differs from it, and a digest of that; None outside a checkout."""
    try:
        commit = _git_says(directory, "rev-parse", "HEAD").decode().strip()
        dirty = bool(_git_says(directory, "status", "--porcelain"))
        diff = _git_says(directory, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--binary")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty, "diff_sha256": hashlib.sha256(diff).hexdigest()}


def _git_says(directory: Path, *arguments: str) -> bytes:
    # No locks and no hooks: looking at a checkout neither changes it nor runs what it configures.
    command = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments)
    return subprocess.run(command, cwd=directory, capture_output=True, check=True, timeout=5).stdout


def _cpu() -> dict[str, str]:
    """Model name and instruction flags of the first core, where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"model": platform.processor(), "flags": ""}
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    return {
        "model": facts.get("model name", platform.processor()),
        "flags": facts.get("flags", facts.get("Features", "")),
    }


def _first_line(path: Path) -> str | None:
    try:
        return read_bytes(path, 10_000).decode(errors="replace").splitlines()[0][:200]
    except (OSError, ValueError, IndexError):
        return None


def _write(run: Run, record: Record) -> None:
    write_atomically(run.directory / "run.json", record.model_dump_json(indent=2).encode())


def _runs_in(root: Path) -> list[Run]:
    """Directories whose name is an id; a link may point anywhere, so it is none."""
    if not root.is_dir():
        return []
    entries = (e for e in os.scandir(root) if e.is_dir(follow_symlinks=False))
    return [Run(root / entry.name) for entry in entries if _ID.fullmatch(entry.name)]


def _created(run: Run) -> str:
    try:
        return run.read().created
    except RunError:
        return ""


def _named(runs: Sequence[Run]) -> str:
    return ", ".join(run.id for run in runs[:4]) + (", ..." if len(runs) > 4 else "")


def _is_free(run: Run) -> bool:
    try:
        with locks.hold(_lock_of(run), timeout_s=0.0):
            return True
    except (locks.Timeout, OSError):  # OSError: somebody else's run, on which we may not write
        return False
