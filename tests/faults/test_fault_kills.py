"""A process that is killed, anywhere and again and again, leaves a run that goes on to the end."""

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faults_harness import Done, Zygote
from faults_runs import (
    INTERVAL,
    WORDS,
    Golden,
    assert_answered,
    assert_clear,
    assert_same,
    checkpoints,
    images_in,
    place,
    rows,
    runs_in,
)

KILLED = -9
# One checkpoint is written while training goes on, and the next one waits for it.
AT_RISK = 2 * INTERVAL


def lost(run: Path) -> int:
    """Images that the run had seen, as far as it says, and that no checkpoint knows of."""
    said = [*rows(run / "metrics.jsonl"), *rows(run / "logs" / "digests.jsonl")]
    seen = max((row["images"] for row in said), default=0)
    return seen - max(map(images_in, checkpoints(run)), default=0)


def finished(zygote: Zygote, root: Path, golden: Golden) -> None:
    """Resume what a kill left, or begin anew where it left no run; hold it to the golden one."""
    if not runs_in(root):
        assert_clear(zygote.run("runs", root=root), 0)
        zygote.run("train", *WORDS, root=root, check=0)
    for run in runs_in(root):
        assert_answered(zygote, root, run)
        zygote.run("resume", run.name, root=root, check=0)
        assert_same(run, golden)


def killed_at_random(zygote: Zygote, root: Path, golden: Golden, key: int) -> Counter[str]:
    """Kill a run, and some of the processes that resume it; count what happened."""
    moments, counts = random.Random(key), Counter(runs=1)
    place(root)

    def killed(*words: str) -> Done:
        done = zygote.run(*words, root=root, kill_after=moments.uniform(0, golden.seconds))
        assert_clear(done, KILLED, 0)
        counts["kills"] += done.returncode == KILLED
        return done

    killed("train", *WORDS)
    for run in runs_in(root):
        while moments.random() < 0.5:
            assert lost(run) < AT_RISK, run
            killed("resume", run.name)
        counts["checkpoints found"] += len(checkpoints(run))
        counts["lost more than an interval"] += lost(run) > INTERVAL
        assert lost(run) < AT_RISK, run
    counts["no run yet"] += not runs_in(root)
    finished(zygote, root, golden)
    return counts


@pytest.mark.parametrize("key", range(2))
def test_a_run_killed_at_any_moment_goes_on_to_the_last_bit(
    zygote: Zygote, tmp_path: Path, golden: Golden, key: int
) -> None:
    killed_at_random(zygote, tmp_path, golden, key)


@pytest.mark.slow
def test_it_holds_for_200_random_moments(zygote: Zygote, tmp_path: Path, golden: Golden) -> None:
    counts, failures = Counter[str](), []
    for key in range(200):
        try:
            counts += killed_at_random(zygote, tmp_path / str(key), golden, key)
        except AssertionError as failure:
            failures.append(f"{key}: {str(failure)[-900:]}")
    print(f"random kills: {dict(counts)}, {len(failures)} failures")
    assert not failures, "\n".join(failures)


# Kills this process just before its COUNT-th change to a file whose description has POINT in it.
AT_EVENT = """
import os, re, signal, sys
root, left = os.getcwd(), COUNT
changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link"}
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
def look(event, args):
    global left
    if event not in changes and not (event == "open" and args[2] & writing):
        return
    path = os.path.join(root, os.fsdecode(args[0])) if not isinstance(args[0], int) else ""
    if path.startswith(root) and re.search(POINT, f"{event} {args}"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(look)
"""


def at(point: str, count: int = 1) -> str:
    return AT_EVENT.replace("POINT", repr(point)).replace("COUNT", str(count))


POINTS = {
    "train": {
        "the run's directory": r"rename.*/[0-9a-f]{32}'",
        "its lock's owner": "rename.*owner",
    },
    "resume": {
        "a checkpoint's temporary folder": "mkdir.*00000008",
        "a checkpoint's manifest": "open.*00000008.*manifest",
        "a checkpoint's rename": "rename.*step-00000008",
        "an old checkpoint's rename": "rename.*step-00000004.*trash",
        "the epochs of a run at its end": "rename.*metrics.json",
    },
}


FAST = (
    "the run's directory",
    "a checkpoint's manifest",
    "a checkpoint's rename",
    "the epochs of a run at its end",
)


def some(command: str) -> list[Any]:
    return [
        pytest.param(point, marks=() if point in FAST else pytest.mark.slow)
        for point in POINTS[command]
    ]


@pytest.mark.parametrize("point", some("train"))
def test_a_new_run_killed_before_a_named_point_goes_on_or_was_never_there(
    zygote: Zygote, tmp_path: Path, golden: Golden, point: str
) -> None:
    root = place(tmp_path / "root")
    zygote.run("train", *WORDS, root=root, before=at(POINTS["train"][point]), check=KILLED)
    finished(zygote, root, golden)


@pytest.mark.parametrize("point", some("resume"))
def test_a_run_killed_before_a_named_point_loses_an_interval_and_a_write_at_most(
    zygote: Zygote, half: Path, golden: Golden, point: str
) -> None:
    run = runs_in(half)[0]
    zygote.run("resume", run.name, root=half, before=at(POINTS["resume"][point]), check=KILLED)
    assert lost(run) < AT_RISK
    finished(zygote, half, golden)


def test_what_a_kill_left_half_written_is_removed_and_nothing_else_is(
    zygote: Zygote, half: Path
) -> None:
    run = runs_in(half)[0]
    left = [run / f".run.json.{'0' * 32}", run / "logs" / f".mlflow.json.{'1' * 32}"]
    others = [run / ".gitignore", run / "logs" / ".mlflow.json"]
    for file in (*left, *others):
        file.touch()
    zygote.run("resume", run.name, root=half, check=0)
    assert [file.exists() for file in (*left, *others)] == [False, False, True, True]


def test_nothing_is_removed_through_a_link(zygote: Zygote, half: Path) -> None:
    run, elsewhere = runs_in(half)[0], half / "elsewhere"
    elsewhere.mkdir()
    mine = [elsewhere / ".profile", elsewhere / f".run.json.{'0' * 32}"]
    for file in mine:
        file.touch()
    (run / "samples").symlink_to(elsewhere)
    assert_clear(zygote.run("resume", run.name, root=half), 0, 2)
    assert all(file.exists() for file in mine)


@pytest.mark.slow
def test_it_holds_before_every_change_of_a_file(
    zygote: Zygote, tmp_path: Path, golden: Golden
) -> None:
    failures = []
    for count in itertools.count(1):
        root = place(tmp_path / str(count))
        if zygote.run("train", *WORDS, root=root, before=at("", count)).returncode != KILLED:
            break
        try:
            for run in runs_in(root):
                again = random.Random(count).randint(1, 60)
                zygote.run("resume", run.name, root=root, before=at("", again))
                assert lost(run) < AT_RISK
            finished(zygote, root, golden)
        except AssertionError as failure:
            failures.append(f"{count}: {str(failure)[-900:]}")
    print(f"killed before each of {count - 1} changes of a file: {len(failures)} failures")
    assert not failures, "\n".join(failures)
