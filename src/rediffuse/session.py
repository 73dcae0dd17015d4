"""What surrounds the loop in one process: what is recorded, shown and saved, and when."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from rediffuse import drawing
from rediffuse.config.compose import leaves
from rediffuse.config.schema import FREE, Config
from rediffuse.data.batches import Batch, fixed
from rediffuse.errors import RediffuseError, TrainingError
from rediffuse.images import Images
from rediffuse.judging import Proxy
from rediffuse.lengths import command, next_command, planned_images
from rediffuse.models import Model
from rediffuse.pictures import columns_for, grid
from rediffuse.progress import Progress
from rediffuse.randomness import order
from rediffuse.runs import Run, Status, locked
from rediffuse.serving import export
from rediffuse.tracking import mlflow, tensorboard, wandb
from rediffuse.tracking.journal import Journal, replay
from rediffuse.tracking.jsonl import append, cut_back, read_metrics, write_atomically
from rediffuse.tracking.resources import Resources, Waiting
from rediffuse.tracking.tracker import Tracker, in_one_line
from rediffuse.training import checkpoint, committed, hooks
from rediffuse.training.loop import Hook, Stop, every
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe
from rediffuse.words import json_text, masked_tree, say, tell

Value = TypeVar("Value")

Look = Callable[[int, Mapping[str, float]], object]
"""Is told the images seen, and the metrics that are recorded then."""


def unseen(images_seen: int, values: Mapping[str, float]) -> None:
    """Look at nothing."""


class Session:
    """One process' part of a run. Every rank measures; the first one writes and talks.

    `go_on` raises a Stop where training shall end: no preview is drawn to its end then, but when
    the run is resumed. It ends a single rank's training there; several end together.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        images: Images,
        recipe: Recipe,
        look: Look,
        go_on: Callable[[], None],
    ) -> None:
        self._look, self._go_on = look, go_on
        self.run, self.config, self.images, self.recipe = run, config, images, recipe
        self.planned = planned_images(config, images.per_epoch)
        self._main = recipe.devices.is_main
        self._saving = checkpoint.Background()
        self._saved_step: int | None = None
        self._spikes, self._begun = 0.0, False
        self._validation = self._held_out()
        self._drawn_at: int | None = None
        self._tried_at: int | None = None
        self._skipped = hooks.NonFinite(self._fault, config.training.non_finite_limit)
        self._proxy = Proxy(run.directory.parent, images, self._say)

    def begin(self, state: TrainState) -> None:
        """Open the record where the state is, and say what is going to happen."""
        if not self._main:
            return
        self._saved_step, self._spikes = state.step or None, state.usual_loss.spikes.item()
        trackers = trackers_of(self.config, self.run, self.run.read().parent)
        self._console = Progress(self.planned, first=state.images_seen, stays=True)
        params, tell = self.config.model_dump(), self._console.say
        self._journal = Journal(self.run.directory, trackers, params, tell)
        self._journal.start(state.images_seen)
        self._begun = True
        self.run.update(status="RUNNING")
        cut_back(self.run.digests, state.images_seen or -1)  # a new beginning leaves no line
        if state.images_seen == 0:
            append(self.run.digests, 0, beginning(self.config, self.recipe))
        self._announce(state)

    def owed_preview(self, state: TrainState) -> None:
        """Draw the last preview that was due, if it is not there; a signal may have broken it off.

        Raises:
            Stop: as `preview` does.
        """
        if not (self._main and self.config.training.previews):
            return
        due = state.images_seen // self._preview_every * self._preview_every
        drawn = self._journal.pictures("preview")
        if due and not any(due <= images <= state.images_seen for images in drawn):
            self.preview(state)

    def watched(self, steps: Iterator[Sequence[Batch]]) -> Iterator[Sequence[Batch]]:
        """Hand steps on, and know how long training waited for them."""
        waiting = Waiting(steps)
        self._resources = Resources(self.run.directory, self.recipe.devices.device, waiting)
        return waiting

    def hooks(self) -> list[Hook]:
        """Everything that looks on, in order: what reads the state before what saves it."""
        training, size = self.config.training, self.config.training.batch_size
        epoch, now_and_then = self.images.per_epoch, self._now_and_then
        when = partial(every, batch_size=size)
        often = training.log_every_images or min(50 * size, epoch)
        log, log_epoch = hooks.Log(self._log), hooks.LogEpoch(self._record, epoch)
        looking: list[Hook] = [
            self._skipped,
            when(often, hook=log),
            when(epoch, hook=log_epoch),
        ]
        if self._validation:
            attempt = partial(self._attempt, "validation loss")
            check = hooks.validate(self.recipe, self._validation, self._record, attempt)
            looking.append(when(training.validate_every_images or now_and_then, hook=check))
        looking += [hooks.at_end(self._is_at_end, rest) for rest in (log.rest, log_epoch.rest)]
        if self._main:
            saves = training.checkpoint_every_images or now_and_then
            looking.append(hooks.first_step(self._say))
            if self.config.profile:
                looking.append(self._attempted("profile", hooks.Profile(self.run.logs, self._say)))
            looking.append(when(often, hook=hooks.spikes(self._say, self._spikes)))
            looking.append(hooks.digest(self._digest, size, saves, self.planned))
            if training.proxy_every_images:
                proxy = when(training.proxy_every_images, hook=lambda state, _: self.proxy(state))
                looking.append(proxy)
            if training.previews:
                preview = when(self._preview_every, hook=lambda state, _: self.preview(state))
                looking.append(preview)
            looking.append(when(saves, hook=lambda state, _: self.save(state)))
        looking.append(hooks.stop_when(self.ended))
        return looking

    def _is_at_end(self, state: TrainState) -> bool:
        """Whether the run, not this process alone, ends here."""
        checks = self.config.training.early_stopping_checks
        return state.images_seen >= self.planned or bool(hooks.stopped_early(state, checks))

    def check_trained(self, state: TrainState) -> None:
        """Hold a run that has come to its end to have learned something.

        Raises:
            TrainingError: if every step of it was skipped.
        """
        self._skipped.look(state)
        if self._is_at_end(state) and state.step and int(state.skipped_steps) == state.step:
            raise TrainingError(
                f"all {state.step} steps were skipped, since no loss or gradient was finite "
                "(logs/non_finite.jsonl): nothing was learned. Look at data.mean and data.std, "
                "lower training.learning_rate, or use training.precision=bf16 or fp32"
            )

    def ended(self, state: TrainState) -> str | None:
        """Why this process takes no further step, though the planned length is not reached."""
        training = self.config.training
        if early := hooks.stopped_early(state, training.early_stopping_checks):
            return early
        if training.stop_after_images and state.images_seen >= training.stop_after_images:
            return f"stopped after {training.stop_after_images} images, as asked"
        return None

    def save(self, state: TrainState) -> None:
        """Begin to commit a checkpoint, unless this very step has one, and let old ones go.

        Training goes on meanwhile; a second checkpoint waits for the first, and raises its error.
        """
        if not self._main or self._saved_step == state.step:
            return
        self._saving.wait()  # before there is a second copy of everything
        saved = checkpoint.snapshot(state)
        self._saved_step = state.step

        def commit() -> None:
            checkpoint.write(saved, self.run.checkpoints)
            self.run.update(images_seen=saved.images_seen)
            self._retain()

        self._saving.start(commit)

    def _retain(self) -> None:
        """Let old checkpoints go; a folder that cannot be listed is no reason to stop training."""
        training = self.config.training
        try:
            committed.retain(
                self.run.checkpoints,
                training.keep_checkpoints,
                self._say,
                every_images=training.keep_every_images,
                metric=training.best_metric,
            )
        except OSError as failed:
            self._say(f"old checkpoints are kept for now ({failed.strerror or failed})")

    def saved(self) -> None:
        """Wait until the last checkpoint is there; raise what kept it from being written."""
        self._saving.wait()

    def preview(self, state: TrainState) -> None:
        """Draw the same images as every time, from the averaged weights, into one picture.

        Raises:
            Stop: if training shall end meanwhile. There is no picture then, nor a Stop where other
                ranks wait in the next step.
        """
        if not self._main or self._tried_at == state.images_seen:
            return
        self._tried_at = state.images_seen
        try:
            self._attempt("preview", lambda: self._draw(state), state.images_seen)
        except Stop:
            if self.recipe.devices.ranks == 1:
                raise
            # The other ranks are in the next step by now, and this one joins them there.

    def _draw(self, state: TrainState) -> None:
        count, names = self.config.training.preview_count, self.images.class_names
        numbers = tuple(range(count))
        model = self._model(state)
        job = drawing.Job(numbers, drawing.classes_for(numbers, names), batch_size=count)
        drawn = drawing.draw(model, self.config.sampling, job, lambda _: self._go_on())
        pixels = np.concatenate([some for _, some in drawn])
        picture = grid(pixels, columns_for(count, names))
        self.picture = self._journal.images("preview", picture, state.images_seen)
        self._drawn_at = state.images_seen

    def final_preview(self, state: TrainState) -> None:
        """Draw what a run that is at its end has come to; raises a Stop as `preview` does."""
        if self.config.training.previews and state.images_seen >= self.planned:
            self.preview(state)

    @property
    def _now_and_then(self) -> int:
        """How many images pass between two of what is not said otherwise."""
        return max(self.images.per_epoch, self.planned // 20)

    @property
    def _preview_every(self) -> int:
        return self.config.training.preview_every_images or self._now_and_then

    def proxy(self, state: TrainState) -> None:
        """Record how far a few images of the averaged weights are from real ones, cheaply."""
        training = self.config.training

        def measured() -> dict[str, float]:
            found = self._proxy(self._model(state), training.proxy_images, training.proxy_steps)
            if not all(map(math.isfinite, found.values())):
                raise ArithmeticError("the distance is not finite")
            return found

        found = self._attempt("proxy", measured, state.images_seen)
        if found is None:  # no checkpoint is the best by a distance of long ago
            state.metrics = {
                name: value for name, value in state.metrics.items() if name[:6] != "proxy/"
            }
            return
        state.metrics |= found
        self._record(found, state.images_seen)

    def _attempt(self, what: str, act: Callable[[], Value], images_seen: int) -> Value | None:
        """Do what only observes training; say what went wrong with it, and go on.

        Raises:
            Stop: if `act` does.
        """
        try:
            return act()
        except Stop:
            raise
        except Exception as failed:
            if self._main:
                self._say(f"no {what} after {images_seen:,} images: {_why(failed)}")
            return None

    def _attempted(self, what: str, hook: Hook) -> Hook:
        """A hook that only observes training, and may fail."""
        return lambda state, metrics: self._attempt(
            what, lambda: hook(state, metrics), state.images_seen
        )

    def _model(self, state: TrainState) -> Model:
        """What samples come from, as it is now."""
        denoiser = replace(self.recipe.denoiser, network=state.sampler.eval())
        device, precision = self.recipe.devices.device, self.recipe.precision
        return Model(self.config, denoiser, self.images.class_names, device, precision)

    def end(self, state: TrainState, status: Status) -> None:
        """Settle the record of a run that went as far as it should."""
        self._skipped.look(state)
        if self._main:
            self._settle(state, status)

    def fail(self, state: TrainState) -> None:
        """Settle the record of a run that cannot go on; whatever fails here is not the cause."""
        if not self._main:
            return
        with suppress(RediffuseError, OSError):
            self._saving.wait()
        try:
            self._settle(state, "FAILED")
        except OSError as failed:
            say(f"{failed.filename}: {failed.strerror}; this run's record is not settled")

    def _settle(self, state: TrainState, status: Status) -> None:
        if not self._begun:
            self.run.update(status=status)
            return
        self._console.move(state.images_seen)
        self._console.close()
        self._write_epochs()
        self.run.update(status=status)
        newest = committed.checkpoints(self.run.checkpoints)[-1:]
        weights = [c / "average.safetensors" for c in newest if status == "FINISHED"]
        for file in (self.run.config, self.run.environment, self.run.epochs, *weights):
            if file.exists():
                self._journal.artifact(file, state.images_seen)
        self._journal.close(status)

    def farewell(self, state: TrainState, reason: str) -> None:
        """Say how it ended, and how to go on."""
        if not self._main:
            return
        run = self.run
        say(f"{reason} at {state.images_seen:,} of {self.planned:,} images: run {run.id}")
        if self._drawn_at is not None:
            say(f"  images  {self.picture}")
        say(f"  metrics {run.epochs}")
        going_on = command("resume", run.id, self.config)
        if run.read().status == "FINISHED":
            ended = state.images_seen, self.planned, state.checks_since_best
            going_on = next_command(run.id, self.config, *ended)
        say(f"  resume  {going_on}")
        say(f"  sample  {command('sample', run.id, self.config)}")

    def _announce(self, state: TrainState) -> None:
        run, training = self.run, self.config.training
        weights = sum(p.numel() for p in state.network.parameters())
        began = f"from {state.images_seen:,} " if state.images_seen else ""
        until = (
            f"{began}to {self.planned:,} images ({self.planned / self.images.per_epoch:.4g} epochs)"
        )
        if training.stop_after_images:
            until += f", stopping at {training.stop_after_images:,}"
        say(f"run     {run.id}")
        say(f"in      {run.directory}")
        device = self.recipe.devices.device
        say(f"model   {weights:,} parameters on {device}, {self.config.determinism}")
        say(f"trains  {until}")
        say(f"resume  {command('resume', run.id, self.config)}")
        say(f"sample  {command('sample', run.id, self.config)}")

    def _say(self, line: str) -> None:
        """Tell the user one line, above the bar."""
        self._console.say(line, sys.stdout)

    def _log(self, values: dict[str, float], images_seen: int) -> None:
        """What training says, and now and then what the machine does."""
        if self._main:
            self._record(values | self._resources(), images_seen)

    def _record(self, values: dict[str, float], images_seen: int) -> None:
        if not self._main:
            return
        self._journal.metrics(values, images_seen)
        self._tell_look(images_seen, values)
        shown = {name.replace("validation/loss", "held out"): values[name] for name in values}
        self._console.move(
            images_seen, {name: shown[name] for name in ("loss", "held out") if name in shown}
        )

    def _tell_look(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Call the caller's `look`, and never again once it has raised."""
        try:
            self._look(images_seen, values)
        except Stop:
            raise
        except Exception as failed:
            self._look = unseen
            self._say(f"look failed after {images_seen:,} images: {_why(failed)}; not called again")

    def _fault(self, values: dict[str, Any], images_seen: int) -> None:
        """Write down a step that was skipped, with the rows of the packed images that it saw."""
        if not self._main:
            return
        places = order(torch.tensor(values["samples"]), self.images.per_epoch, self.config.seed)
        rows = self.images.train_rows[places.numpy()]
        append(self.run.logs / "non_finite.jsonl", images_seen, {**values, "rows": rows.tolist()})

    def _digest(self, digests: dict[str, str], images_seen: int) -> None:
        append(self.run.digests, images_seen, digests)

    def _held_out(self) -> list[Batch]:
        part, data = self.images.held_out, self.config.data
        if part is None:
            return []
        return fixed(
            part.images,
            part.labels if self.images.class_names else None,
            self.images.held_out_rows,
            count=self.config.training.validation_images,
            batch_size=self.config.training.batch_size,
            mean=data.mean,
            std=data.std,
            device=self.recipe.devices.device,
        )

    def _write_epochs(self) -> None:
        """Write the mean loss of each epoch; the last one may be a part of an epoch."""
        epochs = [
            {
                "epoch": int(row["epoch"]) if row["epoch"].is_integer() else row["epoch"],
                "images": int(row["images"]),
                "loss": row["epoch/loss"],
            }
            for row in read_metrics(self.run.metrics)
            if "epoch/loss" in row and math.isfinite(row.get("epoch", math.nan))
        ]
        write_atomically(self.run.epochs, json_text(epochs).encode())


def _why(failed: Exception) -> str:
    """What went wrong, in one line."""
    told = in_one_line(failed)
    return told if isinstance(failed, RediffuseError) else f"{type(failed).__name__}: {told}"


def trackers_of(config: Config, run: Run, parent: str | None) -> list[Tracker]:
    """The trackers that a run asks for; nothing is reached or written yet.

    Raises:
        ConfigError: if one is not installed.
    """
    tracking = config.tracking
    place = (run.directory, tracking.experiment, config.name, parent)
    more = {"mlflow": {"export": export, "register": tracking.register_model}}
    return [_TRACKERS[name](*place, **more.get(name, {})) for name in tracking.trackers]


def send_what_is_missing(run: Run, config: Config, to: Callable[[str], None] | None = None) -> None:
    """Send trackers what they miss of a run that has ended; hold its lock.

    Everything that stands in the run's files and was not delivered is sent, whichever process
    wrote it. A run that is still RUNNING, or was killed so, sends it when it goes on. Lines for the
    user go `to` a function, by default to standard output.

    Raises:
        RediffuseError: if a tracker is not installed, or its record is damaged.
    """
    record = run.read()
    if record.status != "RUNNING":
        trackers = trackers_of(config, run, record.parent)
        replay(run.directory, trackers, config.model_dump(), to or say, record.status)


def send_if_free(run: Run, config: Config) -> None:
    """Send trackers what they miss, unless another process holds the run; never raise for it."""
    with suppress(RediffuseError, OSError), locked(run):
        send_what_is_missing(run, config, say_beside)


def say_beside(line: str) -> None:
    """Tell the user one line on standard error, beside a command's results."""
    tell(line, sys.stderr)


def beginning(config: Config, recipe: Recipe) -> dict[str, Any]:
    """What a run begins with, in the first line of its digests: all that may not change freely."""
    values = {
        key: value
        for key, value in leaves(config.model_dump()).items()
        if not f"{key}.".startswith(tuple(f"{free}." for free in FREE))
    }
    devices = recipe.devices
    config_facts = masked_tree(values)
    return {"config": config_facts, "ranks": devices.ranks, "device": devices.device.type}


_TRACKERS: dict[str, Callable[..., Tracker]] = {
    "mlflow": mlflow.tracker,
    "tensorboard": tensorboard.tracker,
    "wandb": wandb.tracker,
}
