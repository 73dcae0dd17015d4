"""TensorBoard event files in `<run>/logs/tensorboard`; an optional dependency.

Scalars, pictures, the configuration as hyper-parameters, and the graph of the network.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rediffuse.errors import ConfigError
from rediffuse.rasters import read_png
from rediffuse.tracking.tracker import Held, Row


def tracker(
    directory: Path, experiment: str, name: str | None, parent: str | None
) -> "TensorBoard":
    """Copy the run in `directory` to TensorBoard.

    Raises:
        ConfigError: if the `tensorboard` package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.trackers: 'tensorboard' needs the package of that name; "
            "install rediffuse[tensorboard] or choose tracking=mlflow"
        )
    return TensorBoard(directory / "logs" / "tensorboard")


FINAL = ("loss", "validation/loss", "epoch/loss")
"""The scalars whose last values stand beside the hyper-parameters."""

GRAPH = ".graph"


def draw_graph(directory: Path, network: Any, inputs: Sequence[Any]) -> None:
    """Write the graph of a run's network, once; `network` is traced, so give a copy."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    folder = directory / "logs" / "tensorboard"
    if any(folder.glob(f"*{GRAPH}")):
        return
    # That shapes become constants, that tracing is old, and that there is no graph.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, tuple(inputs), check_trace=False)
        with SummaryWriter(str(folder), filename_suffix=GRAPH) as writer:
            writer.add_graph(traced, tuple(inputs))


class TensorBoard:
    """A `Tracker` that writes event files; steps are images seen."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._ended: Any = None

    def open(self, params: Mapping[str, Any]) -> Held:
        """Start a new event file beside those of earlier processes."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        fresh = not any(path.suffix != GRAPH for path in self._folder.glob("*"))
        self._writer = SummaryWriter(str(self._folder))
        self._writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in params.items()))
        experiment, begun, self._ended = hparams(dict(_plain(params)), dict.fromkeys(FINAL, 0.0))
        for summary in (experiment, begun):
            self._writer.file_writer.add_summary(summary)
        return "nothing" if fresh else "everything"

    def metrics(self, rows: Sequence[Row]) -> None:
        """Write rows as scalars."""
        for row in rows:
            for key, value in row.items():
                if key not in ("images", "time"):
                    self._writer.add_scalar(key, value, int(row["images"]), row["time"])
        self._writer.flush()

    def artifact(self, path: Path, name: str, images_seen: int) -> None:
        """Show a PNG, under its name without the number; other files stay in the run only."""
        if path.suffix == ".png":
            try:
                pixels = np.asarray(read_png(path).convert("RGB"))
            except (OSError, ValueError):  # it is damaged, and would be so the next time
                return
            tag = name.removesuffix(".png").rpartition("-")[0] or name
            self._writer.add_image(tag, pixels, images_seen, dataformats="HWC")

    def close(self, status: str) -> None:
        """Finish the event file."""
        self._writer.add_text("status", status)
        if status == "FINISHED":
            self._writer.file_writer.add_summary(self._ended)
        self._writer.close()


def _plain(params: Mapping[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    """Hyper-parameters are numbers and words."""
    for key, value in params.items():
        yield key, value if isinstance(value, bool | int | float) else str(value)
