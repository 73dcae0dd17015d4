"""Run directories: looked up by id, written by one process at a time, never half-made."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import edit
from filelock import FileLock

from rediffuse import drift, launch, overview, runs
from rediffuse.config.compose import changes, compose, dump_yaml, is_under, leaves
from rediffuse.config.schema import FREE
from rediffuse.errors import RunError
from rediffuse.runs import (
    Run,
    create,
    environment,
    find_run,
    last_heard,
    list_runs,
    locked,
    status_now,
)
from rediffuse.tracking.jsonl import append

A, B, C = "abcdef0" + "1" * 25, "abcdef0" + "2" * 25, "123456" + "3" * 26


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three runs, two of which begin alike."""
    for run_id in (A, B, C):
        create(tmp_path, run_id)
    return tmp_path


@contextmanager
def owner(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run's lock until it is ended."""
    code = (
        "import sys; from pathlib import Path; from rediffuse.runs import Run, locked\n"
        "with locked(Run(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("length", [6, 7, 20, 32])
def test_an_id_or_an_unambiguous_beginning_of_it_finds_the_run(root, length):
    assert find_run(root, C[:length]) == Run(root / C)


def test_an_ambiguous_beginning_is_refused_and_names_what_it_fits(root):
    with pytest.raises(RunError, match=r"fits 2 runs.*more digits") as refused:
        find_run(root, A[:7])
    assert A in str(refused.value)
    assert B in str(refused.value)


def test_an_unknown_run_is_refused_and_names_the_newest_ones(root):
    with pytest.raises(RunError, match=f"no run 'ffffff' in {re.escape(str(root))}.*{C}"):
        find_run(root, "ffffff")


def test_an_empty_root_says_that_there_are_no_runs(tmp_path):
    with pytest.raises(RunError, match="there are no runs"):
        find_run(tmp_path / "nowhere", "ffffff")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "word", ["", "12345", "../../etc", "ABCDEF", A + "0", C[:6] + "\n", "123456/", "12345g"]
)
def test_a_word_that_cannot_be_an_id_is_refused_before_any_path_is_touched(monkeypatch, word):
    monkeypatch.setattr(os, "scandir", lambda path: pytest.fail(f"looked into {path}"))
    with pytest.raises(RunError, match="is not a run id"):
        find_run(Path("/"), word)


def test_links_and_other_folders_are_not_runs(root, tmp_path_factory):
    elsewhere = create(tmp_path_factory.mktemp("elsewhere"), "f" * 32)
    (root / elsewhere.id).symlink_to(elsewhere.directory)
    (root / "datasets").mkdir()
    (root / ("e" * 32)).write_text("a file")
    assert {run.id for run in list_runs(root)} == {A, B, C}


def test_runs_are_listed_newest_first_and_damaged_ones_last(root):
    for run_id, day in ((B, 1), (A, 2)):
        path = root / run_id / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"created": f"2020-01-0{day}"}))
    (root / C / "run.json").write_text("{")
    assert [run.id for run in list_runs(root)] == [A, B, C]


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    run = create(tmp_path, name="ö", parent=A, command=["train", "seed=1"])
    assert re.fullmatch("[0-9a-f]{32}", run.id)
    record = run.read()
    assert record.id == run.id
    assert (record.name, record.parent, record.command) == ("ö", A, ("train", "seed=1"))
    assert (record.status, record.images_seen) == ("RUNNING", 0)
    updated = run.update(status="KILLED", images_seen=640)
    assert updated == run.read()
    assert updated == record.model_copy(update={"status": "KILLED", "images_seen": 640})


@pytest.mark.parametrize("name", [".lock", ".owner"])
def test_what_is_no_file_in_place_of_a_lock_is_named(root, name):
    run = create(root)
    (run.directory / name).mkdir()
    with pytest.raises(RunError, match=rf"{name} is not a regular file"), locked(run):
        pass


def test_drift_is_kept_with_where_it_began(root):
    run = Run(root / A)
    run.environment.write_text(json.dumps(here(threads=1)))
    drift.note(run, {"training.learning_rate": (2e-4, 1e-4)}, here(threads=2), 640)
    drift.note(run, {}, here(threads=2), 1280)
    drift.note(run, {"rate.name": ("a", "b")}, here(threads=2, code="new"), 1920)
    assert drift.read(run) == [
        (640, {"training.learning_rate": (2e-4, 1e-4)}, {"torch.threads": (1, 2)}),
        (1920, {"rate.name": ("a", "b")}, {"code_sha256": ("old", "new")}),
    ]
    assert drift.reasons(run) == [
        "training.learning_rate after 640 images: 0.0002, then 0.0001",
        "torch.threads after 640 images: 1, then 2",
        "rate.name after 1,920 images: a, then b",
        "code_sha256 after 1,920 images: old, then new",
    ]


