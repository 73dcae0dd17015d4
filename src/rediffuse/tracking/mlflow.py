"""MLflow, through explicit ids only: no active run, nothing in the working directory.

The store is `$MLFLOW_TRACKING_URI` where that is set, else `<root>/mlflow.db`, with artifacts in
`<root>/mlflow-artifacts`. Importing MLflow takes seconds, so it happens at first use.
"""

import math
import os
import queue
import re
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import url2pathname
from uuid import uuid4

from rediffuse import locks
from rediffuse.errors import RunError
from rediffuse.tracking.tracker import Held, Row, Say, in_one_line
from rediffuse.words import masked

START_S = 30.0
"""The start of a run waits no longer for MLflow; its tables alone take 3 s on an idle machine."""

# MLflow's own limits per call and per value.
METRICS_AT_ONCE, PARAMS_AT_ONCE, PARAM_LENGTH, KEY_LENGTH = 1000, 100, 6000, 250

_ID = re.compile("[0-9a-f]{32}")

Point = tuple[int, int, str]
"""A value of a metric as MLflow keeps it: its step, its time in ms, the value as text."""

MODEL = "model"
"""What a run's model is called: `runs:/<run id>/model`."""

_NEEDED = ("rediffuse", "torch", "torchvision", "numpy", "safetensors", "pillow", "mlflow")

# With MLflow's defaults an unreachable server blocks a call for minutes. The rest is for a clean
# console and no telemetry.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # or a model takes the lock file of the working directory
}


def create_run(root: Path, experiment: str, name: str | None, say: Say) -> str:
    """Create a run and return its id, 32 hex digits, which then names everything.

    Where the store cannot be reached, answers nonsense or takes longer than `START_S`, the run
    gets an id of its own, and the user is told. A run that MLflow makes too late has that id as its
    tag, by which it is found.
    """
    own, answers, late = uuid4().hex, queue.SimpleQueue[str | Exception](), threading.Event()

    def ask() -> None:
        try:
            client, experiment_id = _connect(root, experiment)
            if not late.is_set():
                tags = {"rediffuse.run_id": own}
                run = client.create_run(experiment_id, run_name=name, tags=tags)
                answers.put(_checked(run).info.run_id)
        except Exception as failure:
            answers.put(failure)

    with suppress(ImportError):  # seconds that are not MLflow's; `ask` will meet the error again
        _import()
    threading.Thread(target=ask, name="create mlflow run", daemon=True).start()
    try:
        answer = answers.get(timeout=START_S)
    except queue.Empty:
        late.set()
        answer = TimeoutError(f"no answer in {START_S:g} s")
    if isinstance(answer, str):
        return answer
    say(f"mlflow: {in_one_line(answer)} (the run goes on without it, and is sent later)")
    return own


Export = Callable[[Path, Path], Mapping[str, Any] | None]
"""Puts what sampling needs of a run below a folder; tells what a request may leave open."""


def tracker(
    directory: Path,
    experiment: str,
    name: str | None,
    parent: str | None,
    export: Export | None = None,
    register: bool = False,
) -> "Mlflow":
    """Copy the run in `<root>/<run id>` to MLflow.

    With `export` a finished run becomes a model that generates images, and with `register` a
    version of the registered model that has the experiment's name.
    """
    return Mlflow(directory, experiment, name, parent, export, register)


