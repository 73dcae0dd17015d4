"""A finished run is an MLflow model whose images are those of `rediffuse sample`."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from cli import TINY, rediffuse, run_id
from PIL import Image

from rediffuse import api, launch, runs, serving
from rediffuse.config.compose import compose
from rediffuse.errors import ConfigError
from rediffuse.models import load
from rediffuse.serving import Generator, export
from rediffuse.tracking import mlflow

# MLflow's own tables, as the newest SQLAlchemy sees them, and what MLflow says of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, and its root."""
    root = tmp_path_factory.mktemp("root")
    return root, run_id(rediffuse("train", *TINY, "training.images=96", root=root))


@pytest.fixture
def store(trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store that was told of the run twice."""
    root, run = trained
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2 if not (root / "mlflow.db").exists() else 0):
        tracker = mlflow.tracker(root / run, "digits", None, None, export, register=True)
        tracker.open({})
        tracker.close("FINISHED")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words that train a run with a weighting of one's own."""
    (tmp_path / "served_lab.py").write_text(
        "import torch\n\ndef heavy(schedule, t, target):\n    return torch.full_like(t, 2.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return [
        *TINY,
        "training.images=48",
        "training.previews=false",
        "weighting.name=served_lab.heavy",
    ]


def test_a_run_with_a_part_of_ones_own_is_loaded_and_resumed_as_it_says(
    own_part: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert launch.train(compose(own_part), root=tmp_path) == 0
    (run,) = runs.list_runs(tmp_path)
    said = re.findall("(?:resume|sample)  rediffuse (.*)", capfd.readouterr().out)
    begun = [f"{verb} {run.id} --trust served_lab" for verb in ("resume", "sample")]
    assert said == [*begun, f"{begun[0]} training.images=96", begun[1]]
    export(run.directory, tmp_path / "model")
    monkeypatch.delenv("REDIFFUSE_TRUST", raising=False)
    with pytest.raises(
        ConfigError, match="if you trust that code, set REDIFFUSE_TRUST=served_lab,"
    ):
        serving._load_pyfunc(str(tmp_path / "model"))
    monkeypatch.setenv("REDIFFUSE_TRUST", "served_lab")
    generator = serving._load_pyfunc(str(tmp_path / "model"))
    trusted = api.load(run, trusted=["served_lab"])
    assert (
        pixels(generator.predict(pandas.DataFrame({"image": [3]}))) == api.sample(trusted, [3])
    ).all()


def pixels(answer: list[dict[str, Any]]) -> np.ndarray:
    """The images of an answer, as `rediffuse.sample` returns them."""
    images = [Image.open(io.BytesIO(base64.b64decode(row["png"]))) for row in answer]
    return np.stack([np.asarray(image)[None] for image in images])


def test_the_logged_model_draws_the_very_pixels_of_sample(
    trained: tuple[Path, str], store: str
) -> None:
    from mlflow.pyfunc import load_model

    root, run = trained
    model, loaded = api.load(run, root=root), load_model("models:/digits/1")
    answer = loaded.predict({"image": [0, 1, 5, 13]})
    assert [(row["image"], row["class"]) for row in answer] == [
        *((0, "0"), (1, "1"), (5, "5"), (13, "3"))
    ]
    assert np.array_equal(pixels(answer), api.sample(model, [0, 1, 5, 13]))

    how = {"steps": 2, "guidance": 3.0, "solver": "heun churn=10", "seed": 7}
    asked = {"image": np.array([4, 9]), "class": ["2", "2"]}
    wanted = api.sample(model, [4, 9], class_name="2", **how)  # type: ignore[arg-type]
    assert np.array_equal(pixels(loaded.predict(asked, params=how)), wanted)
    assert not np.array_equal(pixels(loaded.predict(asked)), wanted)


@pytest.mark.parametrize(
    ("rows", "params", "why"),
    [
        ({"image": [0], "class": ["cat"]}, {}, "class 'cat': there is none"),
        ({"image": [-1]}, {}, "image=-1: expected a whole number from 0"),
        ({"image": [0] * 5000}, {}, "expected 1 to 4096 rows"),
        ({"image": [0]}, {"solver": "huen"}, "did you mean heun"),
        ({"image": [0]}, {"solver": "os.system"}, "os.system"),
        ({"image": [0]}, {"steps": 0}, "expected 1 to 100,000 steps"),
        ({"image": [0]}, {"guidance": float("nan")}, "expected a finite number"),
        ({"image": ["zero"]}, {}, "Incompatible input types"),
        ({"number": [0]}, {}, "missing inputs"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_words(
    trained: tuple[Path, str], store: str, rows: dict, params: dict, why: str
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import load_model

    with pytest.raises(MlflowException, match=re.escape(why)):
        load_model("models:/digits/1").predict(rows, params=params)


def test_the_model_is_data_with_pinned_packages_and_one_version_of_the_registered_one(
    trained: tuple[Path, str], store: str
) -> None:
    from mlflow.artifacts import download_artifacts
    from mlflow.tracking import MlflowClient

    _, run = trained
    client = MlflowClient(store)
    (version,) = client.search_model_versions("name = 'digits'")
    (copy,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert version.run_id == copy.info.run_id
    assert copy.data.tags["rediffuse.run_id"] == run
    folder = Path(download_artifacts("models:/digits/1"))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    step = f"data/data/{run}/checkpoints/step-00000002"
    assert files == {
        *("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta"),
        *("input_example.json", "serving_input_example.json"),
        *(f"data/data/{run}/config.yaml", f"data/data/{run}/environment.json"),
        *(f"{step}/average.safetensors", f"{step}/state.json", f"{step}/manifest.json"),
    }
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["loader_module"] == "rediffuse.serving"
    needed = (folder / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\w.+]+", line) for line in needed)
    assert "://" not in (folder / "conda.yaml").read_text()


@pytest.fixture
def address(trained: tuple[Path, str], store: str) -> Iterator[str]:
    """`mlflow models serve` on the run, started for real and stopped with all its processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = f"models serve -m models:/digits/1 --env-manager local -h 127.0.0.1 -p {port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words.split()],
        cwd=trained[0],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while asked(f"http://127.0.0.1:{port}/ping")[0] != 200:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def asked(address: str, request: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and text of an answer; 0 where nobody listens."""
    body = None if request is None else json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, body, headers), timeout=120
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()
    except OSError:
        return 0, ""


@pytest.mark.slow
def test_mlflow_models_serve_answers_with_the_images_of_the_run(
    trained: tuple[Path, str], address: str
) -> None:
    root, run = trained
    request = {
        "dataframe_records": [{"image": 3, "class": "7"}, {"image": 4, "class": "7"}],
        "params": {"steps": 2, "guidance": 2},
    }
    status, text = asked(address, request)
    assert status == 200, text
    model = api.load(run, root=root)
    wanted = api.sample(model, [3, 4], class_name="7", steps=2, guidance=2.0)
    assert np.array_equal(pixels(json.loads(text)["predictions"]), wanted)
    status, text = asked(address, {"inputs": {"image": [0]}, "params": {"solver": "huen"}})
    assert status == 400
    assert "did you mean heun" in text


@pytest.mark.parametrize(
    ("row", "params", "why"),
    [
        ({}, {"seed": 2**32}, "seed=4294967296: expected a whole number from 0 to 4294967295"),
        ({}, {"seed": -1}, "seed=-1: expected"),
        ({}, {"seed": float("nan")}, "seed=nan: expected"),
        ({}, {"seed": float("inf")}, "seed=inf: expected"),
        ({}, {"seed": None}, "seed=None: expected"),
        ({}, {"seed": 1.5}, r"seed=1\.5: expected"),
        ({}, {"steps": float("nan")}, "steps=nan: expected"),
        ({}, {"guidance": float("nan")}, "expected a finite number"),
        ({"image": float("nan")}, {}, "image=nan: expected"),
        ({"image": 2**63}, {}, "image=9223372036854775808: expected"),
        ({"image": None}, {}, "image=None: expected"),
    ],
)
def test_a_number_that_is_none_is_refused_in_words_also_without_a_schema(
    trained: tuple[Path, str], row: dict[str, Any], params: dict[str, Any], why: str
) -> None:
    """As a caller from Python, whom MLflow's schema does not stand before."""
    from mlflow.exceptions import MlflowException

    asked = pandas.DataFrame([{"image": 0, **row}], dtype=object)
    generator = Generator(load(trained[1], root=trained[0]))
    with pytest.raises(MlflowException, match=why):
        generator.predict(asked, params)
