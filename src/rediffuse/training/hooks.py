"""What looks on while the loop runs; a hook reads the state and changes no weight."""

import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from rediffuse.data.batches import Batch
from rediffuse.errors import TrainingError
from rediffuse.losses import Noised
from rediffuse.process import diffuse
from rediffuse.processes import ENDING, is_ignored
from rediffuse.randomness import Stream, normal, uniform
from rediffuse.tensors import sent
from rediffuse.times import LossAware
from rediffuse.training.devices import Ballot, Devices
from rediffuse.training.loop import Hook, Stop
from rediffuse.training.state import Sums, TrainState
from rediffuse.training.step import Recipe

_IMPORTED = time.monotonic()

Record = Callable[[dict[str, float], int], None]


class Log:
    """Record mean losses since the last time, learning rate, gradient norm and speed."""

    def __init__(self, record: Record) -> None:
        self._record, self._clock = record, _Clock()

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Record them, and begin anew."""
        self._write(state, metrics)
        state.since_log = Sums()

    def rest(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Record what came after the last time, if anything did, at the end of a run.

        Nothing begins anew, so that a run that is made longer goes on as if it had been planned so.
        """
        if state.since_log.images:
            self._write(state, metrics)

    def _write(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        values = state.since_log.means()
        values |= {name: metrics[name].item() for name in ("gradient_norm", "learning_rate")}
        speed = self._clock.per_second(state.images_seen)
        values |= {} if speed is None else {"images_per_s": speed}
        values |= {"skipped_steps": float(state.skipped_steps.item())}
        values |= {"loss_spikes": state.usual_loss.spikes.item()}
        state.metrics["loss"] = values["loss"]
        self._record(values, state.images_seen)


class LogEpoch:
    """Record the mean training loss of the epoch that has just ended."""

    def __init__(self, record: Record, images_per_epoch: int) -> None:
        self._record, self._images_per_epoch = record, images_per_epoch

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Record it, and begin anew."""
        self._write(state, float(state.images_seen // self._images_per_epoch))
        state.this_epoch = Sums()

    def rest(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Record a part of an epoch at the end of a run, if there is one, as `Log.rest` does."""
        if state.this_epoch.images:
            self._write(state, state.images_seen / self._images_per_epoch)

    def _write(self, state: TrainState, epoch: float) -> None:
        loss = state.metrics["epoch/loss"] = state.this_epoch.means()["loss"]
        self._record({"epoch": epoch, "epoch/loss": loss}, state.images_seen)


Measure = Callable[[], float]


def validate(
    recipe: Recipe,
    batches: Sequence[Batch],
    record: Record,
    attempt: Callable[[Measure, int], float | None] = lambda measure, images_seen: measure(),
) -> Hook:
    """Record the loss on held-out images at fixed times and noise, and remember the best.

    `attempt` measures, and gives None for what cannot be measured: then nothing is recorded. What
    the first rank measures counts for all, so that all of them stop early or none.
    """

    def look(state: TrainState, metrics: dict[str, Tensor]) -> None:
        mine = attempt(lambda: validation_loss(recipe, state, batches), state.images_seen)
        loss = recipe.devices.everyones(mine)[0]
        if loss is None:  # no checkpoint is the best by a loss of long ago
            state.metrics.pop("validation/loss", None)
            return
        state.metrics["validation/loss"] = loss
        state.checks_since_best += 1
        if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.checks_since_best = loss, 0
        record({"validation/loss": loss}, state.images_seen)

    return look


@torch.no_grad()
def validation_loss(recipe: Recipe, state: TrainState, batches: Sequence[Batch]) -> float:
    """The mean loss of the averaged weights; image k has the same time and noise every time."""
    denoiser = replace(recipe.denoiser, network=state.sampler.eval())
    schedule, times = denoiser.schedule, recipe.times
    drawn = times.evenly if isinstance(times, LossAware) else times
    total, images = 0.0, sum(len(batch.index) for batch in batches)
    for batch in batches:
        # One time in each of as many equal parts of the clock as there are images.
        u = (batch.index + uniform(recipe.seed, Stream.EVALUATION, batch.index, 1)[:, 0]) / images
        t = drawn(schedule, u)
        index = sent(batch.index, batch.x_0.device)
        eps = normal(recipe.seed, Stream.EVALUATION, index, tuple(batch.x_0.shape[1:]), draw=1)
        with recipe.autocast():
            x_t = diffuse(schedule, batch.x_0, eps, t)
            noised = Noised(batch.x_0, eps, x_t, t, batch.cond)
            losses = recipe.objective(denoiser, recipe.weighting, noised)
        total += losses.sum().item()
    return total / images


def spikes(tell: Callable[[str], None], known: float) -> Hook:
    """Say where the loss has spiked since the last time; `known` spikes have been told."""

    def look(state: TrainState, metrics: dict[str, Tensor]) -> None:
        nonlocal known
        usual = state.usual_loss
        if (found := usual.spikes.item()) > known:
            times = "once" if found - known == 1 else f"{found - known:g} times"
            tell(
                f"the loss spiked {times}, last after "
                f"{usual.last_spike_images.item():,} images; usual is {usual.mean.item():.4g}"
            )
        known = found

    return look


class NonFinite:
    """Record every skipped step: which images, at which times, with which losses and gradients.

    A CPU is asked after each step; another device only when `due` steps have gathered, since it
    would have to finish all that it was told. TrainingError is raised after `limit` such steps in a
    row.
    """

    def __init__(
        self, record: Callable[[dict[str, Any], int], None], limit: int, due: int = 50
    ) -> None:
        self._record, self._limit, self._due = record, limit, due
        self._gathered: list[tuple[int, int, dict[str, Tensor]]] = []

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Take a step in, and look where that costs nothing, or is due."""
        self._gathered.append((state.step, state.images_seen, metrics))
        if metrics["finite"].device.type == "cpu" or len(self._gathered) >= self._due:
            self.look(state)

    def look(self, state: TrainState) -> None:
        """Record what has gathered; raise if too many steps in a row were skipped."""
        gathered, self._gathered = self._gathered, []
        if not gathered or torch.stack([m["finite"] for _, _, m in gathered]).all():
            return
        for step, images_seen, metrics in gathered:
            if not metrics["finite"]:
                self._record(_fault(state, step, metrics), images_seen)
        if (in_a_row := int(state.skipped_in_a_row)) >= self._limit:
            raise TrainingError(
                f"{in_a_row} steps in a row without finite gradients (norm "
                f"{metrics['gradient_norm'].item():g} after {state.images_seen:,} images), written "
                "down in logs/non_finite.jsonl; the last checkpoint is untouched. Lower "
                "training.learning_rate, or use precision=bf16 or fp32"
            )


def _fault(state: TrainState, step: int, metrics: dict[str, Tensor]) -> dict[str, Any]:
    """All that may explain a step without finite gradients; the norms are those of each tensor."""
    names = [
        name
        for part, prefix in ((state.network, ""), (state.learned, "learned"))
        for name, parameter in part.named_parameters(prefix)
        if parameter.grad is not None
    ]
    told = metrics["gradient_norms"].tolist()
    norms = {name: str(norm) for name, norm in zip(names, told, strict=True)}
    return {
        "step": step,
        "loss": str(metrics["loss"].item()),
        "gradient_norm": str(metrics["gradient_norm"].item()),
        "samples": metrics["samples"].tolist(),
        "times": metrics["times"].tolist(),
        "losses": [str(loss) for loss in metrics["losses"].tolist()],
        "not_finite": [name for name, norm in norms.items() if not math.isfinite(float(norm))],
        "gradient_norms": norms,
    }


def digest(
    write: Callable[[dict[str, str], int], None], batch_size: int, images: int, planned: int
) -> Hook:
    """Write digests after 1, 2, 4, 8, ... steps, at multiples of `images`, and at the end."""

    def look(state: TrainState, metrics: dict[str, Tensor]) -> None:
        seen, step = state.images_seen, state.step
        passed = seen // images > (seen - batch_size) // images
        if passed or step & (step - 1) == 0 or seen >= planned:
            write(digests(state, metrics), seen)

    return look


def digests(state: TrainState, metrics: dict[str, Tensor]) -> dict[str, str]:
    """All that two equal runs have in common after a step: exact numbers, and SHA-256 of tensors.

    In the order in which one brings the next to part.
    """
    found = {name: float(metrics[name]).hex() for name in ("loss", "gradient_norm")}
    return found | state_digests(state)


def state_digests(state: TrainState) -> dict[str, str]:
    """SHA-256 of weights, average and optimizer, of equal states the same."""
    found = {}
    found["weights"] = _sha256(
        state.network.state_dict() | state.learned.state_dict(prefix="learned.")
    )
    if state.average:
        found["average"] = _sha256(state.average.network.state_dict())
    moments = state.optimizer.state_dict()["state"]
    found["optimizer"] = _sha256(
        {
            f"{index} {name}": torch.as_tensor(value)
            for index, named in moments.items()
            for name, value in named.items()
        }
    )
    return found


def at_end(is_at_end: Callable[[TrainState], bool], hook: Hook) -> Hook:
    """Call a hook after the last step of a run."""

    def look(state: TrainState, metrics: dict[str, Tensor]) -> None:
        if is_at_end(state):
            hook(state, metrics)

    return look


def stop_when(reason: Callable[[TrainState], str | None]) -> Hook:
    """Stop for a reason that the state alone gives."""

    def look(state: TrainState, metrics: dict[str, Tensor]) -> None:
        if why := reason(state):
            raise Stop(why)

    return look


def stopped_early(state: TrainState, checks: int | None) -> str | None:
    """Why training has ended by early stopping, if it has: `checks` validations in vain."""
    if checks is None or state.checks_since_best < checks:
        return None
    return f"no better validation loss in {checks} checks"


def first_step(tell: Callable[[str], None]) -> Hook:
    """Say how long it took from the start of the process to the end of the first step."""
    told = False

    def look(state: TrainState, metrics: dict[str, Tensor]) -> None:
        nonlocal told
        if not told:
            metrics["loss"].item()  # on a GPU, a step has ended when its numbers are there
            tell(f"first step done {_seconds_since_start():.1f} s after the start")
        told = True

    return look


def _seconds_since_start() -> float:
    """Seconds since this process was made; without /proc, since this module was imported."""
    with suppress(OSError):
        since_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - _IMPORTED


class Profile:
    """Profile a few steps with torch's profiler, once torch has settled, into two files.

    `trace.json` opens in a browser (ui.perfetto.dev); `profile.txt` lists what took longest.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder, self._tell, self._steps = folder, tell, 0
        self._profiler: Any = None

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Begin, go on or end."""
        self._steps += 1
        if self._steps == PROFILED.start:
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it complains of missing GPUs
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.start()
        elif self._steps == PROFILED.stop:
            self._profiler.stop()
            self._write()

    def _write(self) -> None:
        self._profiler.export_chrome_trace(str(self._folder / "trace.json"))
        on = "cuda" if torch.cuda.is_available() else "cpu"
        table = self._profiler.key_averages().table(f"self_{on}_time_total", row_limit=40)
        (self._folder / "profile.txt").write_text(table)
        self._profiler = None
        self._tell(f"profile of {len(PROFILED)} steps in {self._folder}/trace.json and profile.txt")


PROFILED = range(5, 10)
"""After which of a process' steps `Profile` begins and ends."""


class Interrupts:
    """End training after the step that a signal of `processes.ENDING` meets.

    A second SIGINT or SIGTERM ends the process at once. It counts from `REPEATED_S` after the first
    on: terminals, launchers and schedulers deliver one signal several times. Several ranks, which
    signals meet at different steps, end together one step later. What the parent process ignores
    stays ignored. Python lets the main thread alone handle signals; in others there are none here.
    """

    def __init__(self, devices: Devices) -> None:
        self.received: signal.Signals | None = None
        self._demanded: float | None = None  # when SIGINT or SIGTERM came first
        self._ballot = Ballot(devices)
        here = threading.current_thread() is threading.main_thread()
        handled = [number for number in ENDING if here and not is_ignored(number)]
        self._before = {number: signal.signal(number, self._note) for number in handled}

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Stop if a signal has come."""
        if number := self._ballot.cast(self.received or 0):
            self.received = signal.Signals(number)
            self.go_on()

    def go_on(self) -> None:
        """Raise a Stop if a signal has come, also in the middle of something beside a step."""
        if self.received:
            raise Stop(f"{self.received.name} received")

    def agreed(self, code: int) -> int:
        """The first rank's exit code, once all ranks are here.

        A launcher ends all others when one leaves with an error, be it while the first one saves.
        """
        return self._ballot.of_the_first(code)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number not in (signal.SIGINT, signal.SIGTERM):
            return
        now = time.monotonic()
        if self._demanded is None:
            self._demanded = now
        elif now - self._demanded > REPEATED_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


REPEATED_S = 1.0
"""Seconds in which the same request to end may come again by another way."""


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """16 digits are enough for what is changed by mistake; the order of names does not matter."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


class _Clock:
    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def per_second(self, images_seen: int) -> float | None:
        """The speed since the call before; None at the first."""
        now, last = (time.monotonic(), images_seen), self._last
        self._last = now
        return (now[1] - last[1]) / (now[0] - last[0]) if last else None
