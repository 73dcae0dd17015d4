"""A run that is asked to stop says so, keeps its last step, and goes on to the last bit."""

import random
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults_harness import Done, Process, Zygote
from faults_runs import (
    GATE,
    WORDS,
    Golden,
    assert_clear,
    assert_same,
    checkpoints,
    images_in,
    place,
    runs_in,
    status,
    until_it_waits,
)

from rediffuse.processes import ENDING

CODES = {number: 128 + number for number in ENDING}
every = pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number, marks=() if number.name in ("SIGTERM", "SIGUSR1") else pytest.mark.slow
        )
        for number in ENDING
    ],
    ids=lambda number: number.name,
)
both = pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)


def waiting(zygote: Zygote, root: Path) -> Process:
    """A process that resumes the root's run and is about to take a step."""
    process = zygote.start("resume", runs_in(root)[0].name, root=root, before=GATE)
    until_it_waits(process)
    return process


@every
def test_a_signal_ends_a_run_as_killed_after_the_step_that_it_meets(
    zygote: Zygote, half: Path, golden: Golden, number: signal.Signals
) -> None:
    run = runs_in(half)[0]
    process = waiting(zygote, half)
    process.send(number)
    (half / "go").touch()
    done = process.wait()
    assert_clear(done, CODES[number])
    assert f"{number.name} received at 80 of" in done.stdout
    assert (status(run), images_in(checkpoints(run)[-1])) == ("KILLED", 80)
    zygote.run("resume", run.name, root=half, check=0)
    assert_same(run, golden)


def test_signals_that_come_together_are_one_and_lose_no_step(
    zygote: Zygote, half: Path, golden: Golden
) -> None:
    """As from a closed terminal and its shell, or from a launcher beside a scheduler."""
    process = waiting(zygote, half)
    for number in (signal.SIGHUP, signal.SIGTERM) * 2:
        process.send(number)
    (half / "go").touch()
    done = process.wait()
    assert_clear(done, CODES[signal.SIGHUP])
    run = runs_in(half)[0]
    assert (status(run), images_in(checkpoints(run)[-1])) == ("KILLED", 80)


@both
def test_a_second_signal_ends_a_run_at_once(
    zygote: Zygote, half: Path, golden: Golden, number: signal.Signals
) -> None:
    run = runs_in(half)[0]
    process = waiting(zygote, half)
    process.send(number)
    assert not process.ends_within(0.1)  # the first one lets the step end, which never does
    while not process.ends_within(0.05):
        process.send(number)
    assert process.wait().returncode in (-number, CODES[number])
    (half / "go").touch()
    zygote.run("resume", run.name, root=half, check=0)
    assert_same(run, golden)


@pytest.mark.slow
@both
def test_a_signal_at_any_of_10_random_moments_leaves_a_run_that_goes_on_to_the_last_bit(
    zygote: Zygote,
    tmp_path: Path,
    golden: Golden,
    number: signal.Signals,
) -> None:
    counts = Counter[str]()
    for key in range(10):
        root = place(tmp_path / str(key))
        moment = random.Random(key).uniform(0, golden.seconds)
        done = zygote.run("train", *WORDS, root=root, kill_after=moment, signal=number)
        # Before there is a run the signal has its usual effect, and after the last step none.
        assert_clear(done, CODES[number], -number, 0)
        ends = [status(run) for run in runs_in(root)]
        if done.returncode == CODES[number] and ends:
            assert ends == ["KILLED"], done
        for run in runs_in(root):
            zygote.run("resume", run.name, root=root, check=0)
            assert_same(run, golden)
        counts[f"exit {done.returncode} {' '.join(ends) or 'without a run'}"] += 1
    print(f"{number.name} at 10 random moments: {dict(counts)}")


# Run before a command: drawing a preview takes two steps, and `draws` is there after the first.
DRAWING = """
import os, time
from pathlib import Path
from rediffuse import drawing
states, parent = drawing.states, os.getppid()
def slow_states(*arguments):
    for state in states(*arguments):
        yield state
        Path("draws").touch()
        while not Path("go").exists() and os.getppid() == parent:
            time.sleep(0.005)
drawing.states = slow_states
"""


