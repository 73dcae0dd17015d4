"""TensorBoard event files in `<run>/logs/tensorboard`; an optional dependency."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rediffuse.errors import ConfigError
from rediffuse.tracking.tracker import Row


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


class TensorBoard:
    """A `Tracker` that writes event files; steps are images seen."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self, params: Mapping[str, Any]) -> bool:
        """Start a new event file beside those of earlier processes."""
        from torch.utils.tensorboard import SummaryWriter

        fresh = not any(self._folder.glob("*"))
        self._writer = SummaryWriter(str(self._folder))
        self._writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in params.items()))
        return fresh

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
            pixels = np.asarray(Image.open(path, formats=["PNG"]).convert("RGB"))
            tag = name.removesuffix(".png").rpartition("-")[0] or name
            self._writer.add_image(tag, pixels, images_seen, dataformats="HWC")

    def close(self, status: str) -> None:
        """Finish the event file."""
        self._writer.add_text("status", status)
        self._writer.close()
