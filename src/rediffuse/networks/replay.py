"""Drawing asks a network the same again and again: a GPU can be told once, as a CUDA graph."""

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_DEVICES = {"cuda"}
_AT_MOST = 4
"""Shapes that are remembered."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: Tensor


class Replay(nn.Module):
    """A network whose kernels are launched together when it is asked in the same shapes again.

    Small networks and small batches wait for Python otherwise. The kernels are the network's own,
    and so are the bits. Only under `torch.inference_mode` on a GPU; everywhere else, and where a
    network cannot be captured, such as one that chooses by values, it is the plain network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # What was captured for a shape, or the threads that have asked for it once.
        self._known: OrderedDict[tuple[object, ...], _Captured | set[int]] = OrderedDict()
        self._gave_up = False
        self._pool: Any = None  # one for all graphs, which never run at the same time
        self._one_at_a_time = threading.Lock()

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        """Answer as the network does."""
        can = x.device.type in _DEVICES and torch.is_inference_mode_enabled()
        if self._gave_up or not can:
            return self._plain(x, label, cond)
        with self._one_at_a_time:
            return self._answered(x, label, cond)

    def _plain(self, *given: Tensor | None) -> Tensor:
        answer: Tensor = self.network(*given)
        return answer

    def _answered(self, *given: Tensor | None) -> Tensor:
        key, thread = _key(given), threading.get_ident()
        known = self._known.get(key, set())
        if isinstance(known, set) and thread not in known:
            # A capture may set nothing up: that is done now, and known to this thread alone.
            answer = self._plain(*given)
            self._known[key] = known | {thread}
            if len(self._known) > _AT_MOST:
                self._known.popitem(last=False)
            return answer
        captured = known if isinstance(known, _Captured) else self._capture(given)
        if captured is None:
            self._gave_up = True
            self._known.clear()
            return self._plain(*given)
        self._known[key] = captured
        self._known.move_to_end(key)
        for kept, value in zip(captured.inputs, given, strict=True):
            if kept is not None and value is not None:
                kept.copy_(value)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, given: tuple[Tensor | None, ...]) -> _Captured | None:
        inputs = tuple(None if value is None else value.clone() for value in given)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, cached = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        # A weight that autocast has cast before would be freed with its cache.
        torch.set_autocast_cache_enabled(False)
        try:
            # The outer stream comes back even if a capture fails, which leaves its own behind.
            with torch.cuda.stream(torch.cuda.current_stream()), capture:
                output = self._plain(*inputs)
        except RuntimeError:
            return None
        finally:
            torch.set_autocast_cache_enabled(cached)
        return _Captured(graph, inputs, output)


def _key(given: tuple[Tensor | None, ...]) -> tuple[object, ...]:
    """All that kernels are chosen by."""
    return (
        *(None if value is None else (value.shape, value.dtype, value.stride()) for value in given),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
        torch.get_float32_matmul_precision(),
    )
