"""One optimizer step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rediffuse.data.batches import Batch
from rediffuse.denoiser import Denoiser
from rediffuse.losses import Noised, Objective
from rediffuse.pairings import Pairing, independent
from rediffuse.process import diffuse
from rediffuse.randomness import Normal, Stream, normal, torch_seeded, uniform
from rediffuse.tensors import expand, sent
from rediffuse.times import LossAware, Times
from rediffuse.training.devices import Devices
from rediffuse.training.optimizers import decides_on_device, set_learning_rate
from rediffuse.training.state import Sums, TrainState
from rediffuse.weightings import Weighting


@dataclass(frozen=True)
class Recipe:
    """What training does at every step, whatever the state."""

    denoiser: Denoiser
    objective: Objective
    weighting: Weighting
    times: Times
    seed: int
    batch_size: int
    learning_rate: Callable[[int], float]  # of the images seen at the end of the step
    devices: Devices
    pairing: Pairing = independent
    clip_norm: float | None = None
    label_dropout: float = 0.0
    null_class: int | None = None
    self_conditioning: float = 0.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    time_strata: int = 1
    precision: torch.dtype = torch.float32
    normal: Normal = normal

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that the network computes in; weights, norms and loss stay in float32."""
        if self.precision is torch.float32:
            return nullcontext()
        return torch.autocast(self.devices.device.type, self.precision)


