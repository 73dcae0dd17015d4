"""Neighbours are exact, copies raise the alarm, and fresh images do not."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from rediffuse.data.pixels import augment
from rediffuse.errors import ConfigError, DataError
from rediffuse.evaluation import neighbours
from rediffuse.evaluation.diversity import repeats, vendi
from rediffuse.evaluation.memorisation import COPY, judge, nearness
from rediffuse.evaluation.neighbours import (
    augmented,
    nearest,
    nearest_others,
    nearest_shown,
    pairs_within,
)
from rediffuse.randomness import Stream, normal


def gaussian(count: int, *shape: int, seed: int = 0) -> Tensor:
    return normal(seed, Stream.EVALUATION, torch.arange(count), shape)


def distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.double().flatten(1)[:, None] - b.double().flatten(1)).norm(dim=2)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy((load_digits().images * (255 / 16)).round().astype(np.uint8))[:, None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_QUERIES", 37)
    monkeypatch.setattr(neighbours, "_KEYS", 113)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_is_brute_force_whatever_the_blocks(offset: float) -> None:
    queries, keys = gaussian(90, 3, 4) + offset, gaussian(400, 3, 4, seed=1) + offset
    found, all_of = nearest(queries, keys, 5), distances(queries, keys)
    assert torch.equal(found.rows, all_of.argsort(dim=1, stable=True)[:, :5])
    torch.testing.assert_close(found.distances, all_of.sort(dim=1).values[:, :5])


def test_equal_and_nearly_equal_keys_come_in_the_order_of_float64() -> None:
    """Closer together than float32 can tell from far away, and many of them."""
    queries = torch.zeros(2, 8)
    queries[1] = 1.0
    keys = torch.full((300, 8), 4096.0)
    keys[::2, 0] += torch.arange(150).flip(0) * 2.0**-11
    found, all_of = nearest(queries, keys, 20), distances(queries, keys)
    assert torch.equal(found.rows, all_of.argsort(dim=1, stable=True)[:, :20])


def test_an_image_is_not_its_own_neighbour_even_among_its_copies(digits: Tensor) -> None:
    few = digits[:50].repeat(4, 1, 1, 1)
    found = nearest_others(few, 3)
    itself = torch.arange(len(few))[:, None]
    assert not (found.rows == itself).any()
    assert torch.equal(found.rows % 50, itself.expand_as(found.rows) % 50)
    assert not found.distances.any()


def test_pairs_within_are_brute_forces(digits: Tensor) -> None:
    a, b = digits[:150], digits[100:400]
    radius = float(distances(a, b).flatten().quantile(0.01))
    found, inside = pairs_within(a, b, radius), distances(a, b) <= radius
    assert {*zip(found.first.tolist(), found.second.tolist(), strict=True)} == {
        (i, j) for i, j in inside.nonzero().tolist()
    }
    ordered = pairs_within(a, a, radius, ordered=True)
    assert {*zip(ordered.first.tolist(), ordered.second.tolist(), strict=True)} == {
        (i, j) for i, j in (distances(a, a) <= radius).nonzero().tolist() if i < j
    }


def test_how_far_apart_images_lie_does_not_count() -> None:
    images, training = gaussian(30, 4), gaussian(80, 4, seed=1)
    near, plain = nearness(images, training), nearness(images / 64, training / 64)
    torch.testing.assert_close(near.ratio, plain.ratio)
    torch.testing.assert_close(near.second, plain.second)
    torch.testing.assert_close(near.distance, 64 * plain.distance)


def every_version(images: Tensor, flip: bool, padding: int) -> Tensor:
    """[versions, images, ...], by brute force."""
    padded = F.pad(images.double(), (padding,) * 4, mode="reflect")
    size, shifts = images.shape[-1], range(2 * padding + 1)
    crops = [padded[..., y : y + size, x : x + size] for y in shifts for x in shifts]
    return torch.stack([*crops, *(crop.flip(-1) for crop in crops if flip)])


@pytest.mark.parametrize(("flip", "padding"), [(False, 0), (True, 0), (False, 1), (True, 2)])
def test_the_nearest_shown_are_brute_forces(digits: Tensor, flip: bool, padding: int) -> None:
    """Of images so small, crops are exact, too."""
    images, queries = digits[:150], digits[150:190]
    found = nearest_shown(queries, images, 7, flip=flip, crop_padding=padding)
    versions = every_version(images, flip, padding)
    least = torch.stack([distances(queries, one) for one in versions]).amin(0)
    torch.testing.assert_close(found.distances, least.sort(dim=1).values[:, :7])
    torch.testing.assert_close(least.gather(1, found.rows), found.distances)
    assert all(len({*rows}) == 7 for rows in found.rows.tolist())
    for k in range(7):
        shown = augmented(images[found.rows[:, k]], found.shift[:, k], found.mirrored[:, k])
        apart = (queries.double() - shown.double()).flatten(1).norm(dim=1)
        torch.testing.assert_close(found.distances[:, k], apart)


def test_every_image_that_training_shows_is_found_exactly_however_large() -> None:
    """Those of `augment`, in images that are compared after averaging, with a remainder."""
    images = (40 * gaussian(40, 3, 20, 20) + 128).clamp(0, 255).byte()
    index = torch.arange(40)
    shown = augment(images, index, 1, flip=True, crop_padding=3)
    found = nearest_shown(shown, images, 2, flip=True, crop_padding=3)
    assert torch.equal(found.rows[:, 0], index)
    assert not found.distances[:, 0].any()
    assert found.distances[:, 1].min() > 100
    assert torch.equal(augmented(images, found.shift[:, 0], found.mirrored[:, 0]), shown)


def test_shifted_copies_raise_the_alarm_and_fresh_images_do_not(digits: Tensor) -> None:
    """Fresh ones as training would show them, and as they are."""
    training, held_out, fresh = digits[:1000], digits[1000:1400], digits[1400:]
    shown = partial(augment, crop_padding=1)
    near = partial(nearness, flip=False, crop_padding=1)
    usual = near(shown(held_out, torch.arange(400), 0), training)
    copies = shown(training[:397], torch.arange(397), 2).float() + 6 * gaussian(397, 1, 8, 8)
    for images, alarm in (
        (copies.round().clamp(0, 255).byte(), True),
        (shown(fresh, torch.arange(397), 1), False),
        (fresh, False),
    ):
        assert judge(near(images, training).ratio, usual.ratio).alarm == alarm


def test_too_many_neighbours_or_pairs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="5 nearest of 4"):
        nearest(torch.zeros(3, 2), torch.zeros(4, 2), 5)
    monkeypatch.setattr(neighbours, "_MOST_PAIRS", 50)
    with pytest.raises(DataError, match="more than 50 pairs"):
        pairs_within(torch.zeros(9, 2), torch.zeros(9, 2), 1.0)


def test_copies_of_training_images_raise_the_alarm_and_fresh_images_do_not(digits: Tensor) -> None:
    training, held_out, fresh = digits[:1000], digits[1000:1400], digits[1400:]
    noise = 6 * gaussian(397, 1, 8, 8)
    copies = (training[:397].float() + noise).round().clamp(0, 255).byte()
    usual = nearness(held_out, training)
    verdicts = {
        name: judge(nearness(images, training).ratio, usual.ratio)
        for name, images in (("fresh", fresh), ("copies", copies))
    }
    assert not verdicts["fresh"].alarm
    assert verdicts["copies"].alarm
    assert verdicts["copies"].share > 0.99
    near = nearness(copies, training)
    assert torch.equal(near.rows, torch.arange(397))
    assert (near.second < COPY).double().mean() > 0.5


def test_a_tenth_of_copies_is_enough_and_the_suspicious_ones_are_they(digits: Tensor) -> None:
    training, held_out, fresh = digits[:1000], digits[1000:1400], digits[1400:]
    samples = torch.cat((training[::26][:39], fresh))
    verdict = judge(nearness(samples, training).ratio, nearness(held_out, training).ratio)
    assert verdict.alarm
    assert verdict.suspicious[:39].all()
    assert verdict.suspicious[39:].double().mean() < 0.03


def test_the_alarm_is_false_as_seldom_as_it_says() -> None:
    """Where samples and held-out images are one distribution, p is at most α with probability α."""
    ratios = gaussian(2000, 300).double()
    p = torch.tensor([judge(row[:200], row[200:]).p_value for row in ratios])
    for alpha in (0.01, 0.05, 0.2):
        assert (p <= alpha).double().mean() <= alpha + 3 * math.sqrt(alpha / 2000)
    assert (p <= 0.2).double().mean() > 0.1  # and not because it never speaks


def test_the_tail_is_that_of_drawing_without_an_order() -> None:
    """K of n samples lie below the least of m held-out ones: (n choose K)-weighted, for m = 1."""
    held_out, samples = torch.tensor([0.5]).double(), torch.arange(10).double() / 10
    verdict = judge(samples, held_out)
    # With one held-out value, its rank among all 11 is uniform: P(K >= 5) = 6/11.
    assert verdict.p_value == pytest.approx(6 / 11, rel=1e-12)
    assert verdict.expected == 0.5


def test_two_training_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few"):
        nearness(torch.zeros(4, 2), torch.zeros(2, 2))


def test_a_copy_of_what_is_there_many_times_is_a_copy() -> None:
    training = torch.cat((torch.ones(60, 4), gaussian(20, 4)))
    assert nearness(torch.ones(1, 4), training).ratio.item() == 0


def test_the_vendi_score_counts_what_is_different() -> None:
    same, none = torch.ones(7, 5), torch.zeros(5)
    assert vendi(same, none) == pytest.approx(1)
    assert vendi(torch.eye(5), none) == pytest.approx(5)
    twice = torch.cat((torch.eye(5), 3 * torch.eye(5)))  # lengths do not count
    assert vendi(twice, none) == pytest.approx(5)
    uneven = torch.cat((torch.eye(2), torch.eye(2)[:1], torch.eye(2)[:1]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert vendi(uneven, torch.zeros(2)) == pytest.approx(math.exp(entropy))


def test_a_collapsed_model_repeats_itself_and_real_images_do_not(digits: Tensor) -> None:
    noisy = digits[:20].repeat(20, 1, 1, 1).float() + 3 * gaussian(400, 1, 8, 8)
    collapsed = noisy.clamp(0, 255).byte()
    assert repeats(collapsed, digits[:400]) > 0.99
    assert repeats(digits[1000:1400], digits[:400]) < 0.05
