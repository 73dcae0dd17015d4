"""What README and docs tell to type is typed, page by page, and does not fail.

A page has a folder of its own with two finished runs and a few pictures in it. Commands are as they
stand, but made short: words that make a training small are added, numbers of images and steps are
cut, `ID` is the page's last run and `OTHER` the one before. What a block shows as refused must be.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cli import TINY, zygote
from documents import COMMANDS, PAGES, QUICK, Block, blocks, ours, relative
from faults_harness import Done
from PIL import Image

SMALL = (
    "training.epochs=null",
    "training.images=32",
    "training.batch_size=16",
    "training.log_every_images=16",
    "training.preview_count=4",
    "training.validation_images=16",
    "training.precision=fp32",
    "training.compile=false",
    "sampling.steps=3",
    "tracking=none",
    "threads=1",
)
SMALL_IMAGES = (
    "data.image_size=16",
    "model.channel_multipliers=[1,2]",
    "model.attention_resolutions=[8]",
)
SMALL_NETWORK = ("model.base_channels=16", "model.head_channels=null", "model.norm.groups=8")
MOST = {"--n": 4, "--steps": 3, "--resamplings": 2}
FEW = {
    "memorisation": ("--n", "40"),
    "diagnose": ("--levels", "3"),
    "reproduce": ("--steps", "2"),
    "report": ("--no-images",),
}
HASTE = "import rediffuse.plan; rediffuse.plan.MEASURED_S = 0.0\n"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, and what else a reader has."""
    folder = tmp_path_factory.mktemp("begun")
    for seed in (0, 1):
        words = (*TINY, "training.images=96", f"seed={seed}")
        zygote().run("train", *words, root=folder, env={"REDIFFUSE_ROOT": "runs"}, check=0)
    noise = np.random.default_rng(0)
    for name in (
        "photo",
        "hole",
        "a",
        "b",
        *(f"my/images/{c}/{n}" for c in "xy" for n in range(9)),
    ):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (70, 64, 3), np.uint8)).save(file)
    return folder


class Reader:
    """Somebody who types what a page says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._env = {"REDIFFUSE_ROOT": "runs", "OMP_NUM_THREADS": "1"}
        self._images = 96  # what a page makes longer is longer than any run there is
        runs = sorted(folder.glob("runs/*/run.json"), key=lambda file: file.stat().st_mtime)
        self._ids = [file.parent.name for file in runs]

    def follow(self, block: Block) -> None:
        """Do what one block says."""
        if block.title:
            place = self._folder / block.title
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(block.text)
        elif block.excuse:
            return
        elif block.language == "python":
            done = self._fork("", before=f"{self._named(block.text)}\nraise SystemExit(0)")
            assert done.returncode == 0, f"{block}: {done.stderr}"
        elif block.language in COMMANDS:
            for words in block.commands():
                self._type(block, words)

    def _type(self, block: Block, words: list[str]) -> None:
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self._env[name] = value
            return
        told = ours(words)
        assert told is not None, f"{block}: {words[0]} cannot be run here; say why it is not"
        shown = block.text.partition("\nerror: ")[2]
        typed = [self._named(word) for word in (told if shown else self._short(told))]
        done = self._fork(*typed)
        self._ids += re.findall(r"^run +([0-9a-f]{32})$", done.stdout, re.MULTILINE)
        if shown:
            assert done.stderr == f"error: {shown}", block
        assert done.returncode == (2 if shown else 0), (
            f"{block}: {typed}\n{done.stdout}{done.stderr}"
        )

    def _fork(self, *words: str, before: str = "") -> Done:
        path = "import sys; sys.path.insert(0, '')\n" if "PYTHONPATH" in self._env else ""
        return zygote().run(
            *words, root=self._folder, env=self._env, before=f"{path}{HASTE}{before}"
        )

    def _named(self, text: str) -> str:
        last, other = self._ids[-1], self._ids[-2]
        return re.sub(r"\bOTHER\b", other, re.sub(r"\bID\b", last, text))

    def _short(self, words: Sequence[str]) -> list[str]:
        """The same command, with less to do."""
        name, *rest = words
        if name in ("train", "plan", "resume"):
            return [name, *self._short_training(name, rest)]
        for option, most in MOST.items():
            if option in rest:
                at = rest.index(option) + 1
                rest[at] = str(min(int(rest[at]), most))
        rest = [re.sub(r"^(\d+)-\d+$", r"\1-3", word) for word in rest]
        rest = [re.sub(r"^step-\d+$", self._first_checkpoint(), word) for word in rest]
        if name in FEW and FEW[name][0] not in rest:
            rest += FEW[name]
        if name == "sample" and not {"--n", "--seeds", "--input"} & {*rest}:
            rest += ["--n", "4"]
        return [name, *rest]

    def _short_training(self, name: str, words: Sequence[str]) -> list[str]:
        if "--show-config" in words:
            return list(words)
        cut = [re.sub(r"^(training\.\w+_images)=\d+$", r"\1=16", word) for word in words]
        if name == "resume" or any(word.startswith("resume_from_run_id=") for word in words):
            self._images += 16
            kept = [word for word in cut if not word.startswith("training.epochs=")]
            return [*kept, "training.epochs=null", f"training.images={self._images}"]
        said = " ".join(words)
        added = [word for word in SMALL if word.partition("=")[0] not in said]
        if "model=" not in said:
            added += SMALL_NETWORK
        if "data.path=" in said:
            added += SMALL_IMAGES
        if "tracking." in said:
            added.remove("tracking=none")
        if "pairing=" in said:
            added += ["training.batch_size=64", "training.images=64"]  # whole blocks of 64
        return [*cut, *added]

    def _first_checkpoint(self) -> str:
        place = self._folder / self._env["REDIFFUSE_ROOT"] / self._ids[-1] / "checkpoints"
        return min(file.name for file in place.glob("step-*"))


def test_the_pages_that_are_followed_at_once_are_there() -> None:
    assert {relative(page) for page in PAGES} >= QUICK


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for page in PAGES
        for name in [relative(page)]
        if any(b.language in (*COMMANDS, "python") and not b.excuse for b in blocks(page))
    ],
)
def test_a_page_can_be_followed(page: Path, begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(begun, folder)
    reader = Reader(folder)
    for block in blocks(page):
        reader.follow(block)
