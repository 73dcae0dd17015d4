"""The real command line in real processes, on runs small enough to wait for."""

import atexit
import os
import subprocess
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from faults_harness import Zygote

TINY = (
    "model.base_channels=16",
    "model.blocks_per_level=1",
    "data.validation_fraction=0.85",  # leaves 216 images to an epoch
    "training.epochs=null",
    "training.batch_size=48",
    "training.preview_count=4",
    "training.validation_images=64",
    "sampling.steps=3",
    "tracking=none",
    "rate.warmup_images=96",
    "threads=1",  # convolutions this small only wait for one another
)


def rediffuse(
    *words: str, root: Path, check: int | None = 0, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `check` is the exit code it must have (None: any)."""
    own = {"REDIFFUSE_ROOT": str(root), "COLUMNS": "80"}
    done = zygote().start(*words, root=root, env={**os.environ, **own}).wait(timeout_s)
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def zygote() -> Zygote:
    """The one that all tests of this process fork commands from.

    There is another for what counts when modules are imported: where the source lies, and the
    compiler.
    """
    return _zygote(os.environ.get("PYTHONPATH"), os.environ.get("CXX"))


@cache
def _zygote(path: str | None, compiler: str | None) -> Zygote:
    held = ExitStack()
    atexit.register(held.close)
    return held.enter_context(Zygote())


def run_id(done: subprocess.CompletedProcess[str]) -> str:
    """The id that `train` prints first."""
    word, run, *_ = done.stdout.split()
    assert word == "run"
    return run


def edit(file: Path, old: str, new: str) -> None:
    """Replace what stands in a file once."""
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    file.write_text(text.replace(old, new))


def content(root: Path) -> dict[str, bytes]:
    """Every file but locks."""
    files = (file for file in root.rglob("*") if file.is_file() and file.name[0] != ".")
    return {str(file.relative_to(root)): file.read_bytes() for file in files}
