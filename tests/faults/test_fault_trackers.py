"""Whatever a tracker does, training goes on, and the tracker gets every row once in the end."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest
from cli import TINY
from faults_harness import Zygote

from rediffuse.tracking import mlflow
from rediffuse.tracking.jsonl import lines_since, read_metrics
from rediffuse.words import masked

PATIENCE_S = 600.0
QUICK = "from rediffuse.tracking import feeder, mlflow; feeder.FLUSH_S = 0.05; mlflow.START_S = "
WORDS = (
    *(word for word in TINY if word != "tracking=none"),
    "tracking=mlflow",
    "training.previews=false",
    "training.images=480",
    "training.log_every_images=48",
    "training.checkpoint_every_images=192",
    "training.validate_every_images=240",
)
TAGGED = "SELECT run_uuid FROM tags WHERE key = 'rediffuse.run_id' AND value = ?"
POINTS = "SELECT key, step, value, is_nan, timestamp FROM metrics WHERE run_uuid = ?"


@pytest.fixture(scope="module")
def forks() -> Iterator[Zygote]:
    """Forks commands that have imported MLflow already."""
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("MLFLOW")]:
            patch.delenv(key)
        for key, value in mlflow._ENVIRONMENT.items():
            patch.setenv(key, value)
        with Zygote("mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store") as zygote:
            yield zygote


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory, forks: Zygote) -> bytes:
    """The database that MLflow makes for an empty root, and one experiment."""
    root = tmp_path_factory.mktemp("migrated")
    forks.run("train", *WORDS, "training.stop_after_images=48", root=root, check=0)
    return (root / "mlflow.db").read_bytes()


@pytest.fixture
def root(tmp_path: Path, migrated: bytes) -> Path:
    """A root with MLflow's tables and no run of ours."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mlflow.db").write_bytes(migrated)
    return tmp_path / "root"


def run_in(said: str) -> str:
    """The id that a command named."""
    return re.findall(r"(?m)^run +([0-9a-f]{32})$", said)[0]


def ask(root: Path, question: str, *values: str) -> list[tuple]:
    with closing(sqlite3.connect(root / "mlflow.db", timeout=PATIENCE_S)) as database:
        return database.execute(question, values).fetchall()


def history(root: Path, run: str) -> list[tuple]:
    """Every point that MLflow's store has of a run of ours: name, images, value and time."""
    ((found,),) = ask(root, TAGGED, run)
    return sorted(
        (key, step, "nan" if is_nan else value, at)
        for key, step, value, is_nan, at in ask(root, POINTS, found)
    )


def written(root: Path, run: str) -> list[tuple]:
    """The same of `metrics.jsonl`; MLflow's infinity is the largest float."""
    largest = sys.float_info.max
    return sorted(
        (
            key,
            int(row["images"]),
            "nan" if value != value else max(-largest, min(value, largest)),
            round(row["time"] * 1000),
        )
        for row in read_metrics(root / run / "metrics.jsonl")
        for key, value in row.items()
        if key not in ("images", "time")
    )


def status(root: Path, run: str) -> tuple[str, str]:
    """What our record says of a run, and what MLflow says."""
    ((found,),) = ask(root, TAGGED, run)
    ((theirs,),) = ask(root, "SELECT status FROM runs WHERE run_uuid = ?", found)
    return json.loads((root / run / "run.json").read_text())["status"], theirs


def wait_until(happened: Callable[[], bool]) -> None:
    """Look every 50 ms whether it has."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def longest_gap_s(root: Path, run: str) -> float:
    """The longest time between two steps, each of which wrote a row."""
    times = [row["time"] for row in read_metrics(root / run / "metrics.jsonl") if "loss" in row]
    return max(after - before for before, after in pairwise(times))


@contextmanager
def server_that_answers(answer: bytes | None) -> Iterator[str]:
    """Its address; every request gets the same bytes, or none for ever."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        held = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


