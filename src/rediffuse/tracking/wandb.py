"""Weights & Biases, online or offline; an optional dependency.

`$WANDB_MODE=offline` writes to `<root>/wandb/offline-run-<when>-<run id>`, for `wandb sync`: beside
the runs and not in one, since W&B leaves a link there, and a run keeps its own files. It is told
metrics, pictures and the configuration, and nothing of the console, the command, the checkout or
the machine. Importing it takes seconds, so it happens at first use.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rediffuse.errors import ConfigError, RunError
from rediffuse.rasters import read_png
from rediffuse.tracking.tracker import Held, Row

# Well within what the end of a run waits for a tracker.
INIT_S, FINISH_S = 8.0, 5.0

PROJECT_LENGTH = 128
_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "symlink": False,
    "init_timeout": INIT_S,
    "finish_timeout": FINISH_S,
    "finish_timeout_raises": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


def tracker(directory: Path, experiment: str, name: str | None, parent: str | None) -> "Wandb":
    """Copy the run in `<root>/<run id>` to Weights & Biases, in the project `experiment`.

    Raises:
        ConfigError: if the `wandb` package is not installed.
    """
    if find_spec("wandb") is None:
        raise ConfigError(
            "tracking.trackers: 'wandb' needs the package of that name; "
            "install rediffuse[wandb] or choose tracking=mlflow"
        )
    return Wandb(directory, experiment, name)


class Wandb:
    """A `Tracker` for one run of a project; the metrics' step is `images`."""

    name = "wandb"

    def __init__(self, directory: Path, experiment: str, name: str | None) -> None:
        self._id, self._name = directory.name, name
        self._folder = directory.parent / "wandb"
        self._project = re.sub(r"[/\\#?%:]", "_", experiment)[:PROJECT_LENGTH]
        self._run: Any = None

    def open(self, params: Mapping[str, Any]) -> Held:
        """Begin a run of our id, or go on with it.

        Raises:
            RunError: if there is no key to go online with; nobody is ever asked for one.
        """
        with _hooks_as_before(), _nothing_left_of_a_failure(self._folder, self._id) as known:
            self._run = self._begun(params)
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")
        if self._run.offline:
            was_there = any(path.name.startswith("offline-") for path in known)
            return "everything" if was_there else "nothing"
        # A process may have ended before all that it was given was uploaded. What arrived cannot be
        # told from the last images seen: retraining sends other values for fewer images. Everything
        # since the last `close` is sent again, as a point that is there twice does no harm.
        return "closed" if self._run.resumed else "nothing"

    def metrics(self, rows: Sequence[Row]) -> None:
        """Log rows, in any order of their images."""
        for row in rows:
            values = {key: value for key, value in row.items() if key not in ("images", "time")}
            self._log(values, int(row["images"]), row["time"])

    def artifact(self, path: Path, name: str, images_seen: int) -> None:
        """Show a PNG, under its name without the number; other files stay in the run only."""
        if path.suffix == ".png":
            import wandb

            try:
                picture = wandb.Image(read_png(path))
            except (OSError, ValueError):  # it is damaged, and would be so the next time
                return
            tag = name.removesuffix(".png").rpartition("-")[0] or name
            self._log({tag: picture}, images_seen, path.stat().st_mtime)

    def close(self, status: str) -> None:
        """End the run.

        Raises:
            RunError: if not everything was uploaded in time.
        """
        try:
            self._run.summary["status"] = status
            self._run.finish(exit_code=0 if status == "FINISHED" else 1)
        except Exception as failed:
            self._run = None  # `finish` of a finished run would say nothing
            raise RunError(
                f"not everything was uploaded in {FINISH_S:g} s ({type(failed).__name__}); "
                f"`wandb sync {self._folder}/*{self._id}` does it"
            ) from None

    def _begun(self, params: Mapping[str, Any]) -> Any:
        wandb = _imported()
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not _has_key(wandb):
            raise RunError(
                "no key; run `wandb login`, set $WANDB_API_KEY, or set WANDB_MODE=offline"
            )
        self._folder.mkdir(exist_ok=True)
        try:
            return wandb.init(
                project=self._project,
                id=self._id,
                name=self._name,
                dir=str(self._folder.parent),
                config=dict(params),
                mode=mode,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(**_SETTINGS),
            )
        except BaseException:
            wandb.teardown()  # else its service says of every later attempt that the id is in use
            raise

    def _log(self, values: Mapping[str, Any], images_seen: int, at: float) -> None:
        self._run.log({**values, "images": images_seen, "_timestamp": at})


def _imported() -> Any:
    """W&B, quiet in the whole process: some of its messages are nobody's run's."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(settings=wandb.Settings(**_SETTINGS))
    return wandb


def _has_key(wandb: Any) -> bool:
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    kept = settings.api_key or settings.identity_token_file or os.environ.get("WANDB_API_KEY")
    return bool(kept or get_netrc_auth(settings.base_url))


@contextmanager
def _nothing_left_of_a_failure(folder: Path, run_id: str) -> Iterator[set[Path]]:
    """Remove what a failed attempt leaves, as there may be one a minute; yield what was there."""
    known = set(folder.glob(f"*run-*-{run_id}"))
    try:
        yield known
    except BaseException:
        for left in set(folder.glob(f"*run-*-{run_id}")) - known:
            shutil.rmtree(left, ignore_errors=True)
        raise


@contextmanager
def _hooks_as_before() -> Iterator[None]:
    """W&B puts itself before `sys.exit` and the hook for exceptions; the end of a run is ours."""
    before = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = before
