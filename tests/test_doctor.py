"""`rediffuse doctor` finds what is wrong, says what to do, and leaves nothing."""

import json
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli import rediffuse

from rediffuse import doctor, locks
from rediffuse.doctor import Finding


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check that takes ten seconds."""
    monkeypatch.setattr(doctor, "training", lambda device: Finding("ok", ""))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def found(capsys: pytest.CaptureFixture[str], root: Path, code: int) -> dict[str, dict[str, str]]:
    assert doctor.doctor(root, "cpu", as_json=True) == code
    return {check["check"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_a_sound_machine_passes_every_check_and_keeps_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = rediffuse("doctor", "--device", "cpu", "--json", root=tmp_path)
    told = json.loads(done.stdout)
    assert told["ok"]
    assert [c["check"] for c in told["checks"] if c["verdict"] == "fail"] == []
    assert "4 images drawn" in told["checks"][-1]["told"]
    assert [*tmp_path.iterdir()] == []


def test_a_check_is_a_line_and_a_remedy_is_another(
    untrained: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor, "_NO_DISK_GB", 1e9)
    assert doctor.doctor(tmp_path, "cpu") == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    at = next(k for k, line in enumerate(lines) if line.startswith("fail  disk"))
    rest = " ".join(line.strip() for line in lines[at:])
    assert "GB free for" in rest
    assert "→ make room, or name another place with --root" in rest


def test_a_root_that_cannot_be_made_fails(
    untrained: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    root = found(capsys, tmp_path / "file" / "runs", 1)["root"]
    assert root["verdict"] == "fail"
    assert "$REDIFFUSE_ROOT" in root["remedy"]


def test_a_file_system_whose_locks_hold_nobody_fails(
    untrained: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locks, "hold", lambda *_: nullcontext())
    assert "taken twice" in found(capsys, tmp_path, 1)["root"]["told"]


def test_little_disk_is_a_warning(
    untrained: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2e9))
    assert found(capsys, tmp_path, 0)["disk"]["verdict"] == "warn"


def test_a_server_that_is_not_there_is_a_warning_without_its_password(
    untrained: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
        mlflow = found(capsys, tmp_path, 0)["mlflow"]
    assert mlflow["verdict"] == "warn"
    assert "does not answer" in mlflow["told"]
    assert "secret" not in str(mlflow)


def test_a_damaged_store_fails(
    untrained: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    mlflow = found(capsys, tmp_path, 1)["mlflow"]
    assert mlflow["verdict"] == "fail"
    assert "move that file away" in mlflow["remedy"]


def test_without_a_compiler_training_is_slower(
    untrained: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    compiler = found(capsys, tmp_path, 0)["compiler"]
    assert compiler["verdict"] == "warn"
    assert "install g++" in compiler["remedy"]


def test_training_that_fails_says_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TINY", ("model.base_chanels=16",))
    finding = doctor.training(doctor.torch.device("cpu"))
    assert finding.verdict == "fail"
    assert "error: model.base_chanels: no such key" in finding.told