def test_drift_behind_which_training_went_back_counts_from_there(root):
    run = Run(root / A)
    run.environment.write_text(json.dumps(here(threads=1)))
    drift.note(run, {"rate.name": ("a", "b")}, here(threads=2), 640)
    drift.note(run, {"rate.name": ("b", "c"), "x": (1, 2)}, here(threads=1), 1280)
    drift.note(run, {"x": (2, 1)}, here(threads=1, code="new"), 320)
    assert drift.read(run) == [(320, {"rate.name": ("a", "c")}, {"code_sha256": ("old", "new")})]


def test_what_decides_no_bit_is_kept_and_is_no_reason(root):
    run = Run(root / A)
    run.environment.write_text(json.dumps({"packages": {"rich": "1", "torch": "2"}}))
    drift.note(run, {}, {"packages": {"rich": "2", "torch": "2"}, "platform": "x"}, 640)
    assert drift.read(run) == [(640, {}, {"packages.rich": ("1", "2"), "platform": (None, "x")})]
    assert drift.reasons(run) == []


@pytest.fixture
def trained(root):
    """A run that began with the default configuration, and has trained a step."""
    run, config = Run(root / A), compose(["threads=1", "rate.horizon_images=54640"])
    run.config.write_text(dump_yaml(config))
    recorded = {key: v for key, v in leaves(config.model_dump()).items() if not is_under(key, FREE)}
    run.logs.mkdir(exist_ok=True)
    append(run.digests, 0, {"config": recorded})
    append(run.digests, 64, {"loss": "0x1p+0"})
    run.environment.write_text(json.dumps(here(threads=1)))
    return run


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("\nseed: 0\n", "\nseed: 1\n", "seed is 1 there, and the run recorded 0"),
        ("flip: false", "flip: true", "data.flip is True there, and the run recorded False"),
        (
            "  dropout: 0.0\n",
            "  dropout: 0.0\n  new: 3\n",
            "model.new is 3 there, and the run recorded absent",
        ),
        (
            "target:\n  name: v\n",
            "target:\n  name: eps\n",
            "target.name is eps there, and the run recorded v",
        ),
    ],
)
def test_a_fixed_key_that_was_edited_is_refused_and_shown(trained, old, new, told):
    assert drift.reasons(trained) == []
    edit(trained.config, old, new)
    assert f"config.yaml was edited: {told}" in drift.reasons(trained)
    key, value, *_ = told.split(" is ")
    with pytest.raises(RunError, match=f"config.yaml was edited: {key} is {value.split()[0]} "):
        launch.to_resume(trained, [])


def test_a_declared_key_that_was_edited_is_a_change_like_a_typed_one(trained):
    edit(trained.config, "learning_rate: 0.002\n", "learning_rate: 0.001\n")
    edit(trained.config, "epochs: 40.0\n", "epochs: 50.0\n")  # free
    told = "training.learning_rate is 0.001 there, and the run recorded 0.002"
    assert drift.reasons(trained) == [f"config.yaml was edited: {told}"]
    old, new = launch.to_resume(trained, ["optimizer.weight_decay=0.1"])
    changed = changes(old, new)
    assert changed == {
        "training.learning_rate": (0.002, 0.001),
        "optimizer.weight_decay": (0.01, 0.1),
    }
    drift.note(trained, changed, here(threads=1), 64)
    trained.config.write_text(dump_yaml(new))
    assert drift.edited(trained) == {}
    assert launch.to_resume(trained, []) == (new, new)


def test_a_field_that_is_younger_than_a_run_is_no_edit(trained):
    lines = trained.digests.read_text()
    trained.digests.write_text(lines.replace('"training.time_strata": 1, ', ""))
    assert drift.edited(trained) == {}


def test_changes_that_no_configuration_has_are_refused(trained):
    drift.note(trained, {"optimizer.eps.deep": (None, 1)}, here(threads=1), 64)
    with pytest.raises(RunError, match=r"optimizer\.eps\.deep"):
        launch.to_resume(trained, [])


def here(threads, code="old"):
    return {"torch": {"threads": threads, "version": "2"}, "code_sha256": code}


def test_a_writer_shows_that_it_lives_and_a_silent_one_is_told_apart(root, monkeypatch):
    run = Run(root / A)
    monkeypatch.setattr(runs, "HEARTBEAT_S", 0.01)
    with owner(run):
        assert status_now(run) == "RUNNING"
        os.utime(run.directory / ".owner", (0, 0))
        assert status_now(run) == "silent"
    with locked(run):
        os.utime(run.directory / ".owner", (0, 0))
        deadline = time.monotonic() + 10
        while last_heard(run) == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - last_heard(run) < 10
    assert status_now(run) == "stale"


def test_a_run_is_there_with_all_its_files_or_not_at_all(tmp_path, monkeypatch):
    files = {"config.yaml": b"seed: 0", "environment.json": b"{}"}
    run = create(tmp_path, files=files)
    assert {name: (run.directory / name).read_bytes() for name in files} == files

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        create(tmp_path, files=files)
    assert [path.name for path in tmp_path.iterdir()] == [run.id]


