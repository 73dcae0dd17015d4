"""Two processes that work together see, draw and judge what one does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import TINY, rediffuse, run_id, zygote
from faults_harness import Done

from rediffuse.config.compose import compose
from rediffuse.errors import ConfigError
from rediffuse.images import prepare
from rediffuse.launch import fresh
from rediffuse.training.devices import Devices

LAUNCH = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
    *("-m", "rediffuse"),
)

SHORT = (*TINY, "training.previews=false", "training.checkpoint_every_images=48")


def together(
    *words: str, root: Path, before: str = "", env: dict[str, str] | None = None
) -> list[Done]:
    """How two processes of one launcher end; `before` is what the second one runs first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", **NO_GPU}
    started = [
        zygote().start(
            *words,
            root=root,
            before=before if rank == "1" else "",
            env={**shared, "RANK": rank, "LOCAL_RANK": rank, **(env or {})},
        )
        for rank in ("0", "1")
    ]
    return [process.wait(120) for process in started]


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The root and the run of two processes that were told of each other and of no device."""
    root = tmp_path_factory.mktemp("two")
    first, second = together("train", *SHORT, "training.images=144", root=root)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "run" not in second.stdout.split()  # Gloo says something of its own
    return root, run_id_of(root)


def run_id_of(root: Path) -> str:
    """The one run of a root."""
    (record,) = root.glob("*/run.json")
    return record.parent.name


@pytest.fixture
def run(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of that run in a root of its own."""
    root, name = trained
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return tmp_path / name


def seen(run: Path) -> list[int]:
    """The images seen at each checkpoint."""
    folders = sorted(f for f in (run / "checkpoints").iterdir() if "corrupt" not in f.name)
    return [json.loads((f / "state.json").read_text())["images_seen"] for f in folders]


def test_two_processes_without_a_gpu_train_one_run(trained: tuple[Path, str]) -> None:
    run = trained[0] / trained[1]
    facts = json.loads((run / "environment.json").read_text())
    assert (facts["ranks"], facts["device"]) == (2, "cpu")
    assert json.loads((run / "run.json").read_text())["status"] == "FINISHED"


def test_the_main_process_alone_sets_a_damaged_checkpoint_aside(run: Path) -> None:
    (run / "checkpoints/step-00000003/model.safetensors").write_bytes(b"damage")
    ends = together("resume", run.name, "training.images=192", root=run.parent)
    assert [end.returncode for end in ends] == [0, 0], ends
    assert [f"{end.stdout}{end.stderr}".count("set aside") for end in ends] == [1, 0]
    assert len([*(run / "checkpoints").glob("*.corrupt*")]) == 1
    assert seen(run)[-1] == 192


# A second process that would find an older checkpoint, as by a cached listing of a file system.
BEHIND = """
from rediffuse.training import committed
listed = committed.checkpoints
committed.checkpoints = lambda folder: listed(folder)[:-1]
"""
# One that cannot read the one that it is told to load.
BLIND = """
from rediffuse.errors import CheckpointError
from rediffuse.training import checkpoint
def load_checkpoint(state, folder):
    raise CheckpointError(f"{folder.name} is not there")
checkpoint.load_checkpoint = load_checkpoint
"""
# One that loads something else.
OTHER = """
import torch
from rediffuse.training import checkpoint
load = checkpoint.load_checkpoint
def load_checkpoint(state, folder):
    load(state, folder)
    with torch.no_grad():
        next(state.network.parameters()).add_(1)
checkpoint.load_checkpoint = load_checkpoint
"""


def test_every_process_goes_on_from_the_checkpoint_that_the_main_one_finds(run: Path) -> None:
    words = ("resume", run.name, "training.images=192")
    ends = together(*words, root=run.parent, before=BEHIND)
    assert [end.returncode for end in ends] == [0, 0], ends
    assert seen(run)[-2:] == [144, 192]


@pytest.mark.parametrize(
    ("before", "code", "message"),
    [
        (BLIND, 2, "process 1 of 2: step-00000003 is not there"),
        (OTHER, 1, "process 1 differs from process 0 in weights"),
    ],
)
def test_a_process_that_has_not_loaded_what_the_main_one_has_ends_all_before_a_step(
    run: Path, before: str, code: int, message: str
) -> None:
    ends = together("resume", run.name, "training.images=192", root=run.parent, before=before)
    for end in ends:
        assert end.returncode == code, end
        assert message in end.stderr
    assert seen(run)[-1] == 144


