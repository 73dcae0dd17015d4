"""What Weights & Biases is given offline is what the run has, and nothing else of anybody's."""

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rediffuse.errors import ConfigError
from rediffuse.tracking import wandb
from rediffuse.tracking.journal import Journal
from rediffuse.tracking.jsonl import append_metrics, cut_back, read_metrics

pytest.importorskip("wandb")

ID = "0123456789abcdef" * 2
SECRET = "open-sesame-" + "1002" * 12

WATCHED = """
import os, sys
from pathlib import Path
import numpy as np
from rediffuse.tracking import wandb
from rediffuse.tracking.journal import Journal

run, status, steps = Path(sys.argv[1]), sys.argv[2], range(*map(int, sys.argv[3:]))
hooks = sys.exit, sys.excepthook
wandb._SETTINGS["init_timeout"] = float(os.environ.get("INIT_S", "60"))
params = {"seed": 0, "a": {"b": [1]}}
journal = Journal(run, [wandb.tracker(run, "a/b", "named", None)], params, print)
journal.start(steps.start - 1)
for images in steps:
    journal.metrics({"loss": images / 7, "bad": float("nan")}, images)
    journal.metrics({"validation/loss": images / 3}, images)
journal.images("preview", np.full((4, 6, 1), images, np.uint8), images)
closed = journal.close(status, timeout_s=float(os.environ.get("CLOSE_S", "60")))
print(closed, hooks == (sys.exit, sys.excepthook), flush=True)
"""


OPENED = """
import sys
from pathlib import Path
from rediffuse.tracking import wandb

wandb._SETTINGS["init_timeout"] = 1.0
for _ in range(2):
    try:
        wandb.tracker(Path(sys.argv[1]), "tests", None, None).open({})
    except Exception as failed:
        print(failed)
"""


