"""The run that a newcomer makes first, and whether its digits can be read."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli import TINY, rediffuse, run_id
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


# MLflow 3.17 with SQLAlchemy 2.1 warns of itself when a client is made.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_a_run_says_first_and_last_where_it_is_and_how_to_go_on(tmp_path: Path) -> None:
    words = [word for word in TINY if word != "tracking=none"]
    done = rediffuse("train", *words, "training.images=240", root=tmp_path)
    run = run_id(done)
    assert done.stdout.count(f"rediffuse resume {run}") == 2
    assert done.stdout.count(f"rediffuse sample {run}") == 2
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(tmp_path)) + len(run)
    home = tmp_path / run
    epochs = json.loads((home / "metrics.json").read_text())
    assert [epoch["epoch"] for epoch in epochs] == [1]
    assert json.loads((home / "run.json").read_text())["status"] == "FINISHED"
    previews = sorted((home / "samples").glob("preview-*.png"))
    assert previews[-1].name == "preview-0000000240.png"
    listed = rediffuse("runs", "--json", root=tmp_path)
    assert [row["id"] for row in json.loads(listed.stdout)] == [run]
    shown = json.loads(rediffuse("show", run[:6], "--json", root=tmp_path).stdout)
    assert shown["images"] == 240
    assert shown["data"]["class_names"] == list("0123456789")
    assert_mlflow_has_it_all(tmp_path, run)


def assert_mlflow_has_it_all(root: Path, run: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    kept = client.get_run(run)
    assert kept.info.status == "FINISHED"
    assert kept.data.params["model.base_channels"] == "16"
    rows = map(json.loads, (root / run / "metrics.jsonl").read_text().splitlines())
    ours = {
        (k, row["images"]): v for row in rows for k, v in row.items() if k not in {"images", "time"}
    }
    theirs = {
        (point.key, point.step): point.value
        for key in {name for name, _ in ours}
        for point in client.get_metric_history(run, key)
    }
    assert theirs == pytest.approx(ours)
    assert {"loss", "system/cpu_percent", "system/data_wait_percent"} <= {name for name, _ in ours}
    named = {item.path for folder in ("", "samples") for item in client.list_artifacts(run, folder)}
    assert {"config.yaml", "environment.json", "samples/preview-0000000240.png"} <= named
    (model,) = client.search_logged_models([kept.info.experiment_id])
    assert (model.name, model.source_run_id, model.status) == ("model", run, "READY")
    step = "checkpoints/step-00000005"
    assert f"{step}/average.safetensors" in {item.path for item in client.list_artifacts(run, step)}


@pytest.mark.slow
def test_the_default_run_draws_digits_that_a_classifier_reads(tmp_path: Path) -> None:
    run = run_id(rediffuse("train", root=tmp_path, timeout_s=1800))
    folder = tmp_path / "drawn"
    rediffuse("sample", run, "--n", "500", "--output-dir", str(folder), root=tmp_path)
    drawn = np.stack([np.asarray(Image.open(f)) for f in sorted(folder.glob("0*.png"))])
    wanted = np.arange(500) % 10
    held_out, agreed = classifier_agreement(drawn, wanted)
    assert held_out >= 0.97
    assert agreed >= 0.95


def classifier_agreement(drawn: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """How often a classifier of real digits is right on unseen real ones, and on these."""
    pixels, labels = load_digits(return_X_y=True)
    x, x_unseen, y, y_unseen = train_test_split(pixels / 16, labels, test_size=0.2, random_state=0)
    classifier = SVC(C=10, gamma=0.04).fit(x, y)
    flat = drawn.reshape(len(drawn), -1) / 255
    return classifier.score(x_unseen, y_unseen), classifier.score(flat, wanted)
