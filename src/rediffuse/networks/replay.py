"""Drawing asks a network the same again and again: a GPU can be told once, as a CUDA graph."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

_AT_MOST = 4
"""Shapes that are remembered; each keeps the memory of a forward pass."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: Tensor


class Replay(nn.Module):
    """A network whose kernels are launched together when it is asked in the same shapes again.

    Small networks and small batches wait for Python otherwise. The kernels are the network's own,
    and so are the bits. Only under `torch.inference_mode` on a GPU; everywhere else, and if a
    network cannot be captured since it chooses by values, it is the plain network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._known: OrderedDict[tuple[object, ...], _Captured | None] = OrderedDict()
        self._can = True

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        """Answer as the network does."""
        answer: Tensor
        if not (self._can and x.device.type == "cuda" and torch.is_inference_mode_enabled()):
            answer = self.network(x, label, cond)
            return answer
        given = (x, label, cond)
        precision = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (*(None if g is None else (g.shape, g.dtype, g.stride()) for g in given), precision)
        if key not in self._known:  # nothing may be set up while it is captured
            self._known[key] = None
            if len(self._known) > _AT_MOST:
                self._known.popitem(last=False)
            answer = self.network(x, label, cond)
            return answer
        captured = self._known[key]
        if captured is None:
            captured = self._known[key] = self._captured(given)
        if captured is None:
            self._can = False
            answer = self.network(x, label, cond)
            return answer
        self._known.move_to_end(key)
        for kept, value in zip(captured.inputs, given, strict=True):
            if kept is not None and value is not None:
                kept.copy_(value)
        captured.graph.replay()
        return captured.output.clone()

    def _captured(self, given: tuple[Tensor | None, ...]) -> _Captured | None:
        inputs = tuple(None if g is None else g.clone() for g in given)
        graph, cached = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        # A weight that autocast has cast before would be freed with its cache.
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output: Tensor = self.network(*inputs)
        except RuntimeError:
            return None
        finally:
            torch.set_autocast_cache_enabled(cached)
        return _Captured(graph, inputs, output)