def train_step(recipe: Recipe, state: TrainState, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Ho et al. 2020, Alg. 1, for one batch in one or more pieces; return loss and gradient norm.

    A step whose loss or gradients are not finite changes no weight, buffer, average or moment and
    is counted. Whether it was is decided on the device, so that a GPU need not be waited for; with
    float16, a part that learns beside the network, or an optimizer that cannot, the step waits.
    `samples`, `times` and `losses` are of this rank's images, `gradient_norms` of each tensor.
    """
    rate = recipe.learning_rate(state.images_seen + recipe.batch_size)
    set_learning_rate(state.optimizer, rate)
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)
    before = {name: buffer.clone() for name, buffer in _buffers(state)}
    loss, sums, seen = accumulate(recipe, state, batches)
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    also = [p.grad for p in state.learned.parameters() if p.grad is not None]
    recipe.devices.sum_over_ranks([*gradients, *also, loss, *sums.tensors()])
    if state.scaler:
        state.scaler.unscale_(state.optimizer)
    norms = _norms(gradients)
    norm = torch.linalg.vector_norm(norms)
    beside = _norms(also, on=norm.device)
    finite = (norm + loss).isfinite() & beside.isfinite().all()
    for name, buffer in _buffers(state):  # a forward pass moves the running means of batch norm
        buffer.copy_(torch.where(finite.to(buffer.device), buffer, before[name]))
    _update(recipe, state, norm, finite)
    if isinstance(recipe.times, LossAware) and finite:
        recipe.times.update(recipe.denoiser.schedule, *map(recipe.devices.gather, seen))
    for window in (state.since_log, state.this_epoch):
        window.add(sums.where(finite))
    state.usual_loss.see(loss, state.images_seen)
    state.count(finite)
    if state.scaler:
        state.scaler.update()
    state.images_seen += recipe.batch_size
    state.step += 1
    return {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": torch.tensor(rate),
        "finite": finite,
        "gradient_norms": torch.cat((norms, beside)),
        "samples": torch.cat([batch.index for batch in batches]),
        "times": seen[0],
        "losses": seen[1],
    }


def accumulate(
    recipe: Recipe, state: TrainState, batches: Sequence[Batch]
) -> tuple[Tensor, Sums, tuple[Tensor, Tensor]]:
    """Add up the gradients of the mean loss over the whole batch.

    Return that loss, what to log of it, and each image's time and loss.
    """
    total, sums = torch.zeros((), device=recipe.devices.device), Sums()
    times, all_losses = [], []
    for batch in batches:
        losses, t = batch_losses(recipe, batch)
        weights = _importance(recipe, t)
        weighed = losses if weights is None else losses * expand(weights, losses)
        _backward(recipe, state, weighed)
        total += weighed.detach().sum() / recipe.batch_size
        noise_level = recipe.denoiser.schedule(t).half_log_snr.detach()
        sums.add(Sums.of(losses.detach(), noise_level, weights))
        times.append(t)
        all_losses.append(losses.detach())
    return total, sums, (torch.cat(times), torch.cat(all_losses))


def batch_losses(recipe: Recipe, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of each image at its own keyed time and noise, and those times."""
    t = recipe.times(recipe.denoiser.schedule, _spread(recipe, batch.index))
    with torch_seeded(recipe.seed, Stream.DROPOUT, int(batch.index[0])), recipe.autocast():
        losses = recipe.objective(recipe.denoiser, recipe.weighting, _noised(recipe, batch, t))
    return losses, t


def _spread(recipe: Recipe, index: Tensor) -> Tensor:
    """A uniform number per image, spread evenly over k consecutive ones where strata are asked for.

    Image i of a block takes (u + i/k) mod 1 (Kingma et al. 2021, App. I.1).
    """
    k = recipe.time_strata
    drawn = uniform(recipe.seed, Stream.TIME, index // k, 1)[:, 0]
    return drawn if k == 1 else (drawn + (index % k) / k) % 1


def _noised(recipe: Recipe, batch: Batch, t: Tensor) -> Noised:
    """Everything that an objective is told about a batch."""
    x_0, on_device = batch.x_0, sent(batch.index, batch.x_0.device)

    def drawn(stream: Stream, draw: int, shape: tuple[int, ...]) -> Tensor:
        return recipe.normal(recipe.seed, stream, on_device, shape, draw)

    shape = tuple(x_0.shape[1:])
    eps = recipe.pairing(x_0, lambda k: drawn(Stream.NOISE, k, shape))
    if recipe.offset_noise:  # one more normal number per channel (Guttenberg 2023)
        flat = drawn(Stream.NOISE_EXTRAS, 0, (shape[0], *(1,) * (len(shape) - 1)))
        eps = eps + recipe.offset_noise * flat
    shown = eps
    if recipe.input_perturbation:  # the network sees more noise than it is asked for
        shown = eps + recipe.input_perturbation * drawn(Stream.NOISE_EXTRAS, 1, shape)
    x_t = diffuse(recipe.denoiser.schedule, x_0, shown, t)
    cond = _some_dropped(recipe, batch)
    return Noised(x_0, eps, x_t, t, cond, _estimate(recipe, batch, x_t, t, cond))


def _estimate(
    recipe: Recipe, batch: Batch, x_t: Tensor, t: Tensor, cond: Tensor | None
) -> Tensor | None:
    """The network's own first guess at x_0, for a keyed share of images (Chen et al. 2023)."""
    if not recipe.denoiser.estimate_range:
        return None
    with torch.no_grad():
        guess = recipe.denoiser(x_t, t, cond).x_0
    drawn = uniform(recipe.seed, Stream.SELF_CONDITIONING, batch.index, 1)[:, 0]
    return guess * expand((drawn < recipe.self_conditioning).double(), guess)


def _importance(recipe: Recipe, t: Tensor) -> Tensor | None:
    """What makes losses at times that were not drawn evenly an unbiased mean."""
    if isinstance(recipe.times, LossAware):
        return recipe.times.weight(recipe.denoiser.schedule, t)
    return None


def _backward(recipe: Recipe, state: TrainState, losses: Tensor) -> None:
    """Gradients of the loss, and for a learned schedule those of the loss' variance.

    The bound does not depend on a schedule between its ends, its estimate's variance does: its
    gradient is that of the squared loss (Kingma et al. 2021, App. H).
    """
    scale = state.scaler.scale if state.scaler else lambda value: value
    loss = losses.sum() / recipe.batch_size
    schedule = recipe.denoiser.schedule
    if not isinstance(schedule, nn.Module):
        scale(loss).backward()
        return
    moving = list(schedule.parameters())
    trained = (*state.network.parameters(), *state.learned.parameters())
    squared = losses.square().sum() / recipe.batch_size
    scale(squared).backward(inputs=moving, retain_graph=True)
    scale(loss).backward(
        inputs=[p for p in trained if p.requires_grad and all(p is not q for q in moving)]
    )


def _some_dropped(recipe: Recipe, batch: Batch) -> Tensor | None:
    """Hide the class of a keyed share of images (Ho & Salimans 2022, Alg. 1)."""
    if batch.cond is None or recipe.null_class is None:
        return batch.cond
    drawn = uniform(recipe.seed, Stream.LABEL_DROP, batch.index, 1)[:, 0]
    hidden = sent(drawn < recipe.label_dropout, batch.cond.device)
    return batch.cond.masked_fill(hidden, recipe.null_class)


def _buffers(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """What modules remember beside their parameters, by name."""
    yield from state.network.named_buffers("network")
    yield from state.learned.named_buffers("learned")


def _norms(gradients: Sequence[Tensor], on: torch.device | None = None) -> Tensor:
    """The norm of each tensor of gradients, in one vector."""
    if not gradients:
        return torch.zeros(0, device=on)
    return torch.stack([norm.float().to(on) for norm in torch._foreach_norm(list(gradients))])


_CLIP_EPS = 1e-6  # as torch's clip_grad_norm_ has it


def _update(recipe: Recipe, state: TrainState, norm: Tensor, finite: Tensor) -> None:
    """Step the optimizer along gradients no longer than `clip_norm`, and the average after it."""
    optimizer, clip = state.optimizer, recipe.clip_norm
    if state.scaler or [*state.learned.parameters()] or not decides_on_device(optimizer):
        if finite:
            _update_at_once(recipe, state, norm)
        return
    # What loss scaling has made of fused optimizers: they divide gradients, and skip a step.
    optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
    if clip is not None and not (norm.device.type == "cpu" and norm + _CLIP_EPS <= clip):
        longer = (norm + _CLIP_EPS) / clip
        optimizer.grad_scale = longer.clamp(min=1)  # type: ignore[attr-defined]
    optimizer.step()
    for name in ("found_inf", "grad_scale"):
        vars(optimizer).pop(name, None)
    if state.average:
        state.average.update(state.network, state.images_seen, recipe.batch_size, finite)


def _update_at_once(recipe: Recipe, state: TrainState, norm: Tensor) -> None:
    """The same for a step that is known to be finite."""
    if recipe.clip_norm is not None and norm + _CLIP_EPS > recipe.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(state.network.parameters(), recipe.clip_norm, norm)
    if state.scaler:
        state.scaler.step(state.optimizer)
    else:
        state.optimizer.step()
    if state.average:
        state.average.update(state.network, state.images_seen, recipe.batch_size)