@contextmanager
def nobody() -> Iterator[str]:
    """An address where connections are refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def http(status: str, body: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


SERVERS: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "is away": nobody,
    "answers 500": lambda: server_that_answers(http("500 Internal Server Error", "{}")),
    "never answers": lambda: server_that_answers(None),
    "answers no HTTP": lambda: server_that_answers(b"\x00\xff garbage\r\n\r\n"),
    "answers no JSON": lambda: server_that_answers(http("200 OK", "<html>please log in</html>")),
    "answers nothing": lambda: server_that_answers(http("200 OK", "{}")),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=() if name == "answers 500" else pytest.mark.slow)
        for name in SERVERS
    ],
)
def test_a_run_whose_server_fails_is_complete_and_resume_sends_it_once(fault, forks, root):
    with SERVERS[fault]() as address:
        env = {"MLFLOW_TRACKING_URI": address}
        alone = forks.run("train", *WORDS, root=root, before=QUICK + "1.0", env=env, check=0)
    run = run_in(alone.stdout)
    said = [line for line in (alone.stdout + alone.stderr).splitlines() if "mlflow: " in line]
    assert "(the run goes on without it, and is sent later)" in said[0]
    assert f"`rediffuse resume {run}` sends the rest" in said[-1]
    assert len(read_metrics(root / run / "metrics.jsonl")) == 15
    again = forks.run("resume", run, root=root, check=0)
    assert "mlflow: " not in again.stdout + again.stderr
    assert history(root, run) == written(root, run)
    assert status(root, run) == ("FINISHED", "FINISHED")


@pytest.mark.slow
def test_a_run_on_a_locked_store_trains_on_and_is_sent_once(forks, root):
    with closing(sqlite3.connect(root / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        process = forks.start("train", *WORDS, root=root, before=QUICK + "1.0")
        wait_until(lambda: "images" in process.stdout())
        run = run_in(process.stdout())
        wait_until(lambda: len(read_metrics(root / run / "metrics.jsonl")) == 14)
        other.execute("ROLLBACK")
    process.wait(PATIENCE_S)
    forks.run("resume", run, root=root, check=0)
    assert "mlflow: no answer in 1 s (the run goes on without it" in process.stdout()
    assert history(root, run) == written(root, run)
    assert status(root, run) == ("FINISHED", "FINISHED")


KILLED_AFTER_DELIVERY = (
    """
import os, signal, time
from rediffuse.tracking.journal import Journal
from rediffuse.tracking.jsonl import lines_since
write = Journal.metrics
def delivered(run):
    lines = lines_since(run / "logs" / "mlflow.jsonl", 0)
    return max((line["images"] for line, _ in lines if "rows" in line), default=0)
def metrics(self, values, images_seen):
    write(self, values, images_seen)
    if images_seen == {images}:
        while delivered(self._directory) < {delivered}:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
