"""`rediffuse doctor`: whether this machine and this place can train, and what to do if not."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import torch

from rediffuse import locks, processes, tables
from rediffuse.errors import RunError
from rediffuse.rasters import read_png
from rediffuse.runs import runs_root
from rediffuse.tracking import mlflow
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.tracking.tracker import in_one_line
from rediffuse.training.devices import bfloat16_pays, choose
from rediffuse.words import json_text, say

Verdict = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """What a check came to, and what to do where that is not well."""

    verdict: Verdict
    told: str
    remedy: str = ""


def doctor(root: Path | None, device: str = "auto", *, as_json: bool = False) -> int:
    """Check one thing after another and tell each; return 1 if something fails, else 0.

    Raises:
        ConfigError: if the device asked for is not there.
    """
    chosen, home, found = choose(device).device, runs_root(root), {}
    for name, check in _checks(chosen, home).items():
        found[name] = check()
        if not as_json:
            _tell(name, found[name])
    failed = [name for name, finding in found.items() if finding.verdict == "fail"]
    if as_json:
        checks = [{"check": name, **finding._asdict()} for name, finding in found.items()]
        say(json_text({"ok": not failed, "root": str(home), "checks": checks}))
    return int(bool(failed))


def _tell(name: str, finding: Finding) -> None:
    tables.verdict(finding.verdict, name, finding.told)
    if finding.remedy:
        tables.verdict("", "", f"→ {finding.remedy}")


def _checks(device: torch.device, root: Path) -> dict[str, Callable[[], Finding]]:
    """The checks in order; the last one trains, so it takes the longest."""
    return {
        "versions": versions,
        "device": lambda: of_device(device),
        "precision": lambda: precision(device),
        "compiler": lambda: compiler(device),
        "processor": processor,
        "memory": memory,
        "disk": lambda: disk(root),
        "root": lambda: writing(root),
        "mlflow": lambda: store(root),
        "training": lambda: training(device),
    }


_PACKAGES = ("torch", "torchvision", "numpy", "mlflow", "hydra-core", "pydantic", "accelerate")
_OPTIONAL = ("tensorboard", "wandb", "transformers", "nvidia-ml-py")


def versions() -> Finding:
    """Which Python and packages these are."""
    there = [f"rediffuse {version('rediffuse')}", f"python {platform.python_version()}"]
    there += [f"{name} {version(name)}" for name in _PACKAGES]
    for name in _OPTIONAL:
        with suppress(PackageNotFoundError):
            there.append(f"{name} {version(name)}")
    return Finding("ok", ", ".join(there))


def of_device(device: torch.device) -> Finding:
    """What computes, and whether a GPU lies idle that torch cannot use."""
    if device.type == "cuda":
        name, free = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
        return Finding("ok", f"{name}, CUDA {torch.version.cuda}, {free / 1e9:.1f} GB free")
    idle = Path("/proc/driver/nvidia/version").exists() and not torch.cuda.is_available()
    if idle:
        return Finding(
            "warn",
            f"{device}, beside an NVIDIA driver that torch {torch.__version__} cannot use",
            "install a newer driver, or a torch that was built for this one",
        )
    return Finding("ok", f"{device}, {platform.machine()}")


def precision(device: torch.device) -> Finding:
    """What `training.precision=auto` takes here."""
    pays = bfloat16_pays(device)
    why = "faster here" if pays else "bf16 is no faster here"
    return Finding("ok", f"training.precision=auto takes {'bf16' if pays else 'fp32'}: {why}")


def compiler(device: torch.device) -> Finding:
    """Whether the C++ compiler that torch calls works: `training.compile` needs it on a CPU."""
    if device.type != "cpu":
        return Finding("ok", "training.compile uses torch's own")
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    with TemporaryDirectory(prefix="rediffuse-doctor-") as folder:
        source = Path(folder) / "try.cpp"
        source.write_text("extern int one; int one = 1;\n")
        try:
            command = [name, "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as failed:
            return Finding(
                "warn",
                f"no C++ compiler that works ({in_one_line(failed)[:80]}); training is slower",
                "install g++, or leave training.compile=false",
            )
    return Finding("ok", f"{name} works, for training.compile")


def processor() -> Finding:
    """Whether torch takes more threads than this process may run."""
    threads, cores = torch.get_num_threads(), _cores()
    told = f"{threads} threads on {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    if threads > cores:
        return Finding("warn", told, f"set threads={cores}; more wait for one another")
    return Finding("ok", told)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> Finding:
    """How much memory is free."""
    free = psutil.virtual_memory().available / 1e9
    told = f"{free:.1f} of {psutil.virtual_memory().total / 1e9:.1f} GB free"
    if free < _LITTLE_MEMORY_GB:
        return Finding("warn", told, "end other programs, or train with smaller batches")
    return Finding("ok", told)


_LITTLE_MEMORY_GB, _LITTLE_DISK_GB, _NO_DISK_GB = 2.0, 5.0, 0.5


def disk(root: Path) -> Finding:
    """How much room runs have."""
    place = _existing(root)
    free = shutil.disk_usage(place).free / 1e9
    told, more = f"{free:.1f} GB free for {root}", "make room, or name another place with --root"
    if free < _NO_DISK_GB:
        return Finding("fail", told, more)
    return Finding("warn", told, more) if free < _LITTLE_DISK_GB else Finding("ok", told)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def writing(root: Path) -> Finding:
    """Whether the file system does what checkpoints and locks need, where runs will lie."""
    place = _existing(root)
    elsewhere = "name a place on a local disk with --root or $REDIFFUSE_ROOT"
    try:
        with TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            _try_file_system(Path(folder))
    except OSError as failed:
        return Finding("fail", f"{place}: {failed.strerror or failed}", elsewhere)
    except locks.Timeout:
        return Finding("fail", f"{place}: a lock cannot be taken", elsewhere)
    kind = _file_system(place)
    told = f"{root}: written, synced, renamed and locked ({kind})"
    if reason := locks.no_flock(place):
        without = "after a process on another machine died, remove the .lock.held it left"
        return Finding("warn", f"{told} by lock files: it has no flock ({reason})", without)
    if kind.startswith(_SHARED):
        return Finding("warn", told, "locks of other machines may not be seen here")
    return Finding("ok", told)


_SHARED = ("nfs", "cifs", "smb", "9p", "fuse", "lustre", "ceph", "gpfs", "beegfs")


def _try_file_system(folder: Path) -> None:
    """Do what a run does: replace a file and a folder, sync both, and hold a lock alone."""
    for content in (b"old", b"new"):
        write_atomically(folder / "file", content)
    if (folder / "file").read_bytes() != b"new":
        raise OSError("a renamed file has its old content")
    (folder / "building").mkdir()
    (folder / "building").rename(folder / "built")
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    lock = folder / "lock"
    with locks.hold(lock, 5.0), suppress(locks.Timeout), locks.hold(lock, 0.0):
        raise OSError("a lock was taken twice")


def _file_system(place: Path) -> str:
    with suppress(OSError, RuntimeError):
        mounted = [
            p for p in psutil.disk_partitions(all=True) if place.is_relative_to(p.mountpoint)
        ]
        if mounted:
            return str(max(mounted, key=lambda p: len(p.mountpoint)).fstype)
    return "unknown file system"


def store(root: Path) -> Finding:
    """Whether MLflow's store answers; training goes on without it."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    without = "mend $MLFLOW_TRACKING_URI, or train with tracking=none"
    if uri and urlsplit(uri).scheme in ("http", "https"):
        try:
            with urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
                return Finding("ok", f"{_without_password(uri)} answers {answer.status}")
        except (OSError, ValueError) as failed:
            told = f"{_without_password(uri)} does not answer ({in_one_line(failed)[:80]})"
            return Finding("warn", told, without)
    if uri:
        return Finding("ok", f"{_without_password(uri)}, as $MLFLOW_TRACKING_URI says")
    database = root / "mlflow.db"
    if not database.exists():
        return Finding("ok", f"{database} is made by the first run")
    try:
        count = mlflow.experiments(root)
    except Exception as failed:
        remedy = "move that file away; runs are complete without it, and resuming sends them anew"
        return Finding("fail", f"{database}: {in_one_line(failed)[:100]}", remedy)
    return Finding("ok", f"{database} has {count} experiment{'s' * (count != 1)}")


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def training(device: torch.device) -> Finding:
    """Train a tiny network, commit, verify and load a checkpoint, and draw from it; keep nothing.

    It runs in processes of its own, as the user's commands do.
    """
    began = time.perf_counter()
    with TemporaryDirectory(prefix="rediffuse-doctor-") as folder:
        place = Path(folder)
        try:
            _command(place, "train", *_TINY, f"device={device}")
            (run,) = place.glob("runs/*/run.json")
            how = ("--n", "4", "--steps", "4", "--device", str(device), "--output-dir", "drawn")
            _command(place, "sample", run.parent.name, *how)
            for file in sorted(place.glob("drawn/0*.png")):
                read_png(file)
        except (RunError, OSError, ValueError, subprocess.TimeoutExpired) as failed:
            return Finding("fail", str(failed), "the checks above may say why; else report it")
    seconds = time.perf_counter() - began
    told = "a tiny network trained, its checkpoint verified and loaded, 4 images drawn"
    return Finding("ok", f"{told}, in {seconds:.0f} s")


_TINY = (
    *("model.base_channels=16", "model.blocks_per_level=1", "training.preview_count=4"),
    *("training.epochs=null", "training.images=320", "training.batch_size=32", "sampling.steps=3"),
    *("training.validation_images=32", "tracking=none"),
)
_LONGEST_S = 300


def _command(place: Path, *words: str) -> None:
    """Run one of our commands to its end.

    Raises:
        RunError: with the last line that it said, if it fails.
    """
    done = subprocess.run(
        processes.command(*words),
        env={**os.environ, "REDIFFUSE_ROOT": str(place / "runs")},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=_LONGEST_S,
        check=False,
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise RunError(f"`rediffuse {words[0]}` failed: {last[0][:200]}")
