"""Everything that a step changes. A checkpoint is this and nothing else."""

import math
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rediffuse.tensors import sent
from rediffuse.training.average import Average

BIN_EDGES = (-4.0, -2.0, 0.0, 2.0, 4.0)
"""Where ln(α/σ) is cut for the loss by noise level, in nats."""
_BINS = len(BIN_EDGES) + 1


@dataclass
class Sums:
    """Sums of losses since some point; they stay on the device until somebody reads them."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    bin_loss: Tensor = field(default_factory=lambda: torch.zeros(_BINS))
    bin_images: Tensor = field(default_factory=lambda: torch.zeros(_BINS))

    @classmethod
    def of(cls, losses: Tensor, half_log_snr: Tensor, weights: Tensor | None = None) -> "Sums":
        """The sums of one batch: a loss, a noise level and perhaps a weight per image."""
        bins = torch.bucketize(half_log_snr.float().cpu(), torch.tensor(BIN_EDGES))
        counted = sent(torch.nn.functional.one_hot(bins, _BINS).to(losses.dtype), losses.device)
        losses_sum = losses.sum()
        if weights is not None:
            on_device = sent(weights.to(losses.dtype), losses.device)
            counted, losses_sum = counted * on_device[:, None], (losses * on_device).sum()
        return cls(losses_sum, losses @ counted, counted.sum(dim=0))

    def tensors(self) -> list[Tensor]:
        """The sums, to be added up over ranks in place."""
        return [self.loss, self.bin_loss, self.bin_images]

    def add(self, more: "Sums") -> None:
        """Add another's sums, on its device."""
        mine = (sent(value, more.loss.device) for value in self.tensors())
        sums = [value + theirs for value, theirs in zip(mine, more.tensors(), strict=True)]
        self.loss, self.bin_loss, self.bin_images = sums

    def where(self, condition: Tensor) -> "Sums":
        """The sums if the condition is true, else nothing; nobody has to know which."""
        return Sums(*(torch.where(condition, value, 0.0) for value in self.tensors()))

    @property
    def images(self) -> float:
        """How many images were summed up, weighted where losses are; waits for their device."""
        return self.bin_images.sum().item()

    def means(self) -> dict[str, float]:
        """The mean loss, over all noise levels and in each bin that saw an image.

        It is NaN where no image was seen: every step was skipped.
        """
        images = self.images
        means = {"loss": self.loss.item() / max(1.0, images) if images else math.nan}
        edges = ("-inf", *(f"{edge:g}" for edge in BIN_EDGES), "inf")
        sums = zip(self.bin_loss.tolist(), self.bin_images.tolist(), strict=True)
        for i, (loss, images) in enumerate(sums):
            if images:
                means[f"loss/half_log_snr {edges[i]} to {edges[i + 1]}"] = loss / images
        return means

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, exact."""
        return {
            "loss": self.loss.item(),
            "bin_loss": self.bin_loss.tolist(),
            "bin_images": self.bin_images.tolist(),
        }

    @classmethod
    def from_json(cls, saved: Any) -> "Sums":
        """Undo `as_json`.

        Raises:
            ValueError: for what it did not write.
        """
        sums = [_tensor(saved, name) for name in ("loss", "bin_loss", "bin_images")]
        if [value.shape for value in sums] != [value.shape for value in cls().tensors()]:
            raise ValueError("sums of losses have another shape")
        return cls(*sums)


SPIKE = 8.0
"""Standard deviations above the usual loss, from where a step's loss is a spike."""
_USUAL_STEPS = 100


@dataclass
class UsualLoss:
    """What a step's loss has been over the last hundred or so, and how often it spiked.

    Its tensors stay on the device until somebody reads them.
    """

    steps: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    variance: Tensor = field(default_factory=lambda: torch.zeros(()))
    spikes: Tensor = field(default_factory=lambda: torch.zeros(()))
    last_spike_images: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def see(self, loss: Tensor, images_seen: int) -> None:
        """Take in the loss of the step that began at `images_seen`, unless it is not finite."""
        mean, variance, spikes, last = (sent(getattr(self, n), loss.device) for n in _USUAL)
        above, limit = loss - mean, SPIKE * variance.sqrt()
        spike = loss.isfinite() & (above > limit) & (self.steps >= _USUAL_STEPS)
        self.spikes = spikes + spike
        self.last_spike_images = torch.where(spike, images_seen, last)
        self.steps += 1
        weight = 1 / min(self.steps, _USUAL_STEPS)
        # A spike moves what is usual no further than the limit does.
        step = weight * torch.where(loss.isfinite(), torch.where(spike, limit, above), 0.0)
        self.mean = mean + step
        moved = (1 - weight) * (variance + step * step / weight)
        self.variance = torch.where(loss.isfinite(), moved, variance)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, exact."""
        return {"steps": self.steps, **{name: getattr(self, name).item() for name in _USUAL}}

    @classmethod
    def from_json(cls, saved: Any) -> "UsualLoss":
        """Undo `as_json`.

        Raises:
            ValueError: for what it did not write.
        """
        mean, variance, spikes, last = (_tensor(saved, name) for name in _USUAL)
        numbers = (_tensor(saved, "steps"), mean, variance, spikes, last)
        whole = not (numbers[0].is_floating_point() or last.is_floating_point())
        if any(value.ndim for value in numbers) or not whole or saved["steps"] < 0:
            raise ValueError("the usual loss is not numbers")
        return cls(saved["steps"], mean, variance, spikes, last)


_USUAL = ("mean", "variance", "spikes", "last_spike_images")


def _tensor(saved: Any, name: str) -> Tensor:
    """A number or a list of numbers of a checkpoint's JSON."""
    value = saved[name] if isinstance(saved, dict) and name in saved else None
    if all(type(v) in (int, float) for v in (value if isinstance(value, list) else [value])):
        return torch.tensor(value)
    raise ValueError(f"{name} is not numbers")


@dataclass
class TrainState:
    """The network and all that goes with it after `images_seen` training images.

    `learned` holds what else learns, by its axis: a schedule, a weighting, the times. `step` counts
    optimizer steps, skipped ones too; `metrics` are the last of those that a best may be chosen by.
    What a step decides upon are tensors, which stay on the device until somebody reads them.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None = None
    scaler: torch.amp.GradScaler | None = None
    learned: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    images_seen: int = 0
    step: int = 0
    since_log: Sums = field(default_factory=Sums)
    this_epoch: Sums = field(default_factory=Sums)
    usual_loss: UsualLoss = field(default_factory=UsualLoss)
    skipped_steps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    skipped_in_a_row: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    metrics: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    checks_since_best: int = 0

    def count(self, finite: Tensor) -> None:
        """Count a step that was skipped unless it was finite."""
        total, in_a_row = (
            sent(n, finite.device) for n in (self.skipped_steps, self.skipped_in_a_row)
        )
        self.skipped_steps = total + ~finite
        self.skipped_in_a_row = torch.where(finite, 0, in_a_row + 1)

    @property
    def sampler(self) -> nn.Module:
        """The network that samples come from: the average, or else the one that trains, bare.

        What is compiled for training is for its batches, and sees no others.
        """
        return self.average.network if self.average else copy(self.network)
