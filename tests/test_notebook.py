"""The lab journal runs from top to bottom, and shows what it says."""

import json
from pathlib import Path

import nbformat
import pytest
from cli import TINY
from nbclient import NotebookClient

import rediffuse
from rediffuse.tracking.jsonl import read_metrics

JOURNAL = Path(__file__).parent.parent / "notebooks" / "diffusion_lab.ipynb"
MOST_BYTES = 200_000


def shown(cell: nbformat.NotebookNode) -> list[str]:
    """The kinds of what a cell shows."""
    return sorted(kind for output in cell.get("outputs", ()) for kind in output.get("data", {}))


def test_what_is_committed_is_small_and_names_no_place() -> None:
    outputs = json.dumps([cell.get("outputs") for cell in json.loads(JOURNAL.read_text())["cells"]])
    assert len(outputs) <= MOST_BYTES
    assert "/home/" not in outputs
    assert "/tmp/" not in outputs


def test_training_in_python_tells_all_that_is_recorded(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []
    run = rediffuse.train(
        *TINY,
        "training.images=96",
        "training.log_every_images=48",
        root=tmp_path,
        look=lambda images, values: told.append({"images": images, **values}),
    )
    rows = read_metrics(run.metrics)
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows] == told
    assert any("loss" in row for row in told)
    assert run.read().status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths", [("12_000", "6_000"), ("600", "300")], ids=["as it is", "short"]
)
def test_the_journal_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: tuple[str, str]
) -> None:
    """With fewer images than an epoch, too."""
    monkeypatch.setenv("REDIFFUSE_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    journal = nbformat.read(JOURNAL, as_version=4)
    for cell in journal.cells:
        cell.source = cell.source.replace("IMAGES = 12_000", f"IMAGES = {lengths[0]}")
        cell.source = cell.source.replace("FEWER = 6_000", f"FEWER = {lengths[1]}")
    there = [shown(cell) for cell in journal.cells]
    NotebookClient(journal, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [shown(cell) for cell in journal.cells] == there  # the same pictures in the same places
    runs = [*tmp_path.glob("*/run.json")]
    assert {json.loads(run.read_text())["name"] for run in runs} == {"lab", "half"}
    assert all(json.loads(run.read_text())["status"] == "FINISHED" for run in runs)
