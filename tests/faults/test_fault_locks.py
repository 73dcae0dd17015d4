"""A run has one writer at a time; a dead one is in nobody's way."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from faults_harness import Process, Zygote
from faults_runs import GATE, Golden, assert_clear, assert_same, runs_in


def loser(one: Process, other: Process) -> tuple[Process, Process]:
    """Wait until one of two ends; return it and the one that goes on."""
    for _ in range(6000):
        if one.ends_within(0.005):
            return one, other
        if other.ends_within(0.005):
            return other, one
    raise AssertionError(f"neither {one.pid} nor {other.pid} gave way")


def raced(zygote: Zygote, root: Path, golden: Golden, *, killed: bool) -> None:
    """Let two resume a run at once; end the winner well or by a kill, and the run by another."""
    run = runs_in(root)[0]
    both = [zygote.start("resume", run.name, root=root, before=GATE) for _ in range(2)]
    refused, winner = loser(*both)
    done = refused.wait()
    assert_clear(done, 2)
    assert f"in use by process {winner.pid} on {socket.gethostname()}" in done.stderr
    listed = zygote.run("runs", "--json", root=root, check=0)
    assert json.loads(listed.stdout)[0]["status"] == "RUNNING"
    if killed:
        winner.send(9)
        winner.wait()  # a signal is on its way for a while
        listed = zygote.run("runs", "--json", root=root, check=0)
        assert json.loads(listed.stdout)[0]["status"] == "stale"
    (root / "go").touch()
    # Nobody waits for a lock longer than half a second: who enters, entered at once.
    last = zygote.run("resume", run.name, root=root) if killed else winner.wait()
    assert_clear(last, 0)
    winner.wait()
    assert_same(run, golden)


@pytest.mark.parametrize("killed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_of_two_that_resume_at_once_one_trains_and_the_next_enters_when_it_is_dead(
    zygote: Zygote, half: Path, golden: Golden, killed: bool
) -> None:
    raced(zygote, half, golden, killed=killed)


@pytest.mark.slow
def test_it_holds_50_times(
    zygote: Zygote,
    tmp_path: Path,
    stopped: Path,
    golden: Golden,
) -> None:
    for count in range(50):
        root = shutil.copytree(stopped, tmp_path / str(count))
        raced(zygote, root, golden, killed=bool(count % 2))
    print("50 races of two for one run: 50 had one winner; of 25 killed the next entered")


def test_resume_of_a_finished_run_says_so_and_changes_nothing(zygote: Zygote, half: Path) -> None:
    run = runs_in(half)[0]
    zygote.run("resume", run.name, root=half, check=0)
    before = state_of(half)
    done = zygote.run("resume", run.name[:8], root=half, check=0)
    assert f"run {run.name} is finished at 192 images; nothing to do" in done.stdout
    assert state_of(half) == before


def state_of(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and bytes, but for what a process writes to be the only one."""
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes())
        for file in root.rglob("*")
        if file.is_file() and not file.name.endswith((".lock", ".owner"))
    }
