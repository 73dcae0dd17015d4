"""Somebody who types what a page says, in a folder with all that a reader has.

Commands are as they stand, but made short: words that make a training small are added, numbers of
images and steps are cut, `ID` is the page's last run and `OTHER` the one before. What a block shows
as refused must be. Data sets that are downloaded lie in `datasets` already, with few images.
"""

import hashlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cli import TINY, zygote
from documents import COMMANDS, Block, ours
from faults_harness import TIMEOUT_S, Done
from PIL import Image
from published import write_idx

SMALL = (
    "training.epochs=null",
    "training.images=32",
    "training.batch_size=16",
    "training.log_every_images=16",
    "training.preview_count=4",
    "training.validation_images=16",
    "training.validate_every_images=16",
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
MOST = {"--n": 4, "--num-samples": 4, "--steps": 3, "--resamplings": 2, "--likelihood": 4}
JUDGING = ("evaluate", "sweep")
FEW = {
    "diagnose": ("--levels", "3"),
    "evaluate": ("--n", "40"),
    "memorisation": ("--n", "40"),
    "report": ("--no-images",),
    "reproduce": ("--steps", "2"),
    "sweep": ("--n", "40"),
}
HASTE = """
import rediffuse.judging, rediffuse.plan, rediffuse.references
rediffuse.plan.MEASURED_S = 0.0
rediffuse.references.CLASSIFIER_IMAGES = 640
rediffuse.judging.MEASURE |= {"kernel_subsets": 3}
"""
INSTALLING = ("pip install uv", "uv sync", "source .venv/bin/activate")
"""What continuous integration has done before it comes to the tests; nothing else is left out."""
SERVERS = ("mlflow", "tensorboard")
CIFAR = "cifar-10-batches-py"


def furnish(folder: Path) -> None:
    """Put two finished runs and what else a reader has into a folder."""
    for seed in (0, 1):
        words = (*TINY, "training.images=96", "training.validate_every_images=48", f"seed={seed}")
        zygote().run("train", *words, root=folder, env={"REDIFFUSE_ROOT": "runs"}, check=0)
    noise = np.random.default_rng(0)
    pictures = ["photo", "hole", "a", "b"]
    for place, count in (("my/images", 9), ("imagenet100/train", 24), ("theirs", 12), ("real", 12)):
        pictures += [f"{place}/{c}/{n}" for c in "xy" for n in range(count)]
    for name in pictures:
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        height = 64 if name.startswith(("theirs", "real")) else 70
        Image.fromarray(noise.integers(0, 256, (height, 64, 3), np.uint8)).save(file)
    datasets = folder / "datasets"
    for place, prefix in (("MNIST", ""), ("FashionMNIST", ""), ("EMNIST", "emnist-letters-")):
        test = f"{prefix}test" if prefix else "t10k"
        for part, count in ((f"{prefix}train", 96), (test, 32)):
            images = noise.integers(0, 256, (count, 28, 28), np.uint8)
            write_idx(datasets / place / "raw", part, images, np.arange(count) % 9 + 1)
    (datasets / CIFAR).mkdir()
    for name, count in (("data_batch_1", 96), ("test_batch", 32)):
        images = noise.integers(0, 256, (count, 3072), np.uint8)
        batch = {"data": images, "labels": [n % 10 for n in range(count)]}
        (datasets / CIFAR / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {n}" for n in range(10)]}
    (datasets / CIFAR / "batches.meta").write_bytes(pickle.dumps(names))


class Reader:
    """Somebody who types what a page says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._env = {"REDIFFUSE_ROOT": "runs", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        self._images = 96  # what a page makes longer is longer than any run there is
        runs = sorted(folder.glob("runs/*/run.json"), key=lambda file: file.stat().st_mtime)
        self._ids = [file.parent.name for file in runs]
        self._published = published(folder / "datasets" / CIFAR)

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
        told = ours(words)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self._env[name] = value
        elif words[0] == "torchrun":
            assert told is not None
            self._run_in_two(block, self._short([self._named(word) for word in told]))
        elif words[0] in SERVERS:
            self._serve(block, words)
        elif " ".join(words) in INSTALLING:
            return
        elif told is None and words[:2] == ["python", "-m"]:
            subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
        else:
            assert told is not None, f"{block}: {words[0]} cannot be run here; say why it is not"
            self._tell(block, told)

    def _tell(self, block: Block, told: list[str]) -> None:
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
        published = self._published if "cifar10" in " ".join(words) else ""
        return zygote().run(
            *words, root=self._folder, env=self._env, before=f"{path}{HASTE}{published}{before}"
        )

    def _run_in_two(self, block: Block, words: list[str]) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        done = subprocess.run(
            [*launch, "-m", "rediffuse", *words],
            cwd=self._folder,
            env={**os.environ, **self._env},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{block}: {words}\n{done.stdout}{done.stderr}"

    def _serve(self, block: Block, words: list[str]) -> None:
        """Start a server, and end it when it has answered."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        bin_folder = Path(sys.executable).parent
        server = subprocess.Popen(
            [bin_folder / words[0], *words[1:], "--port", str(port)],
            cwd=self._folder,
            env={**os.environ, **self._env, "PATH": f"{bin_folder}:{os.environ['PATH']}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not answers(f"http://127.0.0.1:{port}/"):
                assert server.poll() is None, f"{block}: {words} has ended"
                assert time.monotonic() < deadline, f"{block}: {words} does not answer"
                time.sleep(0.2)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def _named(self, text: str) -> str:
        last, other = self._ids[-1], self._ids[-2]
        return re.sub(r"\bID\b", last, re.sub(r"\bOTHER\b", other, text))

    def _short(self, words: Sequence[str]) -> list[str]:
        """The same command, with less to do."""
        name, *rest = words
        if name in ("train", "plan", "resume"):
            return [name, *self._short_training(name, rest)]
        for option, most in MOST.items():
            if option in rest:
                at = rest.index(option) + 1
                most = 40 if name in JUDGING and option in ("--n", "--num-samples") else most
                rest[at] = fewer(rest[at], most)
        rest = [re.sub(r"^(\d+)-\d+$", r"\1-3", word) for word in rest]
        rest = [re.sub(r"@\d+$", "@4", word) for word in rest]
        rest = [re.sub(r"^step-\d+$", self._first_checkpoint(), word) for word in rest]
        if name in FEW and not {FEW[name][0], "--num-samples", "--images"} & {*rest}:
            rest += FEW[name]
        if name in JUDGING and "--allow-small-n" not in rest:
            rest += ["--allow-small-n"]
        if name == "sample" and not {"--n", "--num-samples", "--seeds", "--input"} & {*rest}:
            rest += ["--n", "4"]
        return [name, *rest]

    def _short_training(self, name: str, words: Sequence[str]) -> list[str]:
        if "--show-config" in words:
            return list(words)
        cut = [re.sub(r"^(training\.\w+_images)=\d+$", r"\1=16", word) for word in words]
        cut = [re.sub(r"^(training\.images)=\d+$", r"\1=32", word) for word in cut]
        if name == "resume" or any(word.startswith("resume_from_run_id=") for word in words):
            self._images += 16
            kept = [word for word in cut if not word.startswith("training.epochs=")]
            return [*kept, "training.epochs=null", f"training.images={self._images}"]
        said = " ".join(words)
        added = [word for word in SMALL if word.partition("=")[0] not in said]
        if "model=" not in said:
            added += [word for word in SMALL_NETWORK if word.partition("=")[0] not in said]
        if "data.path=" in said:
            added += SMALL_IMAGES
        if "pairing=" in said:
            added += ["training.batch_size=64", "training.images=64"]  # whole blocks of 64
        return [*cut, *added]

    def _first_checkpoint(self) -> str:
        place = self._folder / self._env["REDIFFUSE_ROOT"] / self._ids[-1] / "checkpoints"
        return min(file.name for file in place.glob("step-*"))


def published(folder: Path) -> str:
    """Python after which torchvision takes these few images for CIFAR-10."""
    names = ("data_batch_1", "test_batch", "batches.meta")
    train, test, meta = (
        (name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in names
    )
    facts = {"filename": meta[0], "md5": meta[1], "key": "label_names"}
    return (
        "from torchvision.datasets import CIFAR10\n"
        f"CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta = [{train}], [{test}], {facts}\n"
    )


def fewer(numbers: str, most: int) -> str:
    """Numbers between commas, no two of which become one."""
    return ",".join(str(min(int(n), most + at)) for at, n in enumerate(numbers.split(",")))


def answers(address: str) -> bool:
    """Whether a page is there."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
