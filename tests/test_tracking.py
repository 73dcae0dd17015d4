"""Metrics are safe in the run's own files; trackers get each of them once, whatever happens."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rediffuse.config.compose import checked, compose
from rediffuse.errors import ConfigError, RunError
from rediffuse.networks.unet import UNet
from rediffuse.randomness import Stream, torch_seeded
from rediffuse.tracking import feeder, mlflow, tensorboard
from rediffuse.tracking.journal import Journal, owes, replay
from rediffuse.tracking.jsonl import append_metrics, cut_back, read_metrics
from rediffuse.tracking.tracker import Held, Row, Tracker

# MLflow's own tables, as the newest SQLAlchemy sees them.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

GRIDS = {c: np.random.default_rng(c).integers(0, 256, (4, 6, c), np.uint8) for c in (1, 3, 4)}


class Memory:
    """A tracker in memory; the calls numbered in `failing`, from 0 on, fail."""

    name = "memory"

    def __init__(self, failing: Container[int] = (), held: Held = "everything") -> None:
        self.failing, self.held = failing, held
        self.failed = threading.Event()
        self.calls: list[str] = []
        self.points: list[tuple[str, int, float]] = []
        self.files: list[tuple[str, bytes]] = []

    def _work(self, call: str) -> None:
        self.calls.append(call)
        if len(self.calls) - 1 in self.failing:
            self.failed.set()
            raise ConnectionError("no route to host\nand a long story")

    def open(self, params: Mapping[str, Any]) -> Held:
        self._work(f"open {dict(params)}")
        return self.held

    def metrics(self, rows: Sequence[Row]) -> None:
        self._work("metrics")
        self.points += points(rows)

    def artifact(self, path: Path, name: str, images_seen: int) -> None:
        self._work(f"artifact {images_seen}")
        self.files.append((name, path.read_bytes()))

    def close(self, status: str) -> None:
        self._work(f"close {status}")


class Hanging(Memory):
    """A tracker that answers only when the test is over."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def open(self, params: Mapping[str, Any]) -> Held:
        self.let_go.wait(30)
        return "everything"


def points(rows: Sequence[Row]) -> list[tuple[str, int, float]]:
    """Every metric of every row: its name, images seen and value."""
    return [
        (key, int(row["images"]), value)
        for row in rows
        for key, value in row.items()
        if key not in ("images", "time")
    ]


@pytest.fixture
def lines() -> list[str]:
    """What the user was told."""
    return []


@pytest.fixture(autouse=True)
def flush_at_once(monkeypatch) -> None:
    """Feeders do not wait before they deliver."""
    monkeypatch.setattr(feeder, "FLUSH_S", 0.01)


@pytest.fixture
def journal(tmp_path: Path, lines: list[str]) -> Callable[..., Journal]:
    """Journals of one run."""
    return lambda *trackers: Journal(tmp_path, trackers, {"a": {"b": 0}}, lines.append)


def test_a_tracker_that_is_named_twice_is_one():
    words = ["tracking.trackers=[tensorboard,mlflow,tensorboard]"]
    config = compose(words)
    assert config.tracking.trackers == ["tensorboard", "mlflow"]
    assert checked(config.model_dump()) == config


# The file


def test_rows_are_read_back_as_they_were_written_and_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"loss": 0.1, "a/b": float("nan"), "up": float("inf"), "down": float("-inf")}
    append_metrics(path, values, 1280)
    append_metrics(path, {"loss": 1e-300}, 1281)
    first, second = read_metrics(path)
    np.testing.assert_equal(
        {k: v for k, v in first.items() if k != "time"}, values | {"images": 1280}
    )
    assert (second["images"], second["loss"]) == (1281, 1e-300)
    assert 0 <= time.time() - first["time"] < 60
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_run_without_metrics_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_torn_at_any_byte_is_removed_before_the_next_is_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for images in (10, 20):
        append_metrics(path, {"loss": images / 7}, images)
    whole, complete = path.read_bytes(), read_metrics(path)
    for size in range(whole.index(b"\n") + 1, len(whole) - 1):
        for mend in (lambda: cut_back(path, 20), lambda: None):
            path.write_bytes(whole[:size])
            assert read_metrics(path) == complete[:1]
            mend()
            append_metrics(path, {"loss": 0.5}, 30)
            assert [row["images"] for row in read_metrics(path)] == [10, 30]


