"""A run of a second on a folder of images, and what two runs must have in common."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faults_harness import Done, Process, Zygote
from PIL import Image

from rediffuse.tracking.journal import is_clocked

INTERVAL = 64  # images between two checkpoints
WORDS = (
    "data=folder",
    "data.path=images",
    "data.image_size=8",
    "data.channels=1",
    "data.validation_fraction=0.2",
    "model=unet",
    "model.base_channels=8",
    "model.norm.groups=4",
    "model.blocks_per_level=1",
    "model.channel_multipliers=[1,2]",
    "model.attention_resolutions=[]",
    "training.epochs=null",
    "training.images=192",
    "training.batch_size=16",
    "training.validation_images=8",
    "training.preview_count=1",
    "training.log_every_images=32",
    "training.validate_every_images=96",
    "training.preview_every_images=128",
    f"training.checkpoint_every_images={INTERVAL}",
    "sampling.steps=2",
    "rate.warmup_images=32",
    "tracking=none",
    "threads=1",
)

# Run in a process before its command: `waits` is there once it would take a step, and it takes none
# before `go` is. Without whoever forked it, it goes on to its end.
GATE = """
import os, time
from pathlib import Path
from rediffuse.training import loop
step, parent = loop.train_step, os.getppid()
def train_step(*arguments):
    Path("waits").touch()
    while not Path("go").exists() and os.getppid() == parent:
        time.sleep(0.005)
    return step(*arguments)
loop.train_step = train_step
"""


def place(root: Path) -> Path:
    """Make a root with images to train on."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    (root / "images").mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(root / "images" / f"{number:02}.png")
    return root


def until_it_waits(process: Process) -> None:
    """Wait until a process has come to the gate."""
    while not (process.root / "waits").exists():
        assert not process.ends_within(0.005), process.wait()


@dataclass(frozen=True)
class Golden:
    """An undisturbed run: what is left of it, and how long it took."""

    left: dict[str, Any]
    seconds: float


def runs_in(root: Path) -> list[Path]:
    """The runs' directories, made completely or not."""
    return sorted(d for d in root.iterdir() if len(d.name) == 32)


def rows(file: Path) -> list[dict[str, Any]]:
    """Complete lines, without what the clock or the machine has to do with."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [
        {k: v for k, v in json.loads(line).items() if k == "images" or not is_clocked(k)}
        for line in lines
        if line.endswith("\n")
    ]


def checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def images_in(checkpoint: Path) -> int:
    """How many images had been seen."""
    seen: int = json.loads((checkpoint / "state.json").read_text())["images_seen"]
    return seen


def status(run: Path) -> str:
    """How it says that it ended."""
    said: str = json.loads((run / "run.json").read_text())["status"]
    return said


def left(run: Path) -> dict[str, Any]:
    """What a finished run leaves: the files' names, and what has no time in it.

    Of checkpoints only the newest counts, since a process that is stopped leaves one more; and
    what was undone is kept in a file that the undisturbed run has not.
    """
    ended = status(run)
    assert ended == "FINISHED", ended
    older = [f"checkpoints/{checkpoint.name}/" for checkpoint in checkpoints(run)[:-1]]
    apart = (*older, "logs/undone.jsonl")
    names = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())
    files = [name for name in names if not name.startswith(apart)]
    same = [f for f in files if f.startswith(("checkpoints/", "samples/")) or f == "metrics.json"]
    lines = ("metrics.jsonl", "logs/digests.jsonl")
    return {
        "files": files,
        **{file: (run / file).read_bytes() for file in same},
        **{file: rows(run / file) for file in lines},
    }


def assert_same(run: Path, golden: Golden) -> None:
    """Hold a run to the undisturbed one, naming what differs."""
    found = left(run)
    keys = golden.left.keys() | found.keys()
    differing = sorted(key for key in keys if golden.left.get(key) != found.get(key))
    assert not differing, f"{run}: {differing} {set(found['files']) ^ set(golden.left['files'])}"


def assert_clear(done: Done, *codes: int) -> None:
    """It ended with one of these codes, and a refusal is one line."""
    said = done.stdout + done.stderr
    assert done.returncode in codes, (done.returncode, said)
    assert "Traceback" not in said, said
    assert done.returncode != 2 or len(done.stderr.strip().splitlines()) == 1, said


def assert_answered(zygote: Zygote, root: Path, run: Path) -> None:
    """`runs` and `show` answer, whatever has become of a run."""
    assert_clear(zygote.run("runs", root=root), 0)
    assert_clear(zygote.run("show", run.name, root=root), 0, 2)
