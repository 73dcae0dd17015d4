"""The benchmarks compare equal things, in turns; no time is asserted here."""

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from benchmarks import peers
from benchmarks.measure import Times, Way, alternate, watch
from benchmarks.sizes import LARGE, SMALL, Size


def sleeper(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def missing() -> Callable[[], None]:
    raise ImportError("no module named nothing")


def test_ways_are_timed_in_turns_and_one_that_is_missing_is_named() -> None:
    ways = {"short": Way(sleeper, (0.001,)), "long": Way(sleeper, (0.2,)), "none": Way(missing, ())}
    taken, failed = alternate(ways, torch.device("cpu"), rounds=3, warm_up=1)
    assert failed == {"none": "no module named nothing"}
    assert len(taken["short"].seconds) == len(taken["long"].seconds) == 3
    assert taken["long"].median >= 0.2 > taken["short"].median


def test_the_median_and_the_spread_of_times() -> None:
    times = Times([4.0, 1.0, 2.0, 3.0, 100.0])
    assert times.median == 3
    assert times.spread == pytest.approx((52 - 1.5) / 2 / 3)


def test_a_watched_function_answers_as_before_and_its_calls_are_timed() -> None:
    clock = iter((1.0, 3.5, 10.0, 10.25))
    owner = SimpleNamespace(double=lambda number: 2 * number)
    taken = watch(owner, "double", lambda: next(clock))
    assert [owner.double(3), owner.double(number=4)] == [6, 8]
    assert taken == [2.5, 0.25]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_networks_that_are_compared_are_equally_large(size: Size) -> None:
    with torch.device("meta"):
        ours = sum(p.numel() for p in size.ours().parameters())
        theirs = sum(p.numel() for p in peers.diffusers_network(size).parameters())
    # diffusers' projection of attention and of time have the same shapes; DDPM's is equal
    assert ours == pytest.approx(theirs, rel=0.002)
    assert size is SMALL or ours == theirs == 35_746_307