Journal.metrics = metrics
"""
    + QUICK
)


def test_rows_that_are_written_anew_after_a_kill_equal_those_that_mlflow_has(forks, root):
    killed = forks.start(
        *("train", *WORDS),
        root=root,
        before=KILLED_AFTER_DELIVERY.format(images=336, delivered=336) + "30.0",
    )
    assert killed.wait().returncode == -signal.SIGKILL
    run = run_in(killed.stdout())
    delivered = history(root, run)
    assert max(images for _, images, *_ in delivered) == 336
    again = forks.run(
        *("resume", run),
        root=root,
        before=KILLED_AFTER_DELIVERY.format(images=288, delivered=336) + "30.0",
    )
    assert again.returncode == -signal.SIGKILL
    forks.run("resume", run, root=root, check=0)
    assert history(root, run) == written(root, run)
    assert set(delivered) < set(history(root, run))
    undone = [row["images"] for row in read_metrics(root / run / "logs" / "undone.jsonl")]
    assert {240, 288, 336} <= set(undone)


ODD = {
    "bad": "nan",
    "worse": "inf",
    "down": "-inf",
    "a//b": 1,
    "/é@?/../c/": 2,
    "..": 3,
    "k" * 300: 4,
}
ODD_ROWS = f"""
from rediffuse.training import hooks
means = hooks.Sums.means
hooks.Sums.means = lambda self: means(self) | {{k: float(v) for k, v in {ODD!r}.items()}}
"""


@pytest.mark.slow
def test_values_and_names_that_mlflow_refuses_are_sent_as_near_as_it_can(forks, root):
    done = forks.run("train", *WORDS, root=root, before=ODD_ROWS + QUICK + "30.0", check=0)
    run = run_in(done.stdout)
    assert history(root, run) == sorted(
        (mlflow._key(key), *rest) for key, *rest in written(root, run)
    )
    assert {mlflow._key(key) for key in ODD} == {
        *("bad", "worse", "down", "a/b", "é__/c", "_", "k" * 250)
    }


KILLED_IN_MIGRATION = """
import os, signal, sqlalchemy
@sqlalchemy.event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
def kill(connection, cursor, statement, *rest):
    if "CREATE TABLE datasets" in statement:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def starts_at_once(forks: Zygote, root: Path, count: int) -> None:
    """Start runs on an empty root, the first of which is killed as it makes MLflow's tables."""
    killed = forks.run("train", *WORDS, root=root, before=KILLED_IN_MIGRATION)
    assert killed.returncode == -signal.SIGKILL
    processes = [forks.start("train", *WORDS, root=root) for _ in range(count)]
    done = [process.wait(PATIENCE_S) for process in processes]
    assert [d.returncode for d in done] == [0] * count
    ids = [run_in(d.stdout) for d in done]
    for run, d in zip(ids, done, strict=True):  # a machine that is slow enough is late, and says so
        if f"rediffuse resume {run}` sends the rest" in d.stdout + d.stderr:
            forks.run("resume", run, root=root, check=0)
    assert [status(root, run) for run in ids] == [("FINISHED", "FINISHED")] * count
    assert [history(root, run) for run in ids] == [written(root, run) for run in ids]
    asked = "SELECT name FROM experiments WHERE experiment_id != 0"
    assert ask(root, asked) == [("rediffuse",)]
    assert ask(root, "SELECT count(*) FROM runs") == [(count,)]


@pytest.mark.slow
def test_three_first_runs_at_once_are_three_of_one_experiment_even_after_a_kill(forks, tmp_path):
    starts_at_once(forks, tmp_path, 3)


@pytest.mark.slow
def test_eight_first_runs_at_once_are_eight_of_one_experiment_even_after_a_kill(forks, tmp_path):
    starts_at_once(forks, tmp_path, 8)


# Secrets

SENTINELS = (
    "open-sesame-1001",
    "open-sesame-1002",
    "open-sesame-1003",
    "hf_opensesame1004opensesame",
)


def test_no_secret_of_the_environment_or_the_command_is_written_or_said(forks, root):
    in_address, token, key, word = SENTINELS
    env = {"MLFLOW_TRACKING_TOKEN": token, "WANDB_API_KEY": key}
    (root / f"{key}.{word}.yaml").write_text("seed: 3\n")
    words = [*WORDS, "--config", f"{key}.{word}.yaml"]
    with SERVERS["answers 500"]() as address:
        away = env | {"MLFLOW_TRACKING_URI": address.replace("//", f"//me:{in_address}@")}
        first = forks.run("train", *words, root=root, before=QUICK + "30.0", env=away, check=0)
        run = run_in(first.stdout)
        second = forks.run("resume", run, root=root, env=away, check=0)
    third = forks.run("resume", run, root=root, env=env, check=0)
    said = "".join(done.stdout + done.stderr for done in (first, second, third))
    (root / f"{key}.{word}.yaml").unlink()
    files = [file for file in root.rglob("*") if file.is_file()]
    assert len(files) > 20
    for secret in SENTINELS:
        assert secret not in said
        assert [file for file in files if secret.encode() in file.read_bytes()] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pass@host:5000/x?a=1", "http://***@host:5000/x?a=1"),
        ("postgresql://me:p@ss@host/db", "postgresql://***@host/db"),
        ("x.api_key=abc seed=3", "x.api_key=*** seed=3"),
        ('{"password": "abc", "a": 1}', '{"password": "***", "a": 1}'),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("https://host/?token=abc&n=1", "https://host/?token=***&n=1"),
        ("tokens=5 keys=7 author=me monkey=x http://host/a@b", None),
        ("training.images=480 data.path=/a/b.c name=run", None),
        ("/data/hf_opensesame1004opensesame/images", "/data/***/images"),
        ("key sk-proj-Ab3_dEfGhIjKlMnOpQrSt, AKIAIOSFODNN7EXAMPLE", "key ***, ***"),
        ("/data/hf_datasets_cifar10/sk-learn-pictures-of-digits", None),
    ],
)
def test_redaction_hides_what_opens_doors_and_nothing_else(text, shown):
    assert masked(text) == (shown or text)


