"""A checkpoint that was cut short or has one byte changed is set aside; the one before is used."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from cli import TINY, run_id
from faults_harness import Done, Zygote
from faults_runs import status

from rediffuse.errors import CheckpointError
from rediffuse.training.committed import checkpoints, newest, verify

FILES = (
    "model.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "learned.safetensors",
    "state.json",
    "manifest.json",
)
KINDS = ("cut short", "one byte changed")
WORDS = (
    *TINY,
    "schedule=learned",
    "training.previews=false",
    "training.images=192",
    "training.checkpoint_every_images=48",
    "training.validate_every_images=96",
    "training.keep_checkpoints=4",
)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """A finished run with four checkpoints, in a root of its own."""
    root = tmp_path_factory.mktemp("golden")
    return root / run_id(zygote.run("train", *WORDS, root=root, check=0))


@pytest.fixture
def run(golden: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(golden.parent, tmp_path / "root")) / golden.name


def damage(file: Path, kind: str, key: int) -> int:
    """Damage a file at a keyed place; the same key is the same place. Return the place."""
    whole, drawn = file.read_bytes(), Random(f"{kind} {file.name} {key}")
    at = drawn.randrange(len(whole))
    if kind == "cut short":
        os.truncate(file, at)
    else:
        with file.open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes([whole[at] ^ drawn.randrange(1, 256)]))
    return at


@contextmanager
def mended(file: Path) -> Iterator[None]:
    """Bring a file back when it has been damaged and looked at."""
    whole = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def kept(run: Path) -> dict[str, bytes]:
    """What a refusal may not change: all but the lock, and who had it last."""
    names = (".lock", ".owner")
    return {name: data for name, data in contents(run).items() if name not in names}


def assert_refused(done: Done, *words: str) -> None:
    """Exit code 2 and one line that says what is wrong."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(r"error: .*\n", done.stderr), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_noticed_and_the_checkpoint_before_is_used(
    golden: Path, file: str, kind: str
) -> None:
    assert noticed(golden / "checkpoints", file, kind, range(1)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_damage_at_200_places_of_each_file_is_noticed_200_times(
    golden: Path, file: str, kind: str
) -> None:
    count = noticed(golden / "checkpoints", file, kind, range(200))
    print(f"{file}, {kind}: {count} of 200 noticed, set aside, the checkpoint before used")
    assert count == 200


def noticed(folder: Path, file: str, kind: str, keys: range) -> int:
    """Damage the newest checkpoint again and again; count how often all went as it should."""
    before, last = checkpoints(folder)[-2:]
    aside, count = last.with_name(f"{last.name}.corrupt"), 0
    for key in keys:
        lines: list[str] = []
        with mended(last / file):
            at = damage(last / file, kind, key)
            used = newest(folder, lines.append)
            assert used == before, f"{file} {kind} at byte {at} was used: {lines}"
            assert len(lines) == 1
            assert f"{last.name}: " in lines[0]
            assert f"set aside as {aside.name}" in lines[0]
            aside.rename(last)
        count += 1
    assert newest(folder) == last, "mended, it is the newest again"
    return count


@pytest.mark.slow
def test_no_byte_of_a_manifest_changes_its_meaning_unnoticed(golden: Path) -> None:
    """White space for white space is all that may pass: what is read is then the same."""
    manifest = checkpoints(golden / "checkpoints")[-1] / "manifest.json"
    whole = manifest.read_bytes()
    meaning, harmless, changed = json.loads(whole), 0, 0
    for at in range(len(whole)):
        for mask in (0x01, 0x20, 0x2A, 0x80):
            changed += 1
            with mended(manifest):
                manifest.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
                try:
                    verify(manifest.parent)
                except CheckpointError:
                    continue
                assert json.loads(manifest.read_bytes()) == meaning, f"byte {at}, mask {mask:#x}"
                harmless += 1
    print(f"manifest.json: {changed} changes, {changed - harmless} noticed, {harmless} harmless")


RESUMED = [(file, kind) for file in FILES for kind in KINDS]


@pytest.mark.parametrize(
    ("file", "kind"),
    [pytest.param(*both, marks=[] if both == RESUMED[5] else pytest.mark.slow) for both in RESUMED],
)
def test_resume_goes_on_from_the_checkpoint_before_and_ends_bit_equal(
    golden: Path, run: Path, zygote: Zygote, file: str, kind: str
) -> None:
    damage(run / "checkpoints" / "step-00000004" / file, kind, 1)
    broken = contents(run / "checkpoints" / "step-00000004")
    done = zygote.run("resume", run.name[:8], root=run.parent, check=0)
    [told] = [line for line in done.stdout.splitlines() if "set aside" in line]
    assert told.startswith("step-00000004: ")
    assert file in told or (file == "manifest.json" and "manifest" in told)
    assert "from 144 to 192 images" in done.stdout
    ends = [r / "checkpoints" / "step-00000004" for r in (golden, run)]
    assert contents(ends[0]) == contents(ends[1])
    assert contents(run / "checkpoints" / "step-00000004.corrupt") == broken
    assert status(run) == "FINISHED"


def test_sample_draws_from_the_checkpoint_before_and_says_so(
    golden: Path, run: Path, zygote: Zygote
) -> None:
    damage(run / "checkpoints" / "step-00000004" / "average.safetensors", KINDS[1], 2)
    drawn = []
    for one, which in ((run, "latest"), (golden, "3")):
        out = run.parent / f"drawn-{which}"
        words = ("sample", one.name, "--n", "8", "--checkpoint", which, "--output-dir", str(out))
        done = zygote.run(*words, root=one.parent, check=0)
        assert done.stderr.count("step-00000004: average.safetensors") == (one is run)
        drawn.append((out / "grid.png").read_bytes())
        assert json.loads((out / "manifest.json").read_text())["checkpoint"] == "step-00000003"
    assert drawn[0] == drawn[1]


def test_where_every_checkpoint_is_damaged_nothing_begins_from_zero_and_nothing_is_lost(
    run: Path, zygote: Zygote
) -> None:
    for number, one in enumerate(checkpoints(run / "checkpoints")):
        damage(one / FILES[number], KINDS[number % 2], number)
    before = kept(run)
    for words in (("resume", run.name), ("sample", run.name, "--n", "1"), ("resume", run.name)):
        done = zygote.run(*words, root=run.parent)
        assert_refused(done, "no checkpoint in", "verifies")
        for number in range(1, 5):
            assert f"step-{number:08d}" in done.stderr, "each one's damage is named, every time"
        after = {name.replace(".corrupt/", "/"): data for name, data in kept(run).items()}
        assert after == before


def test_an_older_checkpoint_that_is_damaged_does_not_end_training(
    run: Path, zygote: Zygote
) -> None:
    """What is looked up for retention, the best validation loss, is in older checkpoints."""
    os.truncate(run / "checkpoints" / "step-00000003" / "state.json", 10)
    words = ("training.images=288", "training.keep_checkpoints=2")
    zygote.run("resume", run.name, *words, root=run.parent, check=0)
    assert newest(run / "checkpoints") == run / "checkpoints" / "step-00000006"


@pytest.mark.slow
def test_the_best_of_some_damaged_checkpoints_is_drawn_from_or_refused_in_one_line(
    run: Path, zygote: Zygote
) -> None:
    os.truncate(run / "checkpoints" / "step-00000004" / "state.json", 10)
    done = zygote.run("sample", run.name, "--n", "1", "--checkpoint", "best", root=run.parent)
    if done.returncode:
        assert_refused(done, "step-00000004")
    else:
        assert "Traceback" not in done.stderr


def test_a_run_whose_checkpoints_are_gone_does_not_begin_from_zero(
    run: Path, zygote: Zygote
) -> None:
    shutil.move(run / "checkpoints", run.parent / "elsewhere")
    before = kept(run)
    for words in (("resume", run.name), ("sample", run.name, "--n", "1")):
        assert_refused(zygote.run(*words, root=run.parent), "checkpoint")
        assert kept(run) == before
    shutil.move(run.parent / "elsewhere", run / "checkpoints")
    zygote.run("resume", run.name, root=run.parent, check=0)


GOES = """
from rediffuse.training import committed
verify = committed.verify
def goes(at, *rest, **more):
    if at.name == "step-00000004" and at.exists():
        at.rename(at.with_name(".trash-step-00000004"))
    return verify(at, *rest, **more)
committed.verify = goes
"""


def test_a_checkpoint_that_training_removes_while_sample_looks_is_passed_by(
    run: Path, zygote: Zygote
) -> None:
    words = ("sample", run.name, "--n", "1", "--output-dir", str(run.parent / "drawn"))
    zygote.run(*words, root=run.parent, before=GOES, check=0)
    facts = json.loads((run.parent / "drawn" / "manifest.json").read_text())
    assert facts["checkpoint"] == "step-00000003"
