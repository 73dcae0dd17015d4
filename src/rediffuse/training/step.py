"""One optimizer step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from rediffuse.data.batches import Batch
from rediffuse.denoiser import Denoiser
from rediffuse.errors import TrainingError
from rediffuse.losses import simple_loss
from rediffuse.randomness import Stream, normal, torch_seeded, uniform
from rediffuse.times import Times
from rediffuse.training.devices import Devices
from rediffuse.training.optimizers import set_learning_rate
from rediffuse.training.state import Sums, TrainState
from rediffuse.weightings import Weighting


@dataclass(frozen=True)
class Recipe:
    """What training does at every step, whatever the state."""

    denoiser: Denoiser
    weighting: Weighting
    times: Times
    seed: int
    batch_size: int
    learning_rate: Callable[[int], float]  # of the images seen at the end of the step
    devices: Devices
    clip_norm: float | None = None
    label_dropout: float = 0.0
    null_class: int | None = None
    precision: torch.dtype = torch.float32
    non_finite_limit: int = 20

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that the network computes in; weights, norms and loss stay in float32."""
        if self.precision is torch.float32:
            return nullcontext()
        return torch.autocast(self.devices.device.type, self.precision)


def train_step(recipe: Recipe, state: TrainState, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Ho et al. 2020, Alg. 1, for one batch in one or more pieces; return gradient norm and loss.

    A step whose gradients are not finite leaves weights, average and optimizer alone and is
    counted.

    Raises:
        TrainingError: after `non_finite_limit` such steps in a row.
    """
    rate = recipe.learning_rate(state.images_seen + recipe.batch_size)
    set_learning_rate(state.optimizer, rate)
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)
    loss, sums = accumulate(recipe, state, batches)
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    recipe.devices.sum_over_ranks([*gradients, loss, *sums.tensors()])
    if state.scaler:
        state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.get_total_norm(gradients)
    if torch.isfinite(norm + loss):
        _update(recipe, state, norm)
        for window in (state.since_log, state.this_epoch):
            window.add(sums)
    else:
        _skip(recipe, state, norm)
    if state.scaler:
        state.scaler.update()
    state.images_seen += recipe.batch_size
    return {"loss": loss, "gradient_norm": norm, "learning_rate": torch.tensor(rate)}


def accumulate(recipe: Recipe, state: TrainState, batches: Sequence[Batch]) -> tuple[Tensor, Sums]:
    """Add up the gradients of the mean loss over the whole batch; return it, and what to log."""
    total, sums = torch.zeros((), device=recipe.devices.device), Sums()
    for batch in batches:
        losses, t = batch_losses(recipe, batch)
        loss = losses.sum() / recipe.batch_size
        (state.scaler.scale(loss) if state.scaler else loss).backward()
        total += loss.detach()
        sums.add(Sums.of(losses.detach(), recipe.denoiser.schedule(t).half_log_snr))
    return total, sums


def batch_losses(recipe: Recipe, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of each image at its own keyed time and noise, and those times."""
    index, seed = batch.index, recipe.seed
    t = recipe.times(recipe.denoiser.schedule, uniform(seed, Stream.TIME, index, 1)[:, 0])
    eps = normal(seed, Stream.NOISE, index.to(batch.x_0.device), tuple(batch.x_0.shape[1:]))
    with torch_seeded(seed, Stream.DROPOUT, int(index[0])), recipe.autocast():
        losses = simple_loss(
            recipe.denoiser, recipe.weighting, batch.x_0, eps, t, _some_dropped(recipe, batch)
        )
    return losses, t


def _some_dropped(recipe: Recipe, batch: Batch) -> Tensor | None:
    """Hide the class of a keyed share of images (Ho & Salimans 2022, Alg. 1)."""
    if batch.cond is None or recipe.null_class is None:
        return batch.cond
    drawn = uniform(recipe.seed, Stream.LABEL_DROP, batch.index, 1)[:, 0]
    hidden = (drawn < recipe.label_dropout).to(batch.cond.device)
    return batch.cond.masked_fill(hidden, recipe.null_class)


def _update(recipe: Recipe, state: TrainState, norm: Tensor) -> None:
    if recipe.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(state.network.parameters(), recipe.clip_norm, norm)
    if state.scaler:
        state.scaler.step(state.optimizer)
    else:
        state.optimizer.step()
    if state.average:
        state.average.update(state.network, state.images_seen, recipe.batch_size)
    state.skipped_in_a_row = 0


def _skip(recipe: Recipe, state: TrainState, norm: Tensor) -> None:
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= recipe.non_finite_limit:
        raise TrainingError(
            f"{state.skipped_in_a_row} steps in a row without finite gradients (norm "
            f"{norm.item():g} at image {state.images_seen}); the last checkpoint is untouched. "
            "Lower training.learning_rate, or use precision=bf16 or fp32"
        )