# A real server


@contextmanager
def real_server(root: Path, port: int) -> Iterator[None]:
    """`mlflow server` on the root's store, killed with all its processes at the end."""
    words = f"server --host 127.0.0.1 --port {port} --workers 1 --backend-store-uri"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words.split(), f"sqlite:///{quote(str(root))}/mlflow.db"],
        cwd=root,
        env=os.environ | mlflow._ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers() -> bool:
        assert server.poll() is None
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def delivered(root: Path, run: str) -> int:
    """The images seen of the last row that MLflow has, as the run's own record says."""
    lines = lines_since(root / run / "logs" / "mlflow.jsonl", 0)
    return max((line["images"] for line, _ in lines if "rows" in line), default=0)


def steps(root: Path, run: str) -> int:
    return sum("loss" in row for row in read_metrics(root / run / "metrics.jsonl"))


@pytest.mark.slow
def test_a_server_killed_and_restarted_in_mid_run_pauses_nothing_and_gets_every_row_once(
    forks, root
):
    """Beside it trains a run without a tracker, which what else the machine does slows as much."""
    never = 48_000_000
    words = [*WORDS, f"training.images={never}", f"training.checkpoint_every_images={never}"]
    words += [f"training.validate_every_images={never}"]
    port = free_port()
    env = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}

    with real_server(root, port):
        processes = [
            forks.start("train", *words, *more, root=root, env=env)
            for more in ((), ("tracking=none",))
        ]
        wait_until(lambda: all("images" in process.stdout() for process in processes))
        run, alone = (run_in(process.stdout()) for process in processes)
        wait_until(lambda: delivered(root, run) > 0)
    killed_at = steps(root, run)
    wait_until(lambda: steps(root, run) >= killed_at + 100)
    with real_server(root, port):
        wait_until(lambda: delivered(root, run) > 48 * (killed_at + 100))
        for process in processes:
            process.send(signal.SIGTERM)
        assert [process.wait(PATIENCE_S).returncode for process in processes] == [143, 143]
        if f"rediffuse resume {run}` sends the rest" in processes[0].stdout():  # a slow machine
            end = 48 * steps(root, run)
            forks.run("resume", run, f"training.stop_after_images={end}", root=root, env=env)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(env["MLFLOW_TRACKING_URI"])
        theirs = sorted(
            (key, point.step, point.value, point.timestamp)
            for key in client.get_run(run).data.metrics
            for point in client.get_metric_history(run, key)
        )
    gaps = [longest_gap_s(root, name) for name in (run, alone)]
    print(f"longest gap between steps: {gaps[0]:.3f} s; without a tracker {gaps[1]:.3f} s")
    assert gaps[0] < 1.0 + gaps[1]  # what both wait for is the machine
    assert theirs == written(root, run) == history(root, run)
    ours, mlflows = status(root, run)
    assert ours == mlflows
