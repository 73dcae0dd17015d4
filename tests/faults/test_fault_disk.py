"""A disk that is full, a limit that is met, a folder that cannot be written: nothing is lost."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import TINY, run_id
from faults_harness import Done, Zygote
from faults_runs import rows, runs_in, status

from rediffuse.training.committed import checkpoints, verify

WORDS = (
    *TINY,
    "training.images=192",
    "training.checkpoint_every_images=48",
    "training.log_every_images=48",
    "training.validate_every_images=96",
    "training.preview_every_images=96",
)
HALF = "training.stop_after_images=96"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """The same run on a disk with room enough."""
    root = tmp_path_factory.mktemp("golden")
    return root / run_id(zygote.run("train", *WORDS, root=root, check=0))


@pytest.fixture
def disk(tmp_path: Path, golden: Path) -> Iterator[Path]:
    """A disk with room for two checkpoints and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    one = sum(f.stat().st_size for f in checkpoints(golden / "checkpoints")[-1].iterdir())
    mount = ("mount", "-t", "tmpfs", "-o", f"size={int(2.5 * one) + 400_000}", "tmpfs", place)
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(("umount", "-l", place), check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(("mount", "-o", f"remount,{how}", disk), check=True)


def one_line(done: Done) -> str:
    """The only thing that a failure may say on standard error, progress apart."""
    assert done.returncode in (1, 2), (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == done.stderr.splitlines()[-1:], done.stderr
    return errors[0]


def assert_nothing_half_written(run: Path) -> None:
    """Every checkpoint verifies, and no temporary file or folder is left."""
    for checkpoint in checkpoints(run / "checkpoints"):
        verify(checkpoint)
    left = [path for path in run.rglob(".*") if path.name not in {".lock", ".owner"}]
    assert not left, left


def assert_same_end(golden: Path, run: Path) -> None:
    ends = [checkpoints(one / "checkpoints")[-1] for one in (golden, run)]
    assert ends[0].name == ends[1].name
    for file in ends[0].iterdir():
        assert file.read_bytes() == (ends[1] / file.name).read_bytes(), file.name
    assert rows(golden / "metrics.jsonl") == rows(run / "metrics.jsonl")
    assert status(run) == "FINISHED"


def test_a_checkpoint_that_does_not_fit_ends_the_run_as_failed_and_is_made_up_for(
    disk: Path, golden: Path, zygote: Zygote
) -> None:
    done = zygote.run("train", *WORDS, root=disk)
    assert done.returncode == 1, done.stdout + done.stderr
    [run] = runs_in(disk)
    needed, free = numbers(one_line(done))
    assert needed > free
    assert needed >= sum(
        f.stat().st_size for f in checkpoints(golden / "checkpoints")[-1].iterdir()
    )
    assert status(run) == "FAILED"
    assert [c.name for c in checkpoints(run / "checkpoints")] == ["step-00000001", "step-00000002"]
    assert_nothing_half_written(run)
    again = zygote.run("resume", run.name, root=disk)  # as full as before
    assert one_line(again)
    assert again.returncode == 1
    assert_nothing_half_written(run)
    remount(disk, "size=64m")
    zygote.run("resume", run.name, root=disk, check=0)
    assert_same_end(golden, run)


def numbers(line: str) -> tuple[int, int]:
    """Bytes needed and free, as the line says."""
    found = re.search(r"([\d,]+) bytes needed, ([\d,]+) free", line)
    assert found, line
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    return needed, free


def test_a_limit_on_the_size_of_files_ends_the_run_as_failed_and_is_made_up_for(
    tmp_path: Path, golden: Path, zygote: Zygote
) -> None:
    run = tmp_path / run_id(zygote.run("train", *WORDS, HALF, root=tmp_path, check=0))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    done = zygote.run("resume", run.name, root=tmp_path, before=limit)
    assert done.returncode == 1, done.stdout + done.stderr
    needed, _ = numbers(one_line(done))
    assert needed > 1_000_000
    assert status(run) == "FAILED"
    assert checkpoints(run / "checkpoints")[-1].name == "step-00000002"
    assert_nothing_half_written(run)
    zygote.run("resume", run.name, root=tmp_path, check=0)
    assert_same_end(golden, run)


FILL = """
import os, sys
count = 0
def fill(event, args):
    global count
    if event != "open" or not isinstance(args[0], str) or "{what}" not in args[0]:
        return
    if not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    count += 1
    if count == {time}:
        handle = os.open("filler", os.O_WRONLY | os.O_CREAT)
        for block in (2**16, 2**12, 1):
            try:
                while os.write(handle, bytes(block)):
                    pass
            except OSError:
                pass
sys.addaudithook(fill)
"""
# What is written when the disk is found full, and which time that it is opened for writing.
FULL = {
    "the first metrics": ("metrics.jsonl", 1),
    "the first digests": ("digests.jsonl", 1),
    "the first checkpoint's weights": ("model.safetensors", 1),
    "the second checkpoint's manifest": ("manifest.json", 2),
    "the record at the second checkpoint": ("run.json", 4),
    "the last record": ("run.json", 7),
    "a preview": ("preview-", 1),
    "the last preview": ("preview-", 2),
    "the list of artifacts": ("artifacts.jsonl", 1),
    "the losses of epochs": ("metrics.json.", 1),
}
FAST = ("the second checkpoint's manifest",)


@pytest.mark.parametrize(
    "what", [pytest.param(w, marks=[] if w in FAST else pytest.mark.slow) for w in FULL]
)
def test_a_disk_that_is_full_when_something_is_written_costs_a_clear_line_and_no_image(
    disk: Path, golden: Path, zygote: Zygote, what: str
) -> None:
    remount(disk, "size=64m")
    name, time = FULL[what]
    done = zygote.run("train", *WORDS, root=disk, before=FILL.format(what=name, time=time))
    assert (disk / "filler").exists(), "the disk was never filled: the test has lost its object"
    print(f"full at {what}: {one_line(done)}")
    [run] = runs_in(disk)
    assert_nothing_half_written(run)
    assert status(run) in ("FAILED", "RUNNING")  # RUNNING without a process is shown as stale
    shown = zygote.run("runs", root=disk, check=0).stdout
    assert "stale" in shown or "FAILED" in shown
    (disk / "filler").unlink()
    zygote.run("resume", run.name, root=disk, check=0)
    assert_same_end(golden, run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["config.yaml", "environment.json", ".owner", "run.json", "packed"]
)
def test_a_disk_that_is_full_at_the_beginning_leaves_nothing_that_harms_other_runs(
    disk: Path, golden: Path, zygote: Zygote, what: str
) -> None:
    remount(disk, "size=64m")
    one_line(zygote.run("train", *WORDS, root=disk, before=FILL.format(what=what, time=1)))
    (disk / "filler").unlink()
    zygote.run("runs", root=disk, check=0)
    for half in runs_in(disk):
        done = zygote.run("resume", half.name, root=disk)
        assert one_line(done) if done.returncode else status(half) == "FINISHED"
        shutil.rmtree(half)
    zygote.run("train", *WORDS, root=disk, check=0)
    [run] = runs_in(disk)
    assert_same_end(golden, run)


def test_a_disk_that_cannot_be_written_is_refused_in_one_line_and_can_still_be_read(
    disk: Path, golden: Path, tmp_path: Path, zygote: Zygote
) -> None:
    remount(disk, "size=64m")
    run = disk / run_id(zygote.run("train", *WORDS, HALF, root=disk, check=0))
    remount(disk, "ro")
    try:
        for words in (("resume", run.name), ("train", *WORDS)):
            assert re.search("[Rr]ead-only", one_line(zygote.run(*words, root=disk)))
        for words in (("show", run.name), ("runs",)):
            zygote.run(*words, root=disk, check=0)
        out = ("--n", "4", "--output-dir", str(tmp_path / "drawn"))
        zygote.run("sample", run.name, *out, root=disk, check=0)
    finally:
        remount(disk, "rw")
    zygote.run("resume", run.name, root=disk, check=0)
    assert_same_end(golden, run)


@pytest.mark.slow
def test_a_file_where_a_folder_should_be_is_refused_in_one_line(
    tmp_path: Path, golden: Path, zygote: Zygote
) -> None:
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in one_line(
            zygote.run("train", *WORDS, "--root", str(root), root=tmp_path)
        )
    copy = shutil.copytree(golden.parent, tmp_path / "root") / golden.name
    shutil.move(copy / "checkpoints", tmp_path / "elsewhere")
    (copy / "checkpoints").write_text("mine")
    before = rows(copy / "metrics.jsonl")
    for words in (("resume", copy.name), ("sample", copy.name)):
        assert "checkpoint" in one_line(zygote.run(*words, root=copy.parent))
    assert (copy / "checkpoints").read_text() == (tmp_path / "file").read_text() == "mine"
    assert rows(copy / "metrics.jsonl") == before
