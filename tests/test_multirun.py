"""`rediffuse train -m`: one run after another, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli import TINY, rediffuse, run_id

from rediffuse import cli, processes

Ended = tuple[int, signal.Signals | None]


def test_show_config_shows_every_combination_and_trains_none(tmp_path: Path) -> None:
    words = (
        "train",
        *TINY,
        "training.images=48",
        "seed=3,4",
        "-m",
        "--show-config",
        "--run-name",
        "a name",
    )
    shown = [*yaml.safe_load_all(rediffuse(*words, root=tmp_path).stdout)]
    assert [(config["seed"], config["name"]) for config in shown] == [(3, "a name"), (4, "a name")]
    assert [*tmp_path.iterdir()] == []


def test_show_config_shows_what_a_run_would_be_resumed_with(tmp_path: Path) -> None:
    run = run_id(rediffuse("train", *TINY, "training.images=48", "seed=7", root=tmp_path))
    words = (f"resume_from_run_id={run}", "training.images=96", "--show-config")
    shown = yaml.safe_load(rediffuse("train", *words, root=tmp_path).stdout)
    assert (shown["seed"], shown["training"]["images"]) == (7, 96)
    record = json.loads((tmp_path / run / "run.json").read_text())
    assert record["images_seen"] == 48


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Let children end in these ways, one after the other; the words that they are started with."""

    def prepare(*ends: Ended) -> list[list[str]]:
        commands: list[list[str]] = []
        left: Iterator[Ended] = iter(ends)

        def run(words: list[str]) -> Ended:
            commands.append(words[words.index("rediffuse") + 1 :])
            return next(left)

        monkeypatch.setattr(processes, "run", run)
        return commands

    return prepare


def exit_code(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "-m", *words])
    return ended.value.code


def test_every_option_is_passed_on(
    started: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rediffuse"])
    commands = started((0, None), (0, None))
    options = ("--trust", "mine", "--trust", "yours", "--root", "there", "--run-name", "a name")
    assert exit_code("seed=0,1", *options, "--config", "my.yaml") == 0
    shared = ["--config=my.yaml", "--run-name=a name", "--root=there"]
    shared += ["--trust=mine", "--trust=yours"]
    assert commands == [["train", *shared, f"seed={seed}"] for seed in (0, 1)]


def test_the_exit_code_is_the_highest_and_a_signal_ends_all(
    started: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rediffuse"])
    assert len(started((0, None), (137, None), (1, None))) == 0
    assert exit_code("seed=0,1,2") == 137
    commands = started((0, None), (0, signal.SIGUSR1), (0, None))
    assert exit_code("seed=0,1,2") == 128 + signal.SIGUSR1
    assert len(commands) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_the_parent_ends_the_run_with_a_checkpoint_and_begins_no_other(
    tmp_path: Path, number: signal.Signals
) -> None:
    words = (*TINY, "training.images=480000", "training.previews=false", "device=cpu")
    command = [sys.executable, "-m", "rediffuse", "train", "-m", "seed=0,1", *words]
    environment = {**os.environ, "REDIFFUSE_ROOT": str(tmp_path)}
    with subprocess.Popen(command, env=environment, start_new_session=True) as parent:
        metrics = until(lambda: next(iter(tmp_path.glob("*/metrics.jsonl")), None), parent)
        until(metrics.read_text, parent)
        parent.send_signal(number)
        assert parent.wait(120) == 128 + number
    (record,) = tmp_path.glob("*/run.json")
    facts = json.loads(record.read_text())
    (checkpoint,) = record.parent.glob("checkpoints/step-*")
    seen = json.loads((checkpoint / "state.json").read_text())["images_seen"]
    assert (facts["status"], facts["images_seen"]) == ("KILLED", seen)
    with pytest.raises(ProcessLookupError):  # of the whole session nobody is left
        os.killpg(parent.pid, 0)


def until(found: Callable[[], Any], parent: "subprocess.Popen[bytes]") -> Any:
    """What is found in the end, as long as the parent is at work."""
    end = time.monotonic() + 300
    while not (it := found()):
        assert parent.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return it
