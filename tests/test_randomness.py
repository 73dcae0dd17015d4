"""Random numbers are pure functions of (seed, stream, global sample index), and look random."""

import math
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rediffuse import randomness
from rediffuse.randomness import (
    ImageNoise,
    Stream,
    normal,
    order,
    permuted,
    philox,
    torch_seeded,
    uniform,
    words,
)

LEVEL = 1e-4  # numbers are fixed: a test of uniformity passes for ever or fails for ever
law = settings(deadline=None, derandomize=True, database=None, max_examples=40)
seeds, indices = st.integers(0, 2**32 - 1), st.integers(0, 2**62)


def chi_square_p(counts: Tensor) -> float:
    """The chance that even probabilities give counts as uneven as these."""
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def kolmogorov_distance(cdf_at_samples: Tensor) -> float:
    """√n·sup|F_n - F|; 2.23 is passed once in 10,000 times."""
    n = len(cdf_at_samples)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    ordered = cdf_at_samples.sort().values
    return math.sqrt(n) * max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()).item()


KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 | 00000000 00000000 | 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff | ffffffff ffffffff | 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 | a4093822 299f31d0 | d16cfe09 94fdcceb 5001e420 24126ea1
"""  # counter, key, result


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_its_published_known_answers(line):
    counter, key, result = ([int(word, 16) for word in part.split()] for part in line.split("|"))
    assert philox(torch.tensor([counter]), tuple(key))[0].tolist() == result


@law
@given(seed=seeds, stream=st.sampled_from(Stream), index=indices, draw=st.integers(0, 2**32 - 1))
def test_words_are_philox_of_index_block_and_draw_keyed_by_seed_and_stream(
    seed, stream, index, draw
):
    counters = [[index & 0xFFFFFFFF, index >> 32, block, draw] for block in range(2)]
    expected = philox(torch.tensor(counters), (seed, stream)).flatten()
    assert words(seed, stream, torch.tensor([index]), 8, draw)[0].equal(expected)


@law
@given(seed=seeds, batch=st.lists(indices, min_size=1, max_size=9), count=st.integers(1, 23))
def test_a_sample_has_the_same_numbers_in_any_batch_and_any_count(seed, batch, count):
    index = torch.tensor(batch)
    for draw_from in (words, uniform):
        together = draw_from(seed, Stream.TIME, index, 23)
        for row, one in enumerate(index):
            assert draw_from(seed, Stream.TIME, one[None], count)[0].equal(together[row, :count])
    together = normal(seed, Stream.NOISE, index, (23,))
    for row, one in enumerate(index):
        assert normal(seed, Stream.NOISE, one[None], (count,))[0].equal(together[row, :count])


def test_no_two_of_seed_stream_index_block_and_draw_share_their_numbers():
    index = torch.tensor([0, 1, 2, 2**32, 2**32 + 1, 2**40])
    blocks = [
        tuple(block)
        for seed in (0, 1, 2, 2**32 - 1)
        for stream in Stream
        for draw in (0, 1, 2)
        for block in words(seed, stream, index, 16, draw).reshape(-1, 4).tolist()
    ]
    assert len(blocks) == 4 * len(Stream) * 3 * len(index) * 4
    assert len(set(blocks)) == len(blocks)


def test_the_streams_keep_their_numbers_for_ever():
    names = "ORDER TIME NOISE AUGMENT LABEL_DROP DROPOUT SAMPLING EVALUATION INITIALISATION SPLIT"
    assert [stream.name for stream in Stream][:10] == names.split()
    assert [int(stream) for stream in Stream] == list(range(len(Stream)))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_outside_32_bits_is_refused(seed):
    with pytest.raises(ValueError, match=f"0 .. 4294967295, not {seed}"):
        words(seed, Stream.TIME, torch.arange(2), 1)


def test_uniforms_fill_the_unit_interval_evenly_with_53_bits():
    drawn = uniform(7, Stream.TIME, torch.arange(100_000), 2).flatten()
    assert drawn.dtype == torch.float64
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert (drawn * 2**53 == (drawn * 2**53).floor()).all()
    each_bit = (drawn * 2**53).long()[:, None] >> torch.arange(53) & 1
    assert (each_bit.double().mean(0) - 0.5).abs().max() < 0.006
    assert kolmogorov_distance(drawn) < 2.23


def test_normals_are_standard_normal_uncorrelated_and_below_6_8():
    drawn = normal(3, Stream.NOISE, torch.arange(1000), (10, 10, 10))
    assert drawn.dtype == torch.float32
    assert drawn.shape == (1000, 10, 10, 10)
    z = drawn.double().flatten()
    for power, moment in enumerate((0, 1, 0, 3, 0, 15), start=1):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)  # E z^2p = (2p - 1)!!
        assert abs((z**power).mean().item() - moment) < 3.9 * spread / 1000
    assert kolmogorov_distance(torch.special.ndtr(z)) < 2.23
    assert 4.5 < z.abs().max() < 6.8
    pairs = z.reshape(-1, 2)
    for one, other in ((pairs[:, 0], pairs[:, 1]), (pairs[1:, 0], pairs[:-1, 0])):
        for f in (torch.Tensor.double, torch.Tensor.square):
            assert abs(torch.corrcoef(torch.stack((f(one), f(other))))[0, 1].item()) < 3.9 / 700


def test_the_most_extreme_words_give_finite_normals_below_6_8(monkeypatch):
    extremes = torch.cartesian_prod(*[torch.tensor([0, 1, 2**31, 2**32 - 1])] * 2).flatten()
    monkeypatch.setattr(randomness, "words", lambda *_: extremes[None])
    assert normal(0, Stream.NOISE, torch.arange(1), (32,)).abs().max() < 6.8


def test_permuted_is_a_permutation_of_every_length():
    for length in [*range(1, 18), *range(18, 301, 6), 1000, 60_000]:
        epoch = torch.tensor([length % 5])
        placed = permuted(torch.arange(length), length, 1, epoch, Stream.ORDER)
        assert placed.sort().values.equal(torch.arange(length)), length


def numbered_orders(length: int, epochs: int) -> Tensor:
    """Which of the length! orders each epoch has."""
    every = order(torch.arange(epochs * length), length, 0).view(epochs, length)
    number = {listed: n for n, listed in enumerate(permutations(range(length)))}
    return torch.tensor([number[tuple(row)] for row in every.tolist()])


@pytest.mark.parametrize(("length", "epochs"), [(3, 600), (4, 2400), (5, 6000)])
def test_every_order_of_a_few_images_is_equally_likely(length, epochs):
    orders = numbered_orders(length, epochs)
    assert chi_square_p(torch.bincount(orders, minlength=math.factorial(length))) > LEVEL


def test_the_order_of_an_epoch_says_nothing_about_the_next():
    orders = numbered_orders(4, 6000)
    both = orders[:-1] * 24 + orders[1:]
    assert chi_square_p(torch.bincount(both, minlength=24**2)) > LEVEL


def test_each_image_lands_anywhere_in_a_longer_epoch():
    length = 1797
    placed = torch.stack([order(torch.arange(length) + e * length, length, 0) for e in range(60)])
    assert chi_square_p(torch.bincount((placed[:, :100] * 10 // length).flatten())) > LEVEL
    assert chi_square_p(torch.bincount((placed.diff() > 0).long().flatten())) > LEVEL


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(length):
    epochs = order(torch.arange(8 * length), length, 5).reshape(8, length)
    assert (epochs.sort().values == torch.arange(length)).all()
    if length > 6:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 8


def test_order_is_a_function_of_index_and_seed_alone():
    whole = order(torch.arange(350), 100, 5)
    for start, stop in ((0, 1), (95, 105), (99, 301), (200, 300)):
        assert order(torch.arange(start, stop), 100, 5).equal(whole[start:stop])
    shuffled = torch.randperm(350, generator=torch.Generator().manual_seed(0))
    assert order(shuffled, 100, 5).equal(whole[shuffled])
    assert not order(torch.arange(350), 100, 6).equal(whole)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7), (1, 1, 1), (3,)])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_an_image_has_the_same_noise_in_any_batch_at_every_draw(size, shape):
    whole = ImageNoise(9, torch.arange(64))
    parts = [ImageNoise(9, part) for part in torch.arange(64).split(size)]
    for _ in range(3):
        together = whole(torch.empty(64, *shape))
        split = [part(torch.empty(len(part._images), *shape)) for part in parts]
        assert torch.cat(split).equal(together)


def test_a_solvers_noise_is_new_at_every_draw_and_has_the_dtype_of_the_state():
    noise = ImageNoise(9, torch.tensor([4, 2]))
    like = torch.empty(2, 3, dtype=torch.float64)
    first, second = noise(like), noise(like)
    assert first.dtype == torch.float64
    assert first.equal(normal(9, Stream.SAMPLING, torch.tensor([4, 2]), (3,), 0).double())
    assert second.equal(normal(9, Stream.SAMPLING, torch.tensor([4, 2]), (3,), 1).double())
    assert not (first == second).any()


def test_torch_seeded_is_keyed_and_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    drawn = {}
    for key in product((0, 1), (Stream.DROPOUT, Stream.INITIALISATION), (0, 1)):
        for again in (False, True):
            with torch_seeded(*key):
                drawn[key, again] = torch.randn(8)
        assert drawn[key, True].equal(drawn[key, False])
    assert torch.get_rng_state().equal(before)
    assert len({tuple(numbers.tolist()) for numbers in drawn.values()}) == 8


def test_torch_seeded_puts_the_generator_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), torch_seeded(0, Stream.DROPOUT):
        torch.randn(3) @ torch.randn(4)
    assert torch.get_rng_state().equal(before)
