"""Image i is one row with one augmentation, however batches are cut and whoever computes them."""

from itertools import islice

import numpy as np
import pytest
import torch

from rediffuse.data.batches import Batches, fixed
from rediffuse.data.pixels import augment, to_model, to_uint8
from rediffuse.errors import ConfigError, DataError
from rediffuse.randomness import Stream, order, uniform

CPU = torch.device("cpu")
ALL_LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
CIFAR = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])


def pictures(count=100, channels=3, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, channels, size, size), np.uint8)


def labels(count=100):
    return np.arange(count) % 10


def batches(**how):
    given = {"images": pictures(), "labels": labels(), "seed": 3, "batch_size": 64}
    return Batches(**{**given, "flip": True, "crop_padding": 2, **how})


def together(steps):
    """Everything in some steps, as one batch."""
    index, x_0, cond = zip(*(batch for step in steps for batch in step), strict=True)
    return torch.cat(index), torch.cat(x_0), torch.cat(cond)


def first(count, of, images_seen=0):
    return list(islice(of.since(images_seen), count))


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


class TestBatches:
    @pytest.mark.parametrize(
        "how",
        [
            {"batch_size": 32},
            {"micro_batches": 2},
            {"micro_batches": 4},
            {"batch_size": 16, "micro_batches": 16},
            {"batch_size": 6},
            {"workers": 1},
            {"workers": 1, "micro_batches": 2},
            {"on_device": True},
        ],
    )
    def test_cutting_and_loading_only_regroup_the_same_images(self, how):
        one = together(first(3, batches()))
        size = how.get("batch_size", 64)
        assert_equal(together(first(192 // size, batches(**how))), one)

    @pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (4, 1), (2, 4)])
    def test_ranks_share_each_step_without_overlap(self, ranks, micro_batches):
        of_rank = [
            first(3, batches(rank=r, ranks=ranks, micro_batches=micro_batches))
            for r in range(ranks)
        ]
        assert {len(step) for steps in of_rank for step in steps} == {micro_batches}
        steps = [[b for steps in of_rank for b in steps[k]] for k in range(3)]
        assert_equal(together(steps), together(first(3, batches())))

    @pytest.mark.parametrize("images_seen", [64, 128, 37, 99, 100, 16_384, 10**10])
    def test_starting_late_equals_skipping(self, images_seen):
        index, x_0, cond = together(first(2, batches(), images_seen))
        assert torch.equal(index, images_seen + torch.arange(128))
        for shift in (0, 63):
            again = together(first(1, batches(), images_seen + shift))
            assert_equal(again, (index[shift:][:64], x_0[shift:][:64], cond[shift:][:64]))

    def test_a_step_beyond_the_block_of_orders_goes_on_as_before(self):
        late, direct = first(20, batches(batch_size=16)), first(1, batches(batch_size=16), 19 * 16)
        assert_equal(late[19][0], direct[0][0])

    @pytest.mark.parametrize("rows", [None, np.arange(1, 100, 3)])
    def test_every_epoch_is_another_permutation_of_the_rows(self, rows):
        plain = batches(
            rows=rows, flip=False, crop_padding=0, batch_size=len(labels()[rows].ravel())
        )
        expected = np.arange(100) if rows is None else rows
        seen = []
        for index, x_0, cond in (step[0] for step in first(3, plain)):
            at = np.array(
                [np.flatnonzero((pictures() == x).all((1, 2, 3)))[0] for x in to_uint8(x_0).numpy()]
            )
            assert sorted(at) == expected.tolist()
            assert cond.tolist() == (at % 10).tolist()
            assert np.array_equal(expected[order(index, len(expected), 3)], at)
            seen.append(at)
        assert not np.array_equal(seen[0], seen[1])
        assert not np.array_equal(seen[1], seen[2])

    def test_the_seed_changes_order_and_augmentation(self):
        assert not torch.equal(
            together(first(1, batches()))[1], together(first(1, batches(seed=4)))[1]
        )

    def test_without_labels_there_are_no_classes(self):
        assert first(1, batches(labels=None))[0][0].cond is None

    def test_the_global_generator_is_left_alone(self):
        before = torch.random.get_rng_state()
        first(2, batches(workers=1))
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_loader_that_fails_tells_its_consumer(self):
        class Torn(np.ndarray):
            def __getitem__(self, at):
                raise OSError("the disk is gone")

        steps = batches(images=pictures().view(Torn), workers=1).since(0)
        with pytest.raises(OSError, match="the disk is gone"):
            next(steps)

    def test_what_cannot_be_cut_is_refused_with_what_can(self):
        with pytest.raises(ConfigError, match=r"batch_size=64 .* 2 ranks x 3 .*; 60 or 66 does"):
            batches(ranks=2, micro_batches=3)
        with pytest.raises(ConfigError, match=r"crop_padding=8 .* 8 pixels; at most 7"):
            batches(crop_padding=8)
        with pytest.raises(DataError, match="no image to train on"):
            batches(rows=np.arange(0))

    @pytest.mark.gpu
    @pytest.mark.parametrize("how", [{}, {"workers": 1}, {"on_device": True}])
    def test_a_gpu_sees_the_same_images(self, how):
        x_0 = together(first(3, batches(device=torch.device("cuda"), **how)))[1]
        assert torch.equal(x_0.cpu(), together(first(3, batches()))[1])


class TestFixed:
    @pytest.mark.parametrize(
        ("count", "sizes"), [(None, [64, 36]), (70, [64, 6]), (64, [64]), (0, [])]
    )
    def test_it_holds_the_first_rows_in_order_and_unchanged(self, count, sizes):
        rows = np.random.default_rng(1).permutation(100)
        found = fixed(pictures(), labels(), rows, count, batch_size=64)
        assert [len(batch.index) for batch in found] == sizes
        for start, (index, x_0, cond) in zip((0, 64), found, strict=False):
            at = rows[start : start + len(index)]
            assert torch.equal(index, torch.arange(start, start + len(index)))
            assert np.array_equal(to_uint8(x_0).numpy(), pictures()[at])
            assert cond.tolist() == labels()[at].tolist()


class TestAugment:
    def test_a_flip_mirrors_half_of_the_images_keyed_by_index(self):
        images, index = torch.from_numpy(pictures(400, 1)), torch.arange(1000, 1400)
        flipped = augment(images, index, 3, flip=True)
        chosen = uniform(3, Stream.AUGMENT, index, 3)[:, 0] < 0.5
        assert torch.equal(flipped[chosen], images[chosen].flip(-1))
        assert torch.equal(flipped[~chosen], images[~chosen])
        assert 160 < chosen.sum() < 240  # 4 standard deviations

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("padding", [1, 3, 7])
    def test_a_crop_is_cut_out_of_the_image_padded_by_reflection(self, flip, padding):
        images, index = torch.from_numpy(pictures(50)), torch.arange(50)
        found = augment(images, index, 3, flip=flip, crop_padding=padding)
        padded = torch.nn.functional.pad(images.float(), (padding,) * 4, mode="reflect").byte()
        u = uniform(3, Stream.AUGMENT, index, 3)
        for k in range(50):
            y, x = (u[k, 1:] * (2 * padding + 1)).long()
            cut = padded[k, :, y : y + 8, x : x + 8]
            assert torch.equal(found[k], cut.flip(-1) if flip and u[k, 0] < 0.5 else cut)

    def test_every_shift_is_as_likely(self):
        ramp = torch.arange(8, dtype=torch.uint8).expand(9000, 1, 8, 8)
        corner = augment(ramp, torch.arange(9000), 3, crop_padding=4)[:, 0, 0, 4]
        counts = corner.long().bincount(minlength=9).float()
        # Shifts -4 .. 4 put columns 0 .. 7 and, reflected, 6 there.
        expected = torch.tensor([1000.0] * 6 + [2000.0, 1000.0, 0.0])
        assert (((counts - expected) ** 2 / expected.clamp(min=1)).sum()) < 24.3  # χ², 7, p = 0.001


class TestPixels:
    def test_the_default_range_is_minus_1_to_1(self):
        x = to_model(ALL_LEVELS).flatten()
        assert (x[0], x[255]) == (-1, 1)
        assert torch.allclose(x, torch.arange(256) / 127.5 - 1, atol=1e-6)

    @pytest.mark.parametrize("how", [(0.5, 0.5), (0.0, 1.0), (0.1307, 0.3081), CIFAR])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_there_and_back_is_exact(self, how, dtype):
        levels = ALL_LEVELS.expand(1, 3, 16, 16)
        assert torch.equal(to_uint8(to_model(levels, *how).to(dtype), *how), levels)

    def test_channels_have_their_own_mean_and_deviation(self):
        pixels = torch.from_numpy(pictures())
        for c, (mean, std) in enumerate(zip(*CIFAR, strict=True)):
            expected = to_model(pixels[:, c : c + 1], mean, std)
            assert torch.equal(to_model(pixels, *CIFAR)[:, c : c + 1], expected)

    def test_the_default_way_back_is_the_textbooks_rounded_and_clamped(self):
        x = torch.linspace(-1.3, 1.3, 10_001).reshape(1, 1, 1, -1)
        assert torch.equal(to_uint8(x), ((x + 1) * 127.5).round().clamp(0, 255).byte())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_never_becomes_a_pixel(self, bad):
        x = torch.zeros(2, 3, 4, 4)
        x[1, 2, 3, 0] = bad
        with pytest.raises(DataError, match="1 of 96 pixel values are NaN or infinite"):
            to_uint8(x)

    @pytest.mark.parametrize(
        "convert",
        [lambda how: to_model(ALL_LEVELS, how), lambda how: to_uint8(torch.zeros(1, 1, 2, 2), how)],
    )
    def test_a_mean_per_channel_must_fit_the_channels(self, convert):
        with pytest.raises(ConfigError, match="3 numbers for images of 1 channels"):
            convert(CIFAR[0])
