"""What is captured once and replayed; a stand-in for CUDA graphs computes on the CPU.

That the real ones give a network's own bits is seen on a GPU (`test_gpu.py`).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rediffuse.networks import replay
from rediffuse.networks.replay import Replay


class Counted(nn.Module):
    """Doubles x and adds the label, and counts who asks; a capture fails where `chooses`."""

    def __init__(self, chooses: bool = False) -> None:
        super().__init__()
        self.calls, self.chooses = 0, chooses

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.chooses and Graph.open:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 2 * x + label[:, None] + (0 if cond is None else cond[:, None])


class Graph:
    """Does what was captured again, in place."""

    open: "Graph | None" = None
    replays = 0

    def __init__(self) -> None:
        self.again: Any = None

    def replay(self) -> None:
        Graph.replays += 1
        output, network, inputs = self.again
        output.copy_(network(*inputs))
        network.calls -= 1


class Near(Replay):
    """Remembers what a capture computed, as the device would."""

    def _plain(self, *given: Tensor | None) -> Tensor:
        output = super()._plain(*given)
        if Graph.open:
            Graph.open.again = output, self.network, given
        return output


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capturing(graph: Graph, **how: object) -> Iterator[None]:
        assert not torch.is_autocast_cache_enabled()
        Graph.open = graph
        try:
            yield
        finally:
            Graph.open = None

    Graph.replays = 0
    monkeypatch.setattr(replay, "_DEVICES", {"cpu"})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def asked(network: Replay, rows: int, value: float) -> Tensor:
    """What it answers to x = value."""
    with torch.inference_mode():
        return network(torch.full((rows, 3), value), torch.ones(rows))


def test_the_second_time_captures_and_every_further_time_replays() -> None:
    network = Near(inner := Counted())
    answers = [asked(network, 2, value) for value in (1.0, 2.0, 3.0, 4.0)]
    assert [answer[0, 0].item() for answer in answers] == [3.0, 5.0, 7.0, 9.0]  # none overwritten
    assert inner.calls == 2
    assert Graph.replays == 3
    assert torch.is_autocast_cache_enabled()
    network(torch.ones(2, 3, requires_grad=True), torch.ones(2)).sum().backward()
    assert (inner.calls, Graph.replays) == (3, 3)


def test_every_shape_and_precision_is_captured_by_itself_and_the_oldest_is_forgotten() -> None:
    network = Near(inner := Counted())
    for rows in (1, 2, 3, 4, 5):
        for value in (1.0, 2.0):
            assert asked(network, rows, value).shape == (rows, 3)
    assert inner.calls == 10
    asked(network, 5, 3.0)
    assert inner.calls == 10
    asked(network, 1, 3.0)  # the first of five
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        asked(network, 5, 3.0)
    assert inner.calls == 12


def test_what_is_asked_for_again_and_again_is_not_forgotten() -> None:
    network = Near(inner := Counted())
    for rows in (1, 2, 3, 4):
        asked(network, rows, 1.0)
        asked(network, rows, 1.0)
    asked(network, 1, 1.0)
    asked(network, 5, 1.0)  # 2 was asked for longest ago
    before = inner.calls
    asked(network, 1, 1.0)
    assert inner.calls == before
    asked(network, 2, 1.0)
    assert inner.calls == before + 1


def test_a_network_that_cannot_be_captured_is_asked_as_it_is() -> None:
    network = Near(Counted(chooses=True))
    answers = [asked(network, 2, value)[0, 0].item() for value in (1.0, 2.0, 3.0)]
    assert answers == [3.0, 5.0, 7.0]
    assert Graph.replays == 0
    assert torch.is_autocast_cache_enabled()


def test_threads_get_their_own_answers_and_share_what_one_of_them_captured() -> None:
    network = Near(inner := Counted())
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda value: asked(network, 2, value)[0, 0].item(), range(200)))
    assert answers == [2.0 * value + 1 for value in range(200)]
    assert inner.calls <= 5  # each at most once before one of them captured


def test_a_thread_captures_only_what_it_has_asked_for_itself() -> None:
    network = Near(inner := Counted())
    asked(network, 2, 1.0)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(asked, network, 2, 2.0).result()[0, 0] == 5
        assert (inner.calls, Graph.replays) == (2, 0)
        assert other.submit(asked, network, 2, 3.0).result()[0, 0] == 7
    assert asked(network, 2, 4.0)[0, 0] == 9
    assert (inner.calls, Graph.replays) == (3, 2)