class Mlflow:
    """A `Tracker` for one run of an MLflow experiment; steps are images seen."""

    name = "mlflow"

    def __init__(
        self,
        directory: Path,
        experiment: str,
        name: str | None,
        parent: str | None,
        export: Export | None = None,
        register: bool = False,
    ) -> None:
        self._directory, self._experiment, self._name = directory, experiment, name
        self._export, self._register = export, register
        self._tags = {
            "rediffuse.run_id": directory.name,
            "rediffuse.directory": masked(str(directory)),
        }
        if parent:
            self._tags |= {"mlflow.parentRunId": parent}
        self._client: Any = None
        self._experiment_id = ""
        self._id = directory.name
        self._known: set[str] = set()
        self._held: dict[str, set[Point]] = {}

    def open(self, params: Mapping[str, Any]) -> Held:
        """Set the run RUNNING; parameters are written once, later ones are tags `drift.<name>`."""
        from mlflow.entities import Param, RunTag

        self._client, self._experiment_id = _connect(self._directory.parent, self._experiment)
        run = self._find(self._experiment_id)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._known, self._held = set(run.data.metrics), {}
        wanted = {_key(key): str(value)[:PARAM_LENGTH] for key, value in params.items()}
        known = run.data.params
        drift = {_key(f"drift.{k}"): v for k, v in wanted.items() if known.get(k, v) != v}
        tags = [RunTag(key, value) for key, value in (self._tags | drift).items()]
        for some in _chunks(tags, PARAMS_AT_ONCE):
            self._client.log_batch(self._id, tags=some)
        fresh = [Param(key, value) for key, value in wanted.items() if key not in known]
        for some in _chunks(fresh, PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=some)
        return "everything" if self._known else "nothing"

    def metrics(self, rows: Sequence[Row]) -> None:
        """Send the points that MLflow does not have; a process may have ended as it sent them."""
        from mlflow.entities import Metric

        points = [
            Metric(_key(key), value, round(row["time"] * 1000), int(row["images"]))
            for row in rows
            for key, value in row.items()
            if key not in ("images", "time")
        ]
        missing = [point for point in points if _identity(point) not in self._points(point.key)]
        for some in _chunks(missing, METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=some)

    def artifact(self, path: Path, name: str, images_seen: int) -> None:
        """Copy a file under the name it has in the run."""
        folder = Path(name).parent.as_posix()
        self._client.log_artifact(self._id, str(path), None if folder == "." else folder)

    def close(self, status: str) -> None:
        """End the run; one that is finished becomes a model."""
        if status == "FINISHED" and self._export:
            self._log_model(self._export)
        self._client.set_terminated(self._id, status)

    def _log_model(self, export: Export) -> None:
        """Make a model named `model` of the newest checkpoint, unless there is one already."""
        with TemporaryDirectory() as temporary:
            data = Path(temporary) / "data"
            left_open = export(self._directory, data)
            if left_open is None:
                return
            (checkpoint,) = data.glob("*/checkpoints/*")
            model = self._model_of(checkpoint.name)
            if model.status != "READY":
                folder = _saved(data, Path(temporary) / "model", left_open, self._id, model)
                self._client.log_model_artifacts(model.model_id, str(folder))
                self._client.finalize_logged_model(model.model_id, "READY")
        if self._register:
            self._register_once(model)

    def _model_of(self, checkpoint: str) -> Any:
        """MLflow's record of a model, which a process may have begun and not ended."""
        tags = {"rediffuse.checkpoint": f"{self._directory.name}/{checkpoint}"}
        ours = f"tags.`rediffuse.checkpoint` = '{tags['rediffuse.checkpoint']}'"
        found = self._client.search_logged_models([self._experiment_id], ours, max_results=1)
        made = {"name": MODEL, "source_run_id": self._id, "tags": tags}
        return found[0] if found else self._client.create_logged_model(self._experiment_id, **made)

    def _register_once(self, model: Any) -> None:
        """Make it a version of the registered model that is named like the experiment."""
        from mlflow.exceptions import MlflowException

        name = re.sub(r"[/:'\"%]", "_", self._experiment)
        source, told = model.artifact_location, {"run_id": self._id}
        if self._client.tracking_uri.startswith("http"):
            # Only a server finds a model by its id: in its own store, not in a global one.
            source, told = f"models:/{model.model_id}", told | {"model_id": model.model_id}
        try:
            self._client.create_registered_model(name)
        except MlflowException as failure:
            if failure.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = self._client.search_model_versions(f"name = '{name}'")
        if not any(version.source == source for version in known):
            self._client.create_model_version(name, source, **told)

    def _points(self, key: str) -> set[Point]:
        """What MLflow had of a metric when it was first needed."""
        if key not in self._held:
            there = self._client.get_metric_history(self._id, key) if key in self._known else ()
            self._held[key] = {_identity(point) for point in there}
        return self._held[key]

    def _find(self, experiment_id: str) -> Any:
        """MLflow's run: of our id, or made later for a run that started without MLflow."""
        from mlflow.exceptions import MlflowException

        try:
            return _checked(self._client.get_run(self._directory.name))
        except MlflowException as failure:
            if failure.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        ours = f"tags.`rediffuse.run_id` = '{self._directory.name}'"
        found = self._client.search_runs([experiment_id], ours, max_results=1)
        made = {"tags": self._tags, "run_name": self._name}
        return _checked(found[0] if found else self._client.create_run(experiment_id, **made))