def test_a_batch_norm_is_refused_where_each_process_sees_a_part_of_a_batch(tmp_path: Path) -> None:
    words = ("training.images=48", "rate.horizon_images=48", "training.precision=fp32")
    config = compose([*SHORT, *words, "model.norm={name: batch}"])
    images = prepare(config.data, tmp_path)
    cpu = torch.device("cpu")
    fresh(config, images, Devices(cpu))
    with pytest.raises(ConfigError, match=r"batch norm.*2 processes"):
        fresh(config, images, Devices(cpu, 1, 2))


def test_what_does_not_divide_its_work_is_refused_in_several_processes(run: Path) -> None:
    for words in (("reproduce", run.name), ("train", "-m", "seed=0,1")):
        for end in together(*words, root=run.parent):
            assert end.returncode == 2, end
            assert "works in one process, not 2" in end.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_up_to_rounding(tmp_path: Path) -> None:
    words = ["train", *TINY, "training.images=480"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    run_id(rediffuse(*words, "device=cpu", root=alone))
    in_two(*words, root=shared)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)  # sums are in another order


@pytest.mark.slow
@pytest.mark.parametrize("told", ["0", "1", "all"])
def test_a_signal_that_one_of_two_processes_gets_ends_both_with_a_checkpoint(
    tmp_path: Path, told: str
) -> None:
    words = ["train", *TINY, "training.images=480000", "training.previews=false"]
    words += ["training.log_every_images=48", "training.compile=false"]
    said = tmp_path / "said"
    with (
        said.open("w") as file,
        subprocess.Popen(
            [*LAUNCH, *words],
            env={**os.environ, **NO_GPU, "REDIFFUSE_ROOT": str(tmp_path)},
            stdout=file,
            stderr=file,
            start_new_session=True,
        ) as launcher,
    ):
        try:
            metrics = until(lambda: next(iter(tmp_path.glob("*/metrics.jsonl")), None), launcher)
            until(lambda: len(metrics.read_text().splitlines()) > 20, launcher)
            if told == "all":  # as Ctrl-C does, and the launcher passes it on once more
                os.killpg(launcher.pid, signal.SIGINT)
            else:
                os.kill(worker(launcher.pid, told), signal.SIGTERM)
            launcher.wait(120)
        finally:
            launcher.terminate()
    assert "RuntimeError" not in said.read_text()  # as of a rank that waits for one that has left
    run = metrics.parent
    record = json.loads((run / "run.json").read_text())
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    seen = json.loads((checkpoint / "state.json").read_text())["images_seen"]
    assert (record["status"], record["images_seen"]) == ("KILLED", seen)
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["images"] == seen
    longer = f"training.images={seen + 48}"
    rediffuse("resume", run.name, longer, root=tmp_path)


def until(found: Callable[[], Any], launcher: subprocess.Popen[bytes]) -> Any:
    """What is found in the end, as long as somebody is at work."""
    end = time.monotonic() + 300
    while not (it := found()):
        assert launcher.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return it


def worker(launcher: int, rank: str) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (pid,) = (
        pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()
    )
    return int(pid)


@pytest.mark.slow
def test_two_processes_draw_and_judge_as_one(tmp_path: Path) -> None:
    words = [*TINY, "training.images=480", "threads=1"]
    run = run_id(rediffuse("train", *words, "device=cpu", root=tmp_path))
    sample = ["sample", run, "--seeds", "3-26", "--output-dir"]
    judge = ["evaluate", run, "--allow-small-n", "--json", "--num-samples"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    rediffuse(*sample, str(alone), root=tmp_path)
    in_two(*sample, str(shared), root=tmp_path)
    pictures = sorted(file.name for file in alone.glob("*.png"))
    assert len(pictures) == 25
    for name in pictures:
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
    for count in ("144", "40"):  # the first of two has none of 40, as one looks at 64 at once
        of_one = json.loads(rediffuse(*judge, count, root=tmp_path).stdout)
        kept = first_object(in_two(*judge, count, root=tmp_path))
        again = first_object(in_two(*judge, count, "--again", root=tmp_path))
        assert kept == of_one
        assert again["figures"] == of_one["figures"]
        assert again["created"] != of_one["created"]
        assert again["cost"]["evaluations"] == of_one["cost"]["evaluations"]


def first_object(told: str) -> dict[str, Any]:
    """JSON among what Gloo prints there, too."""
    found: dict[str, Any]
    found, _ = json.JSONDecoder().raw_decode(told[told.index("{") :])
    return found


def in_two(*words: str, root: Path) -> str:
    """What a command prints that two processes work at."""
    return subprocess.run(
        [*LAUNCH, *words],
        env={**os.environ, **NO_GPU, "REDIFFUSE_ROOT": str(root)},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def losses(root: Path) -> list[float]:
    (metrics,) = root.glob("*/metrics.jsonl")
    rows = map(json.loads, metrics.read_text().splitlines())
    return [row[name] for row in rows for name in ("loss", "validation/loss") if name in row]