def test_an_update_that_is_killed_half_way_leaves_the_old_record(root, monkeypatch):
    run = Run(root / A)
    before = run.read()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        run.update(status="FAILED")
    assert run.read() == before
    assert sorted(path.name for path in run.directory.iterdir()) == ["logs", "run.json"]


def test_a_record_has_the_permissions_that_the_user_asked_for(root):
    before = os.umask(0o027)
    try:
        Run(root / A).update(images_seen=1)
    finally:
        os.umask(before)
    assert (root / A / "run.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no run.json"),
        ("{", "damaged: JSON"),
        ('{"id": 7}', "damaged: id"),
        (json.dumps({"id": A, "created": "2026", "status": "DONE"}), "damaged: status"),
        (json.dumps({"id": B, "created": "2026"}), f"belongs to run {B}"),
        (" " * 1_000_001, "more than 1,000,000 bytes"),
    ],
)
def test_a_record_that_is_not_one_is_refused_in_one_line(root, content, complaint):
    path = root / A / "run.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match=complaint) as refused:
        Run(root / A).read()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["run.json", "logs", "samples/job/0.png", "checkpoints/step-1"])
@pytest.mark.parametrize("there", [True, False])
def test_a_run_with_a_link_in_it_is_refused_wherever_it_leads(root, tmp_path, name, there):
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.mkdir()
    link = root / A / name
    link.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(RunError, match=rf"{link} is a link"):
        find_run(root, A)
    assert find_run(root, B) == Run(root / B)


def test_a_run_that_another_process_has_just_made_is_in_nobodys_way(root):
    (root / ".building-gone").symlink_to("nowhere")  # listed, and gone when it is looked at
    assert create(root).read().status == "RUNNING"


def test_a_new_run_removes_only_what_carries_its_own_mark(root):
    ours, theirs = root / f".building-{A}", root / ".building-site"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "run.json").write_text("{}")
    (ours / ".unfinished").touch()
    for folder in (ours, theirs):
        os.utime(folder, (0, 0))
    create(root)
    assert not ours.exists()
    assert (theirs / "run.json").is_file()


def test_a_run_that_another_process_is_creating_is_left_alone(root):
    unfinished = root / f".building-{'c' * 32}"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    with pytest.raises(RunError, match="exists already"):
        create(root, "c" * 32)
    assert (unfinished / "run.json").is_file()


def test_a_name_is_printed_as_it_is(root, capsys):
    overview.print_table([{"id": A, "name": "[/x] [red]:smile:"}])
    assert "[/x] [red]:smile:" in capsys.readouterr().out


def test_a_run_is_created_once_and_only_under_an_id(root):
    with pytest.raises(RunError, match="exists already"):
        create(root, A)
    with pytest.raises(RunError, match="32 hex digits"):
        create(root, "../" + A)


def test_a_second_process_is_refused_and_told_who_the_first_is(root):
    run = Run(root / A)
    with owner(run) as process:
        wanted = f"in use by process {process.pid} on {re.escape(socket.gethostname())}, since"
        with pytest.raises(RunError, match=wanted), locked(run):
            pass
        assert status_now(run) == "RUNNING"


def test_a_process_that_is_killed_leaves_the_run_free_and_stale(root):
    run = Run(root / A)
    with owner(run) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert status_now(run) == "stale"
        with locked(run):
            assert status_now(run) == "RUNNING"


def test_a_run_that_ended_has_the_status_of_its_record(root):
    Run(root / A).update(status="FINISHED")
    assert status_now(Run(root / A)) == "FINISHED"


def test_the_lock_is_free_again_after_an_error_inside(root):
    run = Run(root / A)
    with pytest.raises(ZeroDivisionError), locked(run):
        raise ZeroDivisionError
    with locked(run):
        pass


def test_a_look_at_the_status_does_not_turn_a_writer_away(root):
    run = Run(root / A)
    looking = FileLock(run.directory / ".lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.1, looking.release).start()
    with locked(run):
        assert status_now(run) == "RUNNING"


def test_the_root_is_the_option_else_the_environment_else_runs_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REDIFFUSE_ROOT", raising=False)
    assert runs.runs_root(None) == tmp_path / "runs"
    monkeypatch.setenv("REDIFFUSE_ROOT", "elsewhere")
    assert runs.runs_root(None) == tmp_path / "elsewhere"
    assert runs.runs_root(Path("here")) == tmp_path / "here"


def test_the_environment_names_the_commit_and_notices_every_change(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None
    git("init", "-q")
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-qm", "begin")
    clean = environment()["git"]
    assert (clean["commit"], clean["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "a.py").write_text("a = 2\n")
    dirty = environment()["git"]
    assert dirty["dirty"] is True
    assert dirty["diff_sha256"] != clean["diff_sha256"]


def test_the_environment_is_plain_json_and_names_the_packages():
    facts = json.loads(json.dumps(environment()))
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["count"] == os.cpu_count()