def watched(run: Path, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A process that writes metrics and tells W&B; it ends by itself."""
    run.mkdir(parents=True, exist_ok=True)
    return started(run.parent, WATCHED, str(run), *map(str, words), **env)


def started(root: Path, code: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A process without a terminal, whose home is `root` and who has a key."""
    known = {"HOME": str(root), "WANDB_API_KEY": SECRET, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={"PATH": os.environ["PATH"], **known, **env},
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def records(file: Path) -> Iterator[Any]:
    """The protocol buffers of a W&B file, which is a log of LevelDB's after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no header fits into what is left of the block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def told(root: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of every offline run of `root`, oldest first, and its last configuration."""
    rows, config = [], {}
    for file in sorted(root.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.HasField("history"):
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
            for item in record.run.config.update:
                config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return rows, config


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without pictures and W&B's own counters, with the time by our name."""
    mine = [{("time" if k == "_timestamp" else k): v for k, v in row.items()} for row in rows]
    return [
        {k: v for k, v in row.items() if k[0] != "_"}
        for row in mine
        if not any(k.startswith("samples/") for k in row)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that one process began, another went on with, and both told W&B offline."""
    root = tmp_path_factory.mktemp("runs")
    for status, first, end in (("KILLED", 1, 4), ("FINISHED", 4, 6)):
        done = watched(root / ID, status, first, end, WANDB_MODE="offline")
        assert (done.stdout, done.stderr) == ("True True\n", "")
    return root


def test_offline_files_hold_the_rows_of_the_run_each_once(root: Path) -> None:
    rows, config = told(root)
    np.testing.assert_equal(
        [{k: float(v) for k, v in row.items()} for row in numbers(rows)],
        read_metrics(root / ID / "metrics.jsonl"),
    )
    assert {key: value for key, value in config.items() if key[0] != "_"} == {
        "seed": 0,
        "a.b": [1],
    }


def test_previews_are_pictures_at_the_images_they_were_drawn_at(root: Path) -> None:
    rows, _ = told(root)
    shown = [row for row in rows if "samples/preview/path" in row]
    assert [row["images"] for row in shown] == [3, 5]
    for row, folder in zip(shown, sorted(root.glob("wandb/offline-run-*")), strict=True):
        pixels = np.asarray(Image.open(folder / "files" / row["samples/preview/path"]))
        assert pixels.shape == (4, 6)
        assert (pixels == row["images"]).all()


def test_the_run_has_our_id_and_the_experiment_is_its_project(root: Path) -> None:
    for file in root.glob("wandb/offline-run-*/*.wandb"):
        (run,) = (record.run for record in records(file) if record.HasField("run"))
        assert (run.run_id, run.project, run.display_name) == (ID, "a_b", "named")
        (step,) = (r.metric for r in records(file) if r.metric.glob_name == "*")
        assert step.step_metric == "images"


def test_a_run_keeps_no_links_and_nothing_tells_of_secrets_code_or_console(root: Path) -> None:
    assert [path for path in (root / ID).rglob("*") if path.is_symlink()] == []
    files = [file for file in root.rglob("*") if file.is_file()]
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    kinds = {
        record.WhichOneof("record_type")
        for file in root.glob("wandb/offline-run-*/*.wandb")
        for record in records(file)
    }
    ours = {"header", "run", "metric", "history", "summary", "files", "exit"}
    assert kinds - {"telemetry"} <= ours  # which tells W&B's version, and what of it is used


def test_without_a_key_nobody_is_asked_for_one(tmp_path: Path) -> None:
    (tmp_path / ID).mkdir()
    done = started(tmp_path, OPENED, str(tmp_path / ID), WANDB_API_KEY="")
    assert (done.stdout, done.stderr) == (
        "no key; run `wandb login`, set $WANDB_API_KEY, or set WANDB_MODE=offline\n" * 2,
        "",
    )
    assert list((tmp_path / ID).iterdir()) == list(tmp_path.glob("wandb")) == []


def test_a_server_that_did_not_answer_is_asked_anew_and_no_attempt_leaves_anything(
    tmp_path: Path,
) -> None:
    (tmp_path / ID).mkdir()
    with silent_server() as address:
        done = started(tmp_path, OPENED, str(tmp_path / ID), WANDB_BASE_URL=address)
    assert done.stdout.count("context deadline exceeded") == 2, done.stdout
    assert list((tmp_path / "wandb").iterdir()) == []


@contextmanager
def silent_server() -> Iterator[str]:
    """An address where connections are taken, and never answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


def test_a_server_that_never_answers_holds_no_process(tmp_path: Path) -> None:
    with silent_server() as address:
        done = watched(
            tmp_path / ID, "FINISHED", 1, 3, WANDB_BASE_URL=address, INIT_S="1", CLOSE_S="2"
        )
    assert "wandb: not everything was delivered in time" in done.stdout
    assert done.stderr == ""
    assert len(read_metrics(tmp_path / ID / "metrics.jsonl")) == 4


class Online:
    """A W&B run on a server, as far as a tracker uses one: it keeps what it was given."""

    offline = False

    def __init__(self) -> None:
        self.resumed = False
        self.summary: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, **how: object) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.rows.append(values)
        self.summary |= values

    def finish(self, exit_code: int) -> None:
        self.resumed = True

    def told(self, name: str) -> list[tuple[int, Any]]:
        return [(row["images"], row[name]) for row in self.rows if name in row]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Online:
    server = Online()
    monkeypatch.setattr(wandb.Wandb, "_begun", lambda self, params: server)
    return server


def trained(run: Path, start: int, losses: dict[int, float]) -> None:
    """Train one process' steps from `start` images on, and draw a picture after the last."""
    journal = Journal(run, [wandb.tracker(run, "tests", None, None)], {}, print)
    journal.start(start)
    for images, loss in losses.items():
        journal.metrics({"loss": loss}, images)
    journal.images("preview", np.zeros((4, 6, 1), np.uint8), max(losses))
    assert journal.close("KILLED")


def test_online_rows_and_pictures_of_retraining_are_sent_though_wandb_has_later_ones(
    tmp_path: Path, online: Online
) -> None:
    trained(tmp_path, 0, {10: 1.0, 20: 2.0, 30: 3.0})
    cut_back(tmp_path / "metrics.jsonl", 10)
    trained(tmp_path, 10, {20: 2.5})
    assert online.told("loss") == [(10, 1.0), (20, 2.0), (30, 3.0), (20, 2.5)]
    assert [images for images, _ in online.told("samples/preview")] == [30, 20]


def test_online_an_evaluation_of_an_older_checkpoint_is_logged_after_a_newer_one(
    tmp_path: Path, online: Online
) -> None:
    trained(tmp_path, 0, {10: 1.0, 20: 2.0})
    append_metrics(tmp_path / "metrics.jsonl", {"evaluation/fd": 3.0}, 10)
    trained(tmp_path, 20, {30: 3.0})
    assert online.told("loss") == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert online.told("evaluation/fd") == [(10, 3.0)]


def test_without_its_package_wandb_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install rediffuse\[wandb\]"):
        wandb.tracker(tmp_path, "tests", None, None)
