"""The average of the weights, which samples come from."""

import copy

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average in float32, its half-life counted in images.

    A fixed decay keeps the random start for long: a third of it is left after 10,000 steps at
    0.9999. The warm-up (1 + n)/(10 + n) after n steps lets the average follow closely at first.
    """

    def __init__(self, network: nn.Module, *, half_life_images: int, warm_up: bool = True) -> None:
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self._half_life_images, self._warm_up = half_life_images, warm_up
        self._averaged: list[Tensor] = list(self.network.parameters())
        self._copied = list(self.network.buffers())

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The share of the old average that the step starting at `images_seen` keeps."""
        decay: float = 0.5 ** (batch_size / self._half_life_images)
        if not self._warm_up:
            return decay
        steps = images_seen // batch_size
        return min(decay, (1 + steps) / (10 + steps))

    @torch.no_grad()
    def update(
        self, network: nn.Module, images_seen: int, batch_size: int, finite: Tensor | None = None
    ) -> None:
        """Move towards the live weights by one step; buffers are copied, not averaged.

        Where `finite` says no, nothing moves, and no device has to tell.
        """
        live = [parameter.float() for parameter in network.parameters()]
        share = 1 - self.decay(images_seen, batch_size)
        if finite is None or finite.device.type == "cpu":
            if finite is not None and not finite:
                return
            torch._foreach_lerp_(self._averaged, live, share)
        else:
            apart = torch._foreach_sub(live, self._averaged)
            torch._foreach_mul_(apart, share * finite)
            torch._foreach_add_(self._averaged, apart)
        for mine, theirs in zip(self._copied, network.buffers(), strict=True):
            mine.copy_(theirs if finite is None else torch.where(finite, theirs, mine))