def _connect(root: Path, experiment: str) -> tuple[Any, str]:
    """A client and the id of the experiment, both made if need be.

    MLflow makes its tables in many small transactions: processes that meet on an empty root, or
    one that is killed there, would break the database for good. Hence the lock and the rename.
    """
    _import()
    from mlflow.tracking import MlflowClient

    root = root.resolve()
    elsewhere, ours = os.environ.get("MLFLOW_TRACKING_URI"), root / "mlflow.db"
    uri = elsewhere or _address(ours)
    root.mkdir(parents=True, exist_ok=True)
    artifacts = None if uri.startswith("http") else (root / "mlflow-artifacts").as_uri()
    with locks.hold(root / ".mlflow.lock", timeout_s=120.0):
        if not elsewhere and not ours.exists():
            for torn in root.glob(".mlflow-*.db*"):
                torn.unlink()
            fresh = root / f".mlflow-{uuid4().hex}.db"
            MlflowClient(_address(fresh)).search_experiments(max_results=1)
            fresh.rename(ours)
        if Path(uri.removeprefix("sqlite:///")).resolve() == ours:  # also if the variable names it
            _follow_moved_root(ours)
        client = MlflowClient(uri, registry_uri=uri)
        known = client.get_experiment_by_name(experiment)
        if known is not None:
            return client, known.experiment_id
        return client, client.create_experiment(experiment, artifact_location=artifacts)


# Where MLflow's tables hold absolute addresses of artifacts, and of runs in our own tag.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def _follow_moved_root(database: Path) -> None:
    """Correct the addresses in a root's own store if the root was moved or copied.

    MLflow has no call for it, and would go on writing artifacts to the old place.
    """
    root = database.parent
    here = (root / "mlflow-artifacts").as_uri()
    with closing(sqlite3.connect(database, timeout=10)) as store, store:
        known = store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (place,) in known:
            if place == here or not re.fullmatch("file:///.+/mlflow-artifacts", place or ""):
                continue
            for table, column in _ADDRESSES:
                columns = {row[1] for row in store.execute(f"PRAGMA table_info({table})")}
                if column in columns:  # MLflow's tables change from version to version
                    _replace_beginning(store, table, column, place, here)
            was = url2pathname(place.removeprefix("file://").removesuffix("/mlflow-artifacts"))
            _replace_beginning(
                store, "tags", "value", was, str(root), "key = 'rediffuse.directory'"
            )


def _replace_beginning(
    store: sqlite3.Connection, table: str, column: str, old: str, new: str, where: str = "1"
) -> None:
    """Replace the address `old`, and the beginning of every address below it."""
    size = len(old)
    store.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
        f"WHERE {where} AND ({column} = ? OR substr({column}, 1, ?) = ?)",
        (new, size + 1, old, size + 1, f"{old}/"),
    )


def experiments(root: Path) -> int:
    """How many experiments `<root>/mlflow.db` has; whatever MLflow raises, if it is damaged."""
    _import()
    from mlflow.tracking import MlflowClient

    return len(MlflowClient(_address(root.resolve() / "mlflow.db")).search_experiments())


def _saved(
    data: Path, folder: Path, left_open: Mapping[str, Any], run_id: str, record: Any
) -> Path:
    """Write MLflow's folder of a model that `rediffuse.serving` loads: no pickle, and no code."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    image, name, png = ColSpec("long", "image"), ("string", "class"), ColSpec("string", "png")
    kinds = {int: "long", float: "double", str: "string"}
    params = [ParamSpec(key, kinds[type(value)], value) for key, value in left_open.items()]
    asked, answered = Schema([image, ColSpec(*name, required=False)]), [image, ColSpec(*name), png]
    save_model(
        str(folder),
        loader_module="rediffuse.serving",
        data_path=str(data),
        signature=ModelSignature(asked, Schema(answered), ParamSchema(params)),
        input_example={"image": [0, 1]},
        pip_requirements=[f"{package}=={version(package)}" for package in _NEEDED],
        mlflow_model=Model(run_id=run_id, model_id=record.model_id),
    )
    return folder


def _address(database: Path) -> str:
    if {"%", "?"} & set(str(database)):
        raise RunError(
            f"no database can be addressed in {database.parent}; choose a root without % and ?"
        )
    return f"sqlite:///{database}"


def _import() -> None:
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow.tracking  # noqa: F401


def _checked(run: Any) -> Any:
    """A run as MLflow answers, or an error where something else did."""
    if not _ID.fullmatch(run.info.run_id or ""):
        raise RunError(
            "the server's answer names no run; is $MLFLOW_TRACKING_URI an MLflow server?"
        )
    return run


def _identity(point: Any) -> Point:
    """Step, time and value; for an infinite value MLflow keeps the largest one there is."""
    value = float(point.value)
    if math.isinf(value):
        value = math.copysign(sys.float_info.max, value)
    return point.step, point.timestamp, repr(value)


def _key(name: str) -> str:
    """MLflow allows letters, digits and `_-. :` in names, and `/` where a path has need of it."""
    parts = re.sub(r"[^\w\-. :/]", "_", name)[:KEY_LENGTH].split("/")
    return "/".join(part for part in parts if part.strip(".")) or "_"


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
