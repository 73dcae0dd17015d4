"""Which noise an image meets: pairs are nearer than chance, keyed, and cut by no micro-batch."""

import itertools

import pytest
import torch
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.pairings import immiscible, independent, optimal_transport
from rediffuse.randomness import Stream, normal


def keyed(index: Tensor, shape: tuple[int, ...] = (1, 2, 2)):
    return lambda k: normal(3, Stream.NOISE, index, shape, k)


def images_of(index: Tensor) -> Tensor:
    return normal(9, Stream.AUGMENT, index, (1, 2, 2))


def distance(x_0: Tensor, eps: Tensor) -> float:
    return (x_0 - eps).square().sum().item()


def test_independent_noise_is_each_images_first_draw():
    index = torch.arange(5)
    assert independent(images_of(index), keyed(index)).equal(keyed(index)(0))


def test_optimal_transport_is_the_best_of_all_permutations_in_every_block():
    index = torch.arange(12)
    x_0, drawn = images_of(index), keyed(index)(0)
    found = optimal_transport(x_0, keyed(index), block_images=6)
    for block in (slice(0, 6), slice(6, 12)):
        best = min(
            distance(x_0[block], drawn[block][list(order)])
            for order in itertools.permutations(range(6))
        )
        assert distance(x_0[block], found[block]) == pytest.approx(best, rel=1e-6)
        assert sorted(found[block].flatten(1).tolist()) == sorted(drawn[block].flatten(1).tolist())
    assert distance(x_0, found) < distance(x_0, drawn)


@pytest.mark.parametrize(
    "pairing",
    [
        independent,
        immiscible,
        lambda x_0, noise: optimal_transport(x_0, noise, block_images=8),
    ],
)
def test_micro_batches_pair_as_the_whole_batch_does(pairing):
    index = torch.arange(64, 96)
    whole = pairing(images_of(index), keyed(index))
    pieces = [pairing(images_of(part), keyed(part)) for part in index.split(8)]
    assert torch.cat(pieces).equal(whole)


def test_a_micro_batch_without_whole_blocks_is_refused():
    index = torch.arange(20)
    with pytest.raises(ConfigError, match="block_images=8 must divide the 20 images"):
        optimal_transport(images_of(index), keyed(index), block_images=8)


def test_immiscible_noise_is_the_nearest_of_its_draws():
    index = torch.arange(50)
    x_0, draws = images_of(index), torch.stack([keyed(index)(k) for k in range(3)])
    found = immiscible(x_0, keyed(index), candidates=3)
    for n in range(50):
        nearest = min(draws[:, n], key=lambda eps: distance(x_0[n], eps))
        assert found[n].equal(nearest)
    assert immiscible(x_0, keyed(index), candidates=1).equal(draws[0])


def test_immiscible_noise_needs_something_to_choose_from():
    with pytest.raises(ConfigError, match="expected 1 or more, not 0"):
        immiscible(torch.zeros(1, 1), keyed(torch.arange(1)), candidates=0)
