"""`reproduce` says PASS for what is untouched, and names step and cause for what is not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import TINY, content, edit, run_id
from cli import rediffuse as cli
from PIL import Image

import rediffuse

# 24 images in batches of 8: digests at the steps 1, 2, 3 (a checkpoint), 4, 6, 8 and 9.
FOLDER = (
    "experiment=digits",
    "data=folder",
    "data.path=pictures",
    *TINY,
    "data.image_size=8",
    "data.channels=1",
    "data.validation_fraction=0",
    "training.batch_size=8",
    "training.images=72",
    "training.preview_count=1",
    "training.checkpoint_every_images=24",
    "rate=constant",
    "rate.warmup_images=0",
)
Fault = Callable[[Path, pytest.MonkeyPatch], None]
DIGESTS = [8, 16, 24, 32, 48, 64, 72]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run of 9 steps on a folder of 24 pictures."""
    root = tmp_path_factory.mktemp("golden")
    (root / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(root / f"pictures/{number:02}.png")
    run_id(cli("train", *FOLDER, root=root))
    return root


@pytest.fixture
def root(golden: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return shutil.copytree(golden, tmp_path / "root")


def the_run(root: Path) -> Path:
    return next(iter(root.glob("*/run.json"))).parent


def test_an_untouched_run_passes_and_nothing_is_left_or_changed(root: Path) -> None:
    before, run = content(root), the_run(root)
    assert [row["images"] for row in digests(run)] == [0, *DIGESTS]
    done = cli("reproduce", run.name[:8], root=root)
    assert "PASS: 7 digests equal up to 72 images\n" in done.stdout
    assert "differs" not in done.stdout
    assert content(root) == before
    assert [path.name for path in root.iterdir() if (path / "run.json").exists()] == [run.name]


def another_seed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(the_run(root) / "config.yaml", "\nseed: 0\n", "\nseed: 1\n")


def one_edited_picture(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = the_run(root) / "config.yaml"  # of a copy, whose images lie in the copy, too
    config.write_text(re.sub(r"\S+/pictures", str(root / "pictures"), config.read_text()))
    file = root / "pictures/05.png"
    pixels = np.array(Image.open(file))
    pixels[3, 3] ^= 255
    Image.fromarray(pixels).save(file)


def one_edited_source_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(Path(rediffuse.__file__).parent, root / "src" / "rediffuse")
    old = "noised, _error(denoiser, noised).square())"
    edit(copy / "losses.py", old, old.replace("square()", "square() * 1.001"))
    monkeypatch.setenv("PYTHONPATH", str(copy.parent))


def one_changed_digest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = the_run(root) / "logs" / "digests.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[5]["average"] = "0" * 16
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


ALL = "loss, gradient_norm, weights, average, optimizer"
FAULTS = {
    another_seed: (f"step 1 (8 images) in {ALL}; equal up to step 0", "seed: 0, now 1"),
    one_edited_picture: (f"step 2 (16 images) in {ALL}; equal up to step 1", "data.fingerprint: "),
    one_edited_source_file: (f"step 1 (8 images) in {ALL}; equal up to step 0", "code_sha256: "),
    one_changed_digest: (
        "step 6 (48 images) in average; equal up to step 4",
        "another machine or nondeterministic kernels",
    ),
}
FAST = (another_seed, one_edited_picture, one_edited_source_file)


@pytest.mark.parametrize(
    "fault",
    [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS],
    ids=lambda fault: fault.__name__,
)
def test_what_was_touched_is_named_with_the_step_and_the_cause(
    root: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(root, monkeypatch)
    done = cli("reproduce", the_run(root).name, root=root, check=1)
    where, cause = FAULTS[fault]
    assert f"FAIL: they part at {where}" in done.stdout, done.stdout
    causes = re.findall("^likely  (.*)", done.stdout, re.MULTILINE)
    assert len(causes) == 1, done.stdout
    assert causes[0].startswith(cause)
    assert len(list(root.glob("*/run.json"))) == 1
    assert done.stderr == ""


def test_a_changed_packed_pixel_is_mended_before_a_run_is_trained_again(root: Path) -> None:
    (file,) = root.glob("packed/*/train/images.npy")
    pixels = np.load(file)
    whole = pixels.copy()
    pixels[5, 0, 3, 3] ^= 255
    np.save(file, pixels)
    done = cli("reproduce", the_run(root).name, "--steps", "2", root=root)
    assert "PASS: 2 digests equal up to 16 images\n" in done.stdout
    assert "the digest of train images 0 to 23 differs); packing again" in done.stderr
    assert np.array_equal(np.load(file), whole)


def test_another_number_of_threads_is_told_whether_it_parts_or_not(root: Path) -> None:
    edit(the_run(root) / "config.yaml", "\nthreads: 1\n", "\nthreads: 2\n")
    done = cli("reproduce", the_run(root).name, "--steps", "2", root=root, check=None)
    assert "differs torch.threads: 1, now 2\n" in done.stdout
    if done.returncode:
        assert "likely  torch.threads: 1, now 2\n" in done.stdout
    else:
        assert "PASS: 2 digests equal up to 16 images\n" in done.stdout


@pytest.mark.slow
def test_a_resumed_run_has_the_digests_of_a_straight_one_and_a_copy_can_be_kept(
    golden: Path, root: Path, tmp_path: Path
) -> None:
    straight = the_run(golden)
    shutil.rmtree(the_run(root))
    first = cli("train", *FOLDER, "training.stop_after_images=40", root=root)
    run = root / run_id(first)
    with (run / "logs" / "digests.jsonl").open("a") as file:  # of a process killed after its save
        file.write('{"images": 48, "time": 1.0, "loss": "wrong"}\n{"images": 56, "ti')
    cli("resume", run.name, "training.learning_rate=1e-3", root=root)
    assert digests(run)[:5] == digests(straight)[:5]
    assert [row["images"] for row in digests(run)] == [0, *DIGESTS]
    done = cli("reproduce", run.name, "--keep", "--root-for-copy", "kept", root=root)
    assert "PASS: 7 digests equal up to 72 images\n" in done.stdout
    kept = the_run(root / "kept")
    assert digests(kept) == digests(run)[1:]
    assert digests(kept)[5:] != digests(straight)[6:]
    shown = json.loads(cli("show", kept.name, "--json", "--root", "kept", root=root).stdout)
    assert (shown["parent"], shown["status"], shown["images"]) == (run.name, "FINISHED", 72)


@pytest.mark.slow
def test_code_that_changed_before_a_resume_is_named_in_show_and_as_the_cause(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(the_run(root))
    run = root / run_id(cli("train", *FOLDER, "training.stop_after_images=40", root=root))
    with monkeypatch.context() as edited:
        one_edited_source_file(root, edited)
        changed = "code_sha256 after 40 images: "
        assert f"changed {changed}" in cli("resume", run.name, root=root).stdout
    shown = json.loads(cli("show", run.name, "--json", root=root).stdout)
    assert shown["bit-comparable"] is False
    assert [cause.startswith(changed) for cause in shown["because"]] == [True]
    done = cli("reproduce", run.name, root=root, check=1)
    assert "FAIL: they part at step 6 (48 images)" in done.stdout
    assert re.findall("^likely  (.*: )", done.stdout, re.MULTILINE) == [changed]


def digests(run: Path) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "logs" / "digests.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.slow
def test_a_run_that_begins_again_has_one_beginning(golden: Path, root: Path) -> None:
    run = the_run(root)
    shutil.rmtree(run / "checkpoints")  # as if killed before the first one
    edit(run / "run.json", '"images_seen": 72', '"images_seen": 0')
    edit(run / "run.json", '"status": "FINISHED"', '"status": "RUNNING"')
    cli("resume", run.name, "training.learning_rate=1e-3", "training.images=16", root=root)
    assert [row["images"] for row in digests(run)] == [0, 8, 16]
    assert "PASS: 2 digests" in cli("reproduce", run.name, root=root).stdout


def no_digests(run: Path) -> None:
    (run / "logs" / "digests.jsonl").unlink()


def no_beginning(run: Path) -> None:
    edit(run / "logs" / "digests.jsonl", '"training.batch_size": 8', '"training.batch_size": 0')


@pytest.mark.parametrize("damage", [no_digests, pytest.param(no_beginning, marks=pytest.mark.slow)])
def test_a_run_without_digests_is_refused_in_one_line(
    root: Path, damage: Callable[[Path], None]
) -> None:
    damage(the_run(root))
    done = cli("reproduce", the_run(root).name, root=root, check=2)
    assert done.stdout == ""
    assert re.fullmatch(r"error: run \w+ has no digests from its first step on .*\n", done.stderr)


def test_a_comparison_that_did_not_reach_every_digest_is_no_success(root: Path) -> None:
    file = the_run(root) / "logs" / "digests.jsonl"
    *rows, one, last = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*rows, last, one]))  # training ends at the digest that is last
    done = cli("reproduce", the_run(root).name, root=root, check=1)
    ended = "training ended before the last digest; 5 of 7 digests compared, all equal"
    assert done.stdout.splitlines()[-1] == f"UNFINISHED: {ended}"


@pytest.mark.slow
def test_an_interrupted_comparison_leaves_nothing(root: Path) -> None:
    run = the_run(root)
    command = [sys.executable, "-m", "rediffuse", "reproduce", run.name, "--root", str(root)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    assert process.returncode == 143
    assert len(list(root.glob("*/run.json"))) == 1