@pytest.mark.parametrize("mend", [cut_back, lambda path, images_seen: None])
def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path, mend):
    path = tmp_path / "metrics.jsonl"
    for images in (10, 20):
        append_metrics(path, {"loss": images / 7}, images)
    path.write_bytes(path.read_bytes()[:-1])
    mend(path, 20)
    append_metrics(path, {"loss": 0.5}, 30)
    assert [row["images"] for row in read_metrics(path)] == [10, 20, 30]


@pytest.mark.parametrize("torn", [b"\0" * 5000, b'{"images": 20, "time', b"[" * 5000, b"\xff"])
def test_whatever_a_power_cut_left_after_the_last_line_is_removed(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"loss": 0.1}, 10)
    with path.open("ab") as file:
        file.write(torn)
    append_metrics(path, {"loss": 0.2}, 30)
    assert [row["images"] for row in read_metrics(path)] == [10, 30]


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"loss": 0.1}, 10)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, hard))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            append_metrics(path, {"loss": 0.2}, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_nothing_is_appended_to_a_pipe_or_through_a_link(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="pipe is not a regular file"):
        append_metrics(tmp_path / "pipe", {"loss": 0.1}, 10)
    with pytest.raises(OSError, match="link"):
        append_metrics(tmp_path / "link", {"loss": 0.1}, 10)
    assert (tmp_path / "elsewhere").read_bytes() == b""


@pytest.mark.parametrize("images_seen", [0, 10, 15, 30, 99])
def test_cut_back_keeps_the_rows_up_to_the_restored_point(tmp_path, images_seen):
    path = tmp_path / "metrics.jsonl"
    for images in (10, 10, 20, 30):
        append_metrics(path, {"loss": 0.1 * images}, images)
    before = read_metrics(path)
    cut_back(path, images_seen)
    assert read_metrics(path) == [row for row in before if row["images"] <= images_seen]


def test_cut_back_keeps_the_rows_of_evaluations_and_what_was_written_after_them(tmp_path):
    path, undone = tmp_path / "metrics.jsonl", tmp_path / "undone.jsonl"
    for images, name in (
        (10, "loss"), (20, "loss"), (30, "loss"), (20, "evaluation/fd_9/ddim"), (20, "epoch/loss"),
        (30, "evaluation/fd_9/ddim"), (30, "validation/loss"),
    ):  # fmt: skip
        append_metrics(path, {name: images / 7}, images)
    before = read_metrics(path)
    cut_back(path, 20, undone)
    assert read_metrics(path) == [before[i] for i in (0, 1, 3, 4, 5)]
    assert read_metrics(undone) == [before[i] for i in (2, 6)]


def test_a_damaged_line_is_refused_in_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damage in (
        '{"images": 1, "loss"',
        "[1]",
        '{"loss": 1}',
        '{"images": 1, "time": 0.5, "a": []}',
    ):
        path.write_text(damage + "\n")
        with pytest.raises(RunError, match=r"metrics.jsonl: the line before byte \d+ is"):
            read_metrics(path)


@pytest.mark.parametrize("name", ["images", "time"])
def test_a_metric_cannot_take_the_name_of_a_field(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        append_metrics(tmp_path / "metrics.jsonl", {name: 1.0}, 1)


# The feeder


@pytest.mark.parametrize("failing", [(), (0, 1), (1,), (2,), (1, 3, 6, 13)])
def test_a_tracker_that_fails_now_and_then_gets_everything_once(journal, lines, tmp_path, failing):
    tracker = Memory(failing)
    run = journal(tracker)
    run.start(0)
    for images in range(0, 1280, 128):
        run.metrics({"loss": images / 3, "rate": 1e-3}, images)
        run.images("preview", GRIDS[3], images)
    assert run.close("FINISHED", timeout_s=20.0)
    assert tracker.points == points(read_metrics(tmp_path / "metrics.jsonl"))
    assert [name for name, _ in tracker.files] == [
        f"samples/preview-{images:010d}.png" for images in range(0, 1280, 128)
    ]
    assert tracker.calls[0] == "open {'a.b': 0}"
    assert tracker.calls[-1] == "close FINISHED"
    told = "memory: no route to host (nothing is lost; trying again)"
    assert lines == [told] * bool(failing)
    assert not owes(tmp_path, "memory")


def test_a_tracker_that_hangs_neither_slows_training_nor_holds_its_end(journal, lines, tmp_path):
    hanging, working = Hanging(), Memory()
    working.name = "working"
    run = journal(hanging, working)
    run.start(0)
    began = time.monotonic()
    for images in range(100):
        run.metrics({"loss": 1.0}, images)
    assert not run.close("FINISHED", timeout_s=1.0)
    assert time.monotonic() - began < 3.0
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(working.points) == 100
    assert owes(tmp_path, "memory")
    assert not owes(tmp_path, "working")
    assert lines == [
        "memory: not everything was delivered in time; the run's own files are complete, and "
        f"`rediffuse resume {tmp_path.name}` sends the rest"
    ]
    hanging.let_go.set()


def test_what_a_tracker_missed_is_sent_by_a_later_process_once(journal, lines, tmp_path):
    broken = Memory(failing=range(10**9))
    run = journal(broken)
    run.start(0)
    run.metrics({"loss": 1.0}, 1)
    run.images("preview", GRIDS[1], 1)
    assert not run.close("KILLED", timeout_s=0.1)
    for late in (Memory(), Memory()):
        assert replay(tmp_path, [late], {}, lines.append, "KILLED", timeout_s=20.0)
        seen = [tmp_path / "samples/preview-0000000001.png"] if late.calls[1:-1] else []
        assert late.points == points(read_metrics(tmp_path / "metrics.jsonl"))[: len(seen)]
        assert [content for _, content in late.files] == [path.read_bytes() for path in seen]
    assert late.calls == []


EVALUATION = {"evaluation/fd_classifier_40/heun-18-g1-average": 3.25}


@pytest.mark.parametrize("away", [False, True])
def test_rows_that_are_added_in_any_order_reach_a_tracker_once_whoever_sends_them(
    journal, lines, tmp_path, away
):
    trackers, path = [Memory()], tmp_path / "metrics.jsonl"
    run = journal(*trackers)
    run.start(0)
    run.metrics({"loss": 1.0}, 30)
    assert run.close("FINISHED", timeout_s=20.0)
    for images in (30, 10, 20, 10):  # the last one with another value
        append_metrics(path, {name: images + len(trackers) for name in EVALUATION}, images)
        assert owes(tmp_path, "memory")
        if away:
            down = Memory(failing=range(10**9))
            assert not replay(tmp_path, [down], {}, lines.append, "FINISHED", timeout_s=20.0)
            assert down.calls == ["open {}"]  # tried once
            assert lines[-2:] == [
                "memory: no route to host (nothing is lost)",
                "memory: not everything was delivered in time; the run's own files are complete, "
                f"and `rediffuse resume {tmp_path.name}` sends the rest",
            ]
        trackers.append(Memory())
        assert replay(tmp_path, trackers[-1:], {}, lines.append, "FINISHED", timeout_s=20.0)
        assert not owes(tmp_path, "memory")
        assert len(trackers[-1].points) == 1
    sent = [point for tracker in trackers for point in tracker.points]
    assert sent == points(read_metrics(path))


def test_a_row_that_comes_out_otherwise_when_trained_again_is_sent_too(journal, tmp_path):
    first, second = Memory(), Memory()
    for tracker, images, scale in ((first, 10, 1.0), (second, 10, 2.0)):
        run = journal(tracker)
        run.start(images)
        for after in (20, 30):
            run.metrics({"loss": scale * after}, after)
        assert run.close("KILLED", timeout_s=20.0)
    assert second.points == [("loss", 20, 40.0), ("loss", 30, 60.0)]


@pytest.mark.parametrize(("held", "again"), [("everything", 0), ("closed", 1), ("nothing", 2)])
def test_what_a_tracker_does_not_hold_any_more_is_sent_again(journal, tmp_path, held, again):
    """The second process delivers and is not confirmed, the third begins with what is held."""
    trackers = [Memory(), Memory(failing=[3]), Memory(held=held)]
    for images, tracker in enumerate(trackers):
        if images < 2:
            run = journal()
            run.start(images)
            run.metrics({"loss": 1.0 + images}, images)
            run.images("preview", GRIDS[3], images)
        confirmed = replay(tmp_path, [tracker], {}, print, "KILLED", timeout_s=20.0)
        assert confirmed == (images != 1)
    assert len(trackers[1].points) == len(trackers[1].files) == 1
    assert [value for *_, value in trackers[2].points] == [1.0, 2.0][2 - again :]
    assert len(trackers[2].files) == again


def test_the_record_of_an_earlier_version_is_understood(lines, tmp_path):
    path = tmp_path / "metrics.jsonl"
    name = next(iter(EVALUATION))
    for images, key in ((10, "loss"), (20, "loss"), (20, name), (10, name), (30, "loss")):
        append_metrics(path, {key: images / 7}, images)
    (tmp_path / "logs").mkdir()
    old = {"metrics": {"loss": 20, name: 20}, "artifacts": 0, "closed": "FINISHED"}
    (tmp_path / "logs" / "memory.json").write_text(json.dumps(old))
    late = Memory()
    assert owes(tmp_path, "memory")
    assert replay(tmp_path, [late], {}, lines.append, "FINISHED", timeout_s=20.0)
    # It never sent an evaluation of fewer images than one before, and did not come to the last row.
    assert late.points == [(name, 10, 10 / 7), ("loss", 30, 30 / 7)]
    assert not owes(tmp_path, "memory")
    assert replay(tmp_path, [Memory(failing=range(9))], {}, lines.append, "FINISHED")


def test_a_file_that_was_sent_is_not_sent_by_the_next_process(journal, lines, tmp_path):
    first, second = Memory(failing=range(2, 10**9)), Memory()
    run = journal(first)
    run.start(0)
    paths = [run.images("preview", GRIDS[3], images) for images in (1, 2)]
    assert first.failed.wait(20)
    assert not run.close("KILLED", timeout_s=0.1)
    assert replay(tmp_path, [second], {}, lines.append, "KILLED", timeout_s=20.0)
    assert [[name for name, _ in tracker.files] for tracker in (first, second)] == [
        [path.relative_to(tmp_path).as_posix()] for path in paths
    ]


def test_training_that_went_back_sends_only_what_is_new(journal, tmp_path):
    first, second = Memory(), Memory()
    run = journal(first)
    run.start(0)
    for images in (10, 20, 30):
        run.metrics({"loss": images / 7}, images)
    assert run.close("KILLED", timeout_s=20.0)
    run = journal(second)
    run.start(10)
    for images in (20, 30, 40):
        run.metrics({"loss": images / 7}, images)
        run.metrics({"validation": images / 3}, images)
    assert run.close("FINISHED", timeout_s=20.0)
    both = first.points + second.points
    assert sorted(both) == sorted(points(read_metrics(tmp_path / "metrics.jsonl")))
    assert ("loss", 30, 30 / 7) not in second.points


def test_a_row_that_comes_out_the_same_again_keeps_what_clock_and_machine_said_first(
    journal, tmp_path
):
    path = tmp_path / "metrics.jsonl"
    run = journal()
    run.start(0)
    for images in (10, 20, 30):
        clocked = {"images_per_s": 100.0, "system/cpu_percent": 7.0}
        run.metrics({"loss": images / 7, "bad": float("nan"), **clocked}, images)
    first = read_metrics(path)
    for start in (10, 20):  # killed again at 20: row 30 is in neither file any more but the list
        run = journal()
        run.start(start)
        run.metrics(
            {"loss": (start + 10) / 7, "bad": float("nan"), "images_per_s": 7.0}, start + 10
        )
    np.testing.assert_equal(read_metrics(path), first)
    run = journal()
    run.start(20)
    run.metrics({"loss": 0.5, "bad": 1.0, "images_per_s": 7.0}, 30)
    *same, changed = read_metrics(path)
    np.testing.assert_equal(same, first[:2])
    assert changed.pop("time") >= first[2]["time"]
    assert changed == {"images": 30, "loss": 0.5, "bad": 1.0, "images_per_s": 7.0}


def test_a_tracker_that_lost_the_run_gets_all_of_it_again(journal, tmp_path):
    for tracker, images in ((Memory(), 1), (Memory(held="nothing"), 2)):
        run = journal(tracker)
        run.start(images - 1)
        run.metrics({"loss": images / 3}, images)
        run.images("preview", GRIDS[3], images)
        assert run.close("KILLED", timeout_s=20.0)
    assert tracker.points == points(read_metrics(tmp_path / "metrics.jsonl"))
    assert [name[-5:] for name, _ in tracker.files] == ["1.png", "2.png"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("memory.json", '{"sent": 1}'),
        ("memory.json", '{"metrics": 3, "artifacts": 0, "closed": null}'),
        ("memory.jsonl", '{"images": 1, "time": 0.5, "rows": [1]}\n'),
        ("memory.jsonl", '{"images": 1, "time": 0.5, "opened": "perhaps"}\n'),
    ],
)
def test_a_damaged_record_of_deliveries_stops_the_copies_and_not_the_training(
    tmp_path, name, content
):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / name).write_text(content)
    told: Queue[str] = Queue()
    run = Journal(tmp_path, [Memory()], {}, told.put)
    run.start(0)
    run.metrics({"loss": 1.0}, 1)
    assert f"{name} is damaged; delete it" in told.get(timeout=20)
    assert not run.close("FINISHED", timeout_s=0.0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_is_the_same_in_the_run_and_in_the_tracker(journal, tmp_path, channels):
    tracker, grid = Memory(), GRIDS[channels]
    run = journal(tracker)
    run.start(0)
    path = run.images("preview", grid, 7)
    assert run.close("FINISHED", timeout_s=20.0)
    assert (np.asarray(Image.open(path)).reshape(grid.shape) == grid).all()
    assert tracker.files == [(path.relative_to(tmp_path).as_posix(), path.read_bytes())]


def test_no_file_from_outside_of_the_run_is_ever_sent(journal, tmp_path, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    secret.write_text("secret")
    run = journal(Memory())
    with pytest.raises(ValueError, match="secret"):
        run.artifact(secret, 1)
    (tmp_path / "link").symlink_to(secret)
    (tmp_path / "logs").mkdir()
    listed = [str(secret), f"../{secret.parent.name}/secret.txt", "link", "gone.png"]
    (tmp_path / "logs" / "artifacts.jsonl").write_text(
        "".join(json.dumps({"images": 1, "time": 0.5, "file": name}) + "\n" for name in listed)
    )
    late = Memory()
    assert replay(tmp_path, [late], {}, print, "FINISHED", timeout_s=20.0)
    assert late.files == []


# MLflow


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> tuple[Path, list[str]]:
    """An empty root on which three processes met, and the runs that they were killed in."""
    root = tmp_path_factory.mktemp("runs") / "my runs #1"
    return root, killed_runs(root, tmp_path_factory.mktemp("cwd"), 3)


def killed_runs(root: Path, cwd: Path, count: int) -> list[str]:
    """Start processes at once that create a run and are killed at 40 images; their run ids."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED_AT_40, str(root)],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [(p.returncode, error) for p, (_, error) in zip(processes, outputs, strict=True)] == [
        (-signal.SIGKILL, "")
    ] * count
    assert list(cwd.iterdir()) == []
    return [output.strip() for output, _ in outputs]


KILLED_AT_40 = """
import os, signal, sys, threading
from pathlib import Path
from rediffuse.tracking import mlflow
from rediffuse.tracking.journal import Journal

class KilledInBetween(mlflow.Mlflow):  # after a delivery and before that is noted anywhere
    delivered = threading.Event()
    def metrics(self, rows):
        super().metrics(rows)
        self.delivered.set()
        threading.Event().wait()

root = Path(sys.argv[1])
mlflow.START_S = 240
run = root / mlflow.create_run(root, "tests", "killed", print)
run.mkdir()
tracker = KilledInBetween(run, "tests", "killed", None)
journal = Journal(run, [tracker], {"seed": 0, "deep": "x" * 10_000, "a@b": 1}, print)
journal.start(0)
for images in range(1, 41):
    journal.metrics({"loss": images / 7, "grad norm@0": images / 3}, images)
    if images == 20:
        tracker.delivered.wait(120)
print(run.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def client(store, monkeypatch) -> Any:
    """MLflow's own client on the store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connected, _ = mlflow._connect(store[0], "tests")
    return connected


def history(client: Any, run_id: str) -> list[tuple[str, int, float]]:
    """Every point that MLflow has of a run."""
    return [
        (key, point.step, point.value)
        for key in client.get_run(run_id).data.metrics
        for point in client.get_metric_history(run_id, key)
    ]


def mlflow_of(run: Path) -> Tracker:
    return mlflow.tracker(run, "tests", "killed", parent=None)


def test_processes_that_meet_on_an_empty_root_all_get_a_run_of_one_experiment(store, client):
    root, ids = store
    experiment = client.get_experiment_by_name("tests").experiment_id
    assert len(set(ids)) == 3
    assert {run.info.run_id for run in client.search_runs([experiment])} >= set(ids)
    assert {run.info.experiment_id for run in map(client.get_run, ids)} == {experiment}
    assert (root / "mlflow.db").is_file()


@pytest.mark.slow
def test_eight_processes_that_meet_on_an_empty_root_all_get_a_run(tmp_path):
    (tmp_path / "cwd").mkdir()
    assert len(set(killed_runs(tmp_path / "root", tmp_path / "cwd", 8))) == 8


def test_after_a_kill_and_a_resume_mlflow_has_the_rows_of_the_run_each_once(store, client, lines):
    root, ids = store
    run = root / ids[0]
    params = {"seed": 1, "deep": "x" * 10_000, "new": 2}
    journal = Journal(run, [mlflow_of(run)], params, lines.append)
    journal.start(15)
    for images in range(16, 61):
        journal.metrics({"loss": images / 7, "grad norm@0": images / 3}, images)
    path = journal.images("preview", GRIDS[3], 60)
    assert journal.close("FINISHED", timeout_s=60.0)

    rows = [
        (key.replace("@", "_"), *rest) for key, *rest in points(read_metrics(run / "metrics.jsonl"))
    ]
    assert sorted(history(client, ids[0])) == sorted(rows)
    copied = client.get_run(ids[0])
    assert copied.info.status == "FINISHED"
    assert copied.data.params == {"seed": "0", "deep": "x" * 6000, "a_b": "1", "new": "2"}
    assert copied.data.tags["drift.seed"] == "1"
    assert copied.data.tags["rediffuse.directory"] == str(run)
    assert "drift.deep" not in copied.data.tags
    stored = client.download_artifacts(ids[0], "samples/" + path.name)
    assert Path(stored).read_bytes() == path.read_bytes()
    assert lines == []


def test_mlflow_gets_an_evaluation_of_an_older_checkpoint_after_a_newer_one(store, client, lines):
    root, ids = store
    run = root / ids[1]
    for images in (30, 10, 20):
        append_metrics(run / "metrics.jsonl", {"evaluation/fd": images / 7}, images)
        assert replay(run, [mlflow_of(run)], {}, lines.append, "KILLED", timeout_s=60.0)
    # The record of what was sent is lost: MLflow has every point, and takes none twice.
    (run / "logs" / "mlflow.jsonl").unlink()
    assert replay(run, [mlflow_of(run)], {}, lines.append, "KILLED", timeout_s=60.0)
    found = client.get_metric_history(run.name, "evaluation/fd")
    assert [(point.step, point.value) for point in found] == [(i, i / 7) for i in (30, 10, 20)]
    assert lines == []


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_mlflow_is_told_how_the_run_ended_and_when_it_goes_on(store, client, lines, status):
    root, ids = store
    tracker = mlflow_of(root / ids[1])
    tracker.open({})
    assert client.get_run(ids[1]).info.status == "RUNNING"
    tracker.close(status)
    assert client.get_run(ids[1]).info.status == status
    assert replay(root / ids[1], [tracker], {}, lines.append, status, timeout_s=60.0)
    assert client.get_run(ids[1]).info.status == status


def test_non_finite_metrics_do_not_stop_mlflow(store, client, lines):
    root, ids = store
    run = root / ids[2]
    append_metrics(run / "metrics.jsonl", {"bad": float("nan"), "worse": float("inf")}, 41)
    assert replay(run, [mlflow_of(run)], {}, lines.append, "FAILED", timeout_s=60.0)
    last = client.get_run(ids[2]).data.metrics
    assert np.isnan(last["bad"])
    assert last["worse"] == sys.float_info.max


def test_a_run_that_began_without_its_server_is_sent_when_there_is_one(
    store, client, lines, monkeypatch
):
    root, _ = store
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        run = root / mlflow.create_run(root, "tests", "alone", lines.append)
        run.mkdir()
        assert "goes on without it" in lines[0]
        journal = Journal(run, [mlflow_of(run)], {"seed": 0}, lines.append)
        journal.start(0)
        journal.metrics({"loss": 0.5}, 10)
        assert not journal.close("FINISHED", timeout_s=1.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for _ in range(2):
        assert replay(run, [mlflow_of(run)], {"seed": 0}, lines.append, "FINISHED", timeout_s=60.0)
    experiment = client.get_experiment_by_name("tests").experiment_id
    ours = f"tags.`rediffuse.run_id` = '{run.name}'"
    (sent,) = client.search_runs([experiment], ours)
    assert history(client, sent.info.run_id) == [("loss", 10, 0.5)]
    assert (sent.info.status, sent.info.run_name) == ("FINISHED", "killed")


def test_a_server_that_never_answers_holds_nothing_up(tmp_path, lines, monkeypatch):
    mlflow._import()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        began = time.monotonic()
        run = tmp_path / mlflow.create_run(tmp_path, "tests", None, lines.append)
        run.mkdir()
        journal = Journal(run, [mlflow_of(run)], {}, lines.append)
        journal.start(0)
        for images in range(100):
            journal.metrics({"loss": 1.0}, images)
        assert not journal.close("FINISHED", timeout_s=0.5)
        assert time.monotonic() - began < 6.0
    assert len(read_metrics(run / "metrics.jsonl")) == 100


def test_a_root_that_no_database_address_can_name_is_refused_in_words(tmp_path, lines, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow.create_run(tmp_path / "100%", "tests", None, lines.append)
    assert "choose a root without % and ?" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_artifacts_of_a_root_that_was_moved_or_copied_go_to_where_it_is_now(
    store, client, lines, tmp_path
):
    root, ids = store
    copy = shutil.copytree(root, tmp_path / "a copy" / "runs")
    theirs, experiment = mlflow._connect(copy, "tests")
    model = theirs.create_logged_model(experiment, name="model", source_run_id=ids[1])
    theirs.create_registered_model("tests")
    theirs.create_model_version("tests", model.artifact_location, run_id=ids[1])
    moved = copy.rename(tmp_path / "moved")
    there = set(root.rglob("*"))

    run = moved / ids[1]
    journal = Journal(run, [mlflow_of(run)], {}, lines.append)
    journal.start(50)
    path = journal.images("preview", GRIDS[3], 60)
    assert journal.close("FINISHED", timeout_s=60.0)
    home = moved / "mlflow-artifacts"
    sent = home / run.name / "artifacts" / "samples" / path.name
    assert sent.read_bytes() == path.read_bytes()
    assert set(root.rglob("*")) == there
    assert not copy.exists()

    theirs, _ = mlflow._connect(moved, "tests")
    (version,) = theirs.search_model_versions("name = 'tests'")
    addresses = [theirs.get_run(name).info.artifact_uri for name in ids]
    addresses += [theirs.get_logged_model(model.model_id).artifact_location, version.source]
    assert all(address.startswith(f"{home.as_uri()}/") for address in addresses)
    assert theirs.get_run(ids[1]).data.tags["rediffuse.directory"] == str(run)
    (kept,) = {client.get_experiment_by_name("tests").artifact_location}
    assert kept == (root / "mlflow-artifacts").as_uri()


# TensorBoard and the console


def test_without_its_package_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install rediffuse\[tensorboard\]"):
        tensorboard.tracker(tmp_path, "tests", None, None)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_rows_of_the_run(tmp_path, journal):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = journal(tensorboard.tracker(tmp_path, "tests", None, None))
    run.start(0)
    for images in (10, 20):
        run.metrics({"loss": images / 8}, images)
    run.images("preview", GRIDS[3], 20)
    assert run.close("FINISHED", timeout_s=60.0)
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 1.25), (20, 2.5)]
    assert [e.step for e in events.Images("samples/preview")] == [20]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_configuration_and_how_a_run_ended_beside_its_final_metrics(
    tmp_path, journal
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = journal(tensorboard.tracker(tmp_path, "tests", None, None))
    run.start(0)
    run.metrics({"loss": 0.5}, 10)
    assert run.close("FINISHED", timeout_s=60.0)
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    tags = events.PluginTagToContent("hparams")
    told = {tag.rpartition("/")[2]: HParamsPluginData.FromString(tags[tag]) for tag in tags}
    named = told["experiment"].experiment.metric_infos
    assert [info.name.tag for info in named] == ["loss", "validation/loss", "epoch/loss"]
    assert told["session_start_info"].session_start_info.hparams["a.b"].number_value == 0
    assert told["session_end_info"].session_end_info.status == Status.STATUS_SUCCESS


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.parametrize("classes", [0, 3])
def test_tensorboard_has_the_graph_of_the_network_once(tmp_path, capfd, classes):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with torch_seeded(0, Stream.INITIALISATION):
        network = UNet(
            in_channels=1,
            out_channels=1,
            image_size=8,
            num_classes=classes,
            base_channels=64,
            channel_multipliers=(1, 1),
            blocks_per_level=1,
            attention_resolutions=(4,),
        )
    inputs = [torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64)]
    before = torch.get_rng_state()
    for _ in range(2):
        tensorboard.draw_graph(tmp_path, network.eval(), inputs if classes else inputs[:2])
    assert torch.equal(before, torch.get_rng_state())
    (file,) = (tmp_path / "logs" / "tensorboard").iterdir()
    nodes = {node.name for node in EventAccumulator(str(file)).Reload().Graph().node}
    assert any("conv_in" in name for name in nodes)
    assert any("embedding" in name for name in nodes)
    assert capfd.readouterr() == ("", "")
