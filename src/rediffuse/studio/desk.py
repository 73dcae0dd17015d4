"""What outlives a click: the models that were used last, and which pages want no more images."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from sys import stderr
from threading import Event, Lock

from rediffuse import models
from rediffuse.errors import RunError
from rediffuse.models import Model
from rediffuse.runs import find_run
from rediffuse.studio.asking import Asked

_MODELS = 2  # so that two can be compared without loading either again


@dataclass
class Desk:
    """What all pages that are open share; `sessions` are theirs."""

    root: Path
    trusted: tuple[str, ...] = ()
    device: str = "auto"
    _loaded: OrderedDict[tuple[str, ...], Model] = field(default_factory=OrderedDict)
    _stops: dict[str, Event] = field(default_factory=dict)
    _loading: Lock = field(default_factory=Lock)

    def model(self, asked: Asked) -> Model:
        """Load what is asked for, or find it loaded.

        Raises:
            RediffuseError: if there is no such run or checkpoint, or it is damaged.
        """
        if not asked.run:
            raise RunError("there is no run to draw from; `rediffuse train` makes one")
        if not asked.checkpoint:
            raise RunError(f"run {asked.run[:8]} has no checkpoint yet")
        key = (asked.run, asked.checkpoint, asked.weights or "average")
        with self._loading:
            if key not in self._loaded:
                while len(self._loaded) >= _MODELS:
                    self._loaded.popitem(last=False)
                self._loaded[key] = self._load(*key)
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def _load(self, run: str, checkpoint: str, weights: str) -> Model:
        with redirect_stdout(stderr):  # what it tells of broken checkpoints
            return models.load(
                find_run(self.root, run).directory,  # of this root, and no path
                which=checkpoint,
                weights=weights,
                device=self.device,
                trusted=self.trusted,
            )

    def begin(self, session: str) -> Callable[[], bool]:
        """Note that a page draws now; what is returned says whether it still wants to."""
        stop = self._stops[session] = Event()
        return stop.is_set

    def stop(self, session: str) -> None:
        """End what a page draws, if it draws."""
        if session in self._stops:
            self._stops[session].set()

    def leave(self, session: str) -> None:
        """Forget a page that was closed."""
        self.stop(session)
        self._stops.pop(session, None)
