"""The average of the weights, which samples come from."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class Average:
    """An exponential moving average in float32, its half-life counted in images.

    A fixed decay keeps the random start for long: a third of it is left after 10,000 steps at
    0.9999. The warm-up (1 + n)/(10 + n) after n steps lets the average follow closely at first.
    """

    def __init__(self, network: nn.Module, *, half_life_images: int, warm_up: bool = True) -> None:
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self._half_life_images, self._warm_up = half_life_images, warm_up
        self._averaged = _averaged(self.network)
        self._copied = _copied(self.network)

    @torch.no_grad()
    def restart(self, network: nn.Module) -> None:
        """Start again from these weights and buffers."""
        for part in (_averaged, _copied):
            for mine, theirs in zip(part(self.network), part(network), strict=True):
                mine.copy_(theirs)

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
        """Move towards the live weights by one step.

        Running statistics of norms are averaged as weights are: those of the live network belong to
        the live weights, and the averaged network would be normalised by means that it has not.
        All other buffers are copied. Where `finite` is false nothing moves, and no device is waited
        for.
        """
        live = [tensor.float() for tensor in _averaged(network)]
        share = 1 - self.decay(images_seen, batch_size)
        if finite is None or finite.device.type == "cpu":
            if finite is not None and not finite:
                return
            torch._foreach_lerp_(self._averaged, live, share)
        else:
            apart = torch._foreach_sub(live, self._averaged)
            torch._foreach_mul_(apart, share * finite)
            torch._foreach_add_(self._averaged, apart)
        for mine, theirs in zip(self._copied, _copied(network), strict=True):
            mine.copy_(theirs if finite is None else torch.where(finite, theirs, mine))


def _averaged(network: nn.Module) -> list[Tensor]:
    """Parameters, and the running means and variances of norms."""
    return [*network.parameters(), *_statistics(network)]


def _copied(network: nn.Module) -> list[Tensor]:
    """All other buffers, such as counters and tables."""
    averaged = {id(tensor) for tensor in _statistics(network)}
    return [buffer for buffer in network.buffers() if id(buffer) not in averaged]


def _statistics(network: nn.Module) -> list[Tensor]:
    norms = [module for module in network.modules() if isinstance(module, _NormBase)]
    found = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    return [tensor for tensor in found if tensor is not None]