def broken_off(zygote: Zygote, root: Path) -> Done:
    """The end of a process that resumes the root's run and gets a signal as it draws."""
    for file in (root / "draws", root / "go"):
        file.unlink(missing_ok=True)
    process = zygote.start("resume", runs_in(root)[0].name, root=root, before=DRAWING)
    while not (root / "draws").exists():
        assert not process.ends_within(0.005), process.wait()
    process.send(signal.SIGTERM)
    assert not process.ends_within(0.1)
    (root / "go").touch()
    return process.wait()


@pytest.mark.parametrize(("images", "times"), [(128, 2), (192, 1)], ids=["midway", "last"])
def test_a_signal_ends_a_preview_which_is_drawn_when_the_run_goes_on(
    zygote: Zygote, half: Path, golden: Golden, images: int, times: int
) -> None:
    run = runs_in(half)[0]
    if images == 192:
        zygote.run("resume", run.name, "training.stop_after_images=176", root=half)
    for _ in range(times):
        done = broken_off(zygote, half)
        assert_clear(done, 143)
        assert f"SIGTERM received at {images} of 192" in done.stdout
        assert f"rediffuse resume {run.name}\n" in done.stdout.partition(" received")[2]
        assert (status(run), images_in(checkpoints(run)[-1])) == ("KILLED", images)
        assert not (run / "samples" / f"preview-{images:010}.png").exists()
    zygote.run("resume", run.name, root=half, check=0)
    assert_same(run, golden)


def test_a_preview_that_was_drawn_is_not_owed_for_other_batches(zygote: Zygote, half: Path) -> None:
    run = runs_in(half)[0]
    words = ["training.preview_every_images=100", "training.stop_after_images=144"]
    zygote.run("resume", run.name, *words, root=half, check=0)
    zygote.run("resume", run.name, "training.batch_size=48", root=half, check=0)
    drawn = sorted(int(file.stem[8:]) for file in (run / "samples").glob("preview-*.png"))
    assert drawn == [112, 192]


# Both outputs are a pipe whose reader has gone, and a line is written at every log.
BROKEN = """
import os
from rediffuse import progress
progress.LINE_EVERY_S = 0.0
read, write = os.pipe()
os.dup2(write, 1), os.dup2(write, 2), os.close(read), os.close(write)
"""


def test_outputs_whose_reader_has_gone_do_not_end_training(
    zygote: Zygote, half: Path, golden: Golden
) -> None:
    run = runs_in(half)[0]
    zygote.run("resume", run.name, root=half, before=BROKEN, check=0)
    assert_same(run, golden)


@pytest.mark.slow
@pytest.mark.parametrize("how", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full"])
def test_closed_or_full_outputs_do_not_end_training(
    tmp_path: Path, golden: Golden, how: str
) -> None:
    root = place(tmp_path / "root")
    command = shlex.join([sys.executable, "-m", "rediffuse", "train", "--root", ".", *WORDS])
    done = subprocess.run(
        f"exec {command} {how}", shell=True, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert_clear(Done(done.args, done.returncode, done.stdout, done.stderr), 0)
    assert_same(runs_in(root)[0], golden)


@pytest.mark.slow
def test_mlflow_is_told_that_a_run_was_killed_and_then_that_it_finished(
    zygote: Zygote, tmp_path: Path
) -> None:
    root = place(tmp_path / "root")

    def told() -> list[tuple[str]]:
        with sqlite3.connect(root / "mlflow.db") as store:
            return store.execute("select status from runs").fetchall()

    process = zygote.start("train", *WORDS, "tracking=mlflow", root=root, before=GATE)
    until_it_waits(process)
    process.send(signal.SIGTERM)
    (root / "go").touch()
    assert_clear(process.wait(), 143)
    assert told() == [("KILLED",)]
    run = runs_in(root)[0]
    zygote.run("resume", run.name, root=root, check=0)
    assert (status(run), told()) == ("FINISHED", [("FINISHED",)])
