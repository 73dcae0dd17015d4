"""Figures against libraries, literal formulas and exact values.

The libraries take seconds to import, so that only the tests that ask them do.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rediffuse.evaluation import kernel as kernels
from rediffuse.evaluation import manifold as manifolds
from rediffuse.evaluation import mifid
from rediffuse.evaluation.agreement import class_agreement
from rediffuse.evaluation.colour import channel_statistics, histogram, histogram_distance
from rediffuse.evaluation.frechet import frechet_distance, frechet_distances
from rediffuse.evaluation.inception_score import inception_score
from rediffuse.evaluation.jackknife import GROUPS, groups_of, standard_error
from rediffuse.evaluation.kernel import kernel_distance, squared_mmd, subset
from rediffuse.evaluation.manifold import manifold, manifold_without
from rediffuse.evaluation.mifid import memorization_distance, memorization_informed
from rediffuse.evaluation.moments import Moments, merge, merged, moments, moments_without
from rediffuse.randomness import Stream, normal


def drawn(seed: int, count: int, features: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features, none of which is centred."""
    words = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(99))
    return scale * torch.randn(count, features, generator=words) @ mixing + shift


def test_moments_are_numpys_mean_and_covariance():
    x = drawn(0, 50, 7)
    found = moments(x)
    torch.testing.assert_close(found.mean.numpy(), np.mean(x.numpy().astype(float), 0))
    expected = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    torch.testing.assert_close(found.covariance, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_moments_do_not_depend_on_batches_and_their_order(size):
    x = drawn(0, 200, 7, shift=1000.0)
    whole = moments(x)
    parts = [moments(batch) for batch in x.split(size)]
    half = len(parts) // 2
    tree = merge(merged(parts[half:]), merged(parts[:half])) if half else merged(parts)
    for found in (merged(parts), merged(parts[::-1]), tree):
        assert found.n == 200
        torch.testing.assert_close(found.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.covariance, whole.covariance, rtol=1e-9, atol=1e-9)


def test_moments_refuse_what_is_empty_or_not_finite():
    for x in (torch.zeros(0, 3), torch.tensor([[0.0, torch.nan]])):
        with pytest.raises(ValueError, match="finite"):
            moments(x)


def test_frechet_distance_of_two_known_gaussians_is_10():
    standard = Moments(9, torch.zeros(2).double(), torch.eye(2).double())
    other = Moments(9, torch.tensor([1.0, 2]).double(), torch.diag(torch.tensor([4.0, 9])).double())
    assert frechet_distance(standard, other) == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize("count", [1000, 40], ids=["full rank", "fewer images than features"])
def test_frechet_distance_is_torch_fidelitys(count):
    from torch_fidelity import metric_fid as reference_fid

    a, b = drawn(1, count, 96).double(), drawn(2, count, 96, 1.3, 0.2).double()
    statistics = [reference_fid.fid_features_to_statistics(x) for x in (a, b)]
    expected = reference_fid.fid_statistics_to_metric(*statistics, verbose=False)
    found = frechet_distance(moments(a), moments(b))
    # The reference takes roots of what is 0 up to rounding, so that it is less exact itself there.
    assert found == pytest.approx(
        expected[reference_fid.KEY_METRIC_FID], rel=1e-9 if count > 96 else 1e-6
    )


@pytest.mark.parametrize("count", [2, 30, 500])
def test_frechet_distance_of_a_set_with_itself_is_nothing(count):
    x = drawn(3, count, 64, scale=10.0)
    assert frechet_distance(moments(x), moments(x.flip(0))) < 1e-6


def test_frechet_distance_to_a_single_image_is_finite():
    x = drawn(4, 20, 8)
    expected = (x[0].double() - x.double().mean(0)).square().sum() + x.double().var(0).sum()
    assert frechet_distance(moments(x[:1]), moments(x)) == pytest.approx(float(expected))


def test_frechet_distance_is_symmetric_and_ignores_rotations_of_both():
    a, b = drawn(5, 100, 12).double(), drawn(6, 90, 12, 0.7, 1.0).double()
    turn = torch.linalg.qr(drawn(7, 12, 12).double()).Q
    found = frechet_distance(moments(a), moments(b))
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(found, rel=1e-9)
    assert frechet_distance(moments(a @ turn), moments(b @ turn)) == pytest.approx(found, rel=1e-9)


def test_squared_mmd_of_known_numbers():
    x = torch.arange(12).double().reshape(4, 3) / 10
    y = torch.arange(15).double().reshape(5, 3) / 11 + 0.1
    assert squared_mmd(x, y) == pytest.approx(-0.3540952339296535, rel=1e-12)


def test_squared_mmd_does_not_depend_on_its_blocks(monkeypatch):
    x, y = drawn(1, 50, 8), drawn(2, 60, 8)
    whole = squared_mmd(x, y)
    monkeypatch.setattr(kernels, "_ROWS", 7)
    assert squared_mmd(x, y) == pytest.approx(whole, rel=1e-9)


def test_kernel_distance_is_torch_fidelitys_on_the_same_subsets(monkeypatch):
    from torch_fidelity import metric_kid as reference_kid

    x, y = drawn(1, 120, 8).double(), drawn(2, 150, 8, 1.1).double()
    found = kernel_distance(x, y, 5, subsets=6, size=40)
    rows = iter(range(12))

    class Keyed:
        def __init__(self, seed: int) -> None: ...

        def choice(self, length: int, size: int, replace: bool) -> np.ndarray:
            return subset(length, size, 5, next(rows)).numpy()

    monkeypatch.setattr(reference_kid.np.random, "RandomState", Keyed)
    expected = reference_kid.kid_features_to_metric(
        x, y, kid_subsets=6, kid_subset_size=40, verbose=False
    )
    assert found.mean == pytest.approx(expected[reference_kid.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert found.sd == pytest.approx(expected[reference_kid.KEY_METRIC_KID_STD], rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Two sets of one distribution, many times: the mean lies within three of its errors of 0."""
    found = torch.tensor([squared_mmd(drawn(k, 30, 4), drawn(1000 + k, 30, 4)) for k in range(200)])
    assert abs(found.mean()) < 3 * found.std() / 200**0.5


def test_subsets_repeat_no_row_and_differ_by_number_and_seed():
    one = subset(100, 60, 0, 0)
    assert len(one.unique()) == 60
    assert not one.equal(subset(100, 60, 0, 1))
    assert not one.equal(subset(100, 60, 1, 0))


def test_inception_score_is_torch_fidelitys_in_the_same_order():
    from torch_fidelity import metric_isc as reference_is

    logits = 3 * drawn(0, 103, 5)  # which is no multiple of the splits
    shuffled = logits[subset(103, 103, 7, 0)]
    expected = reference_is.isc_features_to_metric(shuffled, splits=10, shuffle=False)
    found = inception_score(logits, 7)
    assert found.mean == pytest.approx(expected[reference_is.KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert found.sd == pytest.approx(expected[reference_is.KEY_METRIC_ISC_STD], rel=1e-9)


def test_inception_score_of_certain_and_even_classes_is_their_number():
    certain = 1e4 * torch.eye(6).repeat(5, 1)  # p is 0 and 1, whose logarithm is infinite
    assert inception_score(certain, 0, splits=1).mean == pytest.approx(6)
    assert inception_score(torch.zeros(30, 6), 0, splits=1).mean == pytest.approx(1)


def literal_manifold(real: Tensor, fake: Tensor) -> tuple[float, ...]:
    """Kynkäänniemi et al. 2019, Eq. 1-2, and Naeem et al. 2020, image by image."""

    def radius(x: Tensor, i: int, k: int) -> float:
        others = [float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i]
        return sorted(others)[k - 1]

    def inside(point: Tensor, x: Tensor, i: int, k: int) -> bool:
        return float((point - x[i]).norm()) <= radius(x, i, k)

    n, m = range(len(real)), range(len(fake))
    return (
        np.mean([any(inside(fake[j], real, i, 3) for i in n) for j in m]),
        np.mean([any(inside(real[i], fake, j, 3) for j in m) for i in n]),
        np.mean([sum(inside(fake[j], real, i, 5) for i in n) / 5 for j in m]),
        np.mean([any(inside(fake[j], real, i, 5) for j in m) for i in n]),
    )


def test_manifold_is_the_literal_formula_whatever_its_blocks(monkeypatch):
    real, fake = drawn(1, 25, 3).double(), drawn(2, 21, 3, 0.8, 0.5).double()
    expected = literal_manifold(real, fake)
    assert 0 < min(expected[0], expected[1], expected[3]) < 1
    assert manifold(real, fake) == pytest.approx(expected)
    monkeypatch.setattr(manifolds, "_ROWS", 4)
    assert manifold(real, fake) == pytest.approx(expected)


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity import metric_prc as reference_prc

    real, fake = drawn(1, 300, 6).double(), drawn(2, 250, 6, 0.9, 0.5).double()
    expected = reference_prc.prc_features_to_metric(fake, real, verbose=False)
    found = manifold(real, fake)
    assert found.precision == pytest.approx(expected[reference_prc.KEY_METRIC_PRECISION])
    assert found.recall == pytest.approx(expected[reference_prc.KEY_METRIC_RECALL])


def test_a_set_covers_itself_and_not_what_is_far_away():
    x = drawn(1, 200, 6)
    same, apart = manifold(x, x.flip(0)), manifold(x, x + 1e3)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert apart == (0, 0, 0, 0)


@pytest.mark.slow  # to import
@pytest.mark.parametrize("copied", [0.999, 0.0], ids=["memorised", "new"])
def test_memorization_informed_distance_is_torchmetrics_from_each_sample(copied):
    from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

    real = drawn(1, 60, 30)
    fake = copied * real[:50] + (1 - copied) * drawn(2, 50, 30)
    network = torch.nn.Flatten()
    metric = MemorizationInformedFrechetInceptionDistance(feature=network)
    metric.update(fake.double(), real=True)  # it looks from what it calls real
    metric.update(real.double(), real=False)
    distance = frechet_distance(moments(real), moments(fake))
    found = memorization_informed(distance, real, fake)
    assert (found > 10 * distance) is (copied > 0)
    assert found == pytest.approx(float(metric.compute()), rel=1e-6)


def test_memorization_distance_is_the_literal_formula_whatever_its_blocks(monkeypatch):
    real, fake = drawn(1, 9, 4).double(), drawn(2, 8, 4).double()
    cosines = [[float(f @ r / (f.norm() * r.norm())) for r in real] for f in fake]
    expected = np.mean([min(1 - abs(c) for c in row) for row in cosines])
    assert memorization_distance(real, fake) == pytest.approx(expected)
    monkeypatch.setattr(mifid, "_ROWS", 3)
    assert memorization_distance(real, fake) == pytest.approx(expected)


def test_class_agreement_counts_what_is_named_as_asked():
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [1, 0, 0]])
    found = class_agreement(logits, torch.tensor([0, 1, 2, 1]))
    assert found.share == 0.75
    e = np.exp
    expected = np.mean([e(2) / (e(2) + 2), e(1) / (e(1) + 2), e(3) / (e(3) + 2), 1 / (e(1) + 2)])
    assert found.confidence == pytest.approx(expected)


def pixels(seed: int, highest: int) -> Tensor:
    words = torch.Generator().manual_seed(seed)
    return torch.randint(0, highest, (12, 3, 5, 4), dtype=torch.uint8, generator=words)


def test_colours_are_those_of_the_pixels():
    x = pixels(0, 256)
    found = channel_statistics(histogram(x))
    channels = x.movedim(1, 0).flatten(1).double()
    torch.testing.assert_close(found.mean, channels.mean(1))
    torch.testing.assert_close(found.sd, channels.std(1, correction=0))
    assert histogram(x).equal(histogram(x[:5]) + histogram(x[5:]))


def test_histogram_distance_is_how_far_levels_move():
    x, y = pixels(0, 256), pixels(1, 180)
    levels = [z.movedim(1, 0).flatten(1).double().sort().values for z in (x, y)]
    expected = (levels[0] - levels[1]).abs().mean(1)  # the least transport keeps the order
    torch.testing.assert_close(histogram_distance(histogram(x), histogram(y)), expected)
    assert histogram_distance(3 * histogram(x), histogram(x)).abs().max() < 1e-12
    shifted = histogram_distance(histogram(y), histogram(y + 9))
    torch.testing.assert_close(shifted, torch.full((3,), 9.0).double())


# Standard errors: the jackknife


def gaussian(count: int, features: int, seed: int) -> Tensor:
    return normal(seed, Stream.EVALUATION, torch.arange(count), (features,))


def without(x: Tensor, group: Tensor) -> list[Tensor]:
    return [x[group != number] for number in range(GROUPS)]


def test_leaving_a_group_out_is_measuring_the_rest():
    """Every shortcut of the jackknife, against the figure computed anew."""
    real, fake, k = gaussian(90, 4, seed=1), 1.2 * gaussian(110, 4, seed=2), GROUPS
    fake[7:9] = fake[6]  # equal ones
    group = groups_of(len(fake))
    assert group is not None
    rest = without(fake, group)
    for found, x in zip(moments_without(fake, group), rest, strict=True):
        assert found.n == len(x)
        torch.testing.assert_close(found.mean, moments(x).mean)
        torch.testing.assert_close(found.covariance, moments(x).covariance)
    direct = [frechet_distance(moments(x), moments(real)) for x in rest]
    distance, shortcut = frechet_distances(fake, moments(real), group)
    assert distance == frechet_distance(moments(fake), moments(real))  # bit for bit
    assert shortcut == pytest.approx(direct)
    found = kernel_distance(fake, real, 0, subsets=1, size=90, group=group)
    rows, others = subset(110, 90, 0, 0), subset(90, 90, 0, 1)
    direct = [squared_mmd(fake[rows][group[rows] != n], real[others]) for n in range(k)]
    assert found.standard_error == pytest.approx(standard_error(direct))
    assert manifold_without(real, fake, group) == [pytest.approx(manifold(real, x)) for x in rest]
    logits = 3 * gaussian(110, 5, seed=3)
    found = inception_score(logits, 0, splits=1, group=group)
    direct = [inception_score(x, 0, splits=1).mean for x in without(logits, group)]
    assert found.standard_error == pytest.approx(standard_error(direct))


def test_the_kernel_distance_to_few_images_has_no_standard_error():
    """Of subsets of 3 samples, leaving a group out may leave one, which has no MMD²."""
    fake, real = gaussian(100, 4, seed=1), gaussian(3, 4, seed=2)
    found = kernel_distance(fake, real, 0, subsets=100, size=3, group=groups_of(100))
    assert math.isfinite(found.mean)
    assert found.standard_error is None


@pytest.mark.parametrize(
    ("features", "count"), [(32, 128), (64, 256), (32, 48), (64, 96), (64, 50)]
)
@pytest.mark.parametrize("scale", [1.0, 1.2], ids=["equal", "different"])
def test_the_standard_error_of_frechet_distance_is_that_of_exact_replicates(features, count, scale):
    """Against singular values of matrix roots; the last covariance is not of full rank."""
    x = drawn(1, count, features, scale, shift=5.0)
    real = moments(drawn(2, 6 * features, features, shift=5.0))
    group = groups_of(count)
    assert group is not None
    exact = [frechet_distance(moments(rest), real) for rest in without(x, group)]
    _, parts = frechet_distances(x, real, group)
    assert standard_error(parts) == pytest.approx(standard_error(exact), rel=1e-5)


def test_replicates_of_frechet_distance_decompose_no_matrix_root(monkeypatch):
    """A replicate of the jackknife costs eigenvalues only: the roots are of all rows and of b."""
    roots, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: roots.append(matrix) or eigh(matrix))
    x = gaussian(100, 4, seed=1)
    frechet_distances(x, moments(gaussian(90, 4, seed=2)), groups_of(100))
    assert len(roots) == 2


@pytest.mark.parametrize("rows", [1, 3], ids=["a single image", "fewer images than features"])
def test_frechet_distances_without_groups_from_a_reference_of_few_images(rows):
    x, real = gaussian(80, 6, seed=1), moments(gaussian(rows, 6, seed=2))
    group = groups_of(80)
    assert group is not None
    exact = [frechet_distance(moments(rest), real) for rest in without(x, group)]
    assert frechet_distances(x, real, group)[1] == pytest.approx(exact)


def test_groups_have_equal_shares_of_every_class_whatever_the_order():
    for classes in (torch.arange(400) % 10, torch.arange(400) // 40, None):
        group = groups_of(400, classes)
        assert group is not None
        assert group.bincount().tolist() == [20] * GROUPS
        if classes is not None:
            assert (classes * GROUPS + group).bincount().tolist() == [2] * 10 * GROUPS
    assert groups_of(2 * GROUPS - 1) is None


@pytest.mark.parametrize(
    ("shift", "least", "most"),
    [
        (0.0, 1.0, 2.6),  # between equal distributions the jackknife's variance is twice the true
        (0.7, 0.7, 1.4),
    ],
)
def test_standard_errors_are_those_of_drawing_again_at_this_n(shift, least, most):
    """Of 100 draws of n images of one model against one reference, and never less on average."""
    reference = gaussian(300, 3, seed=99)
    real, drawn = moments(reference), range(100)
    values: dict[str, list[tuple[float, float]]] = {"fd": [], "kd": []}
    for seed in drawn:
        x = gaussian(100, 3, seed=seed) + shift
        group = groups_of(len(x))
        assert group is not None
        whole, parts = frechet_distances(x, real, group)
        values["fd"].append((whole, standard_error(parts)))
        kernel = kernel_distance(x, reference, 0, subsets=2, size=100, group=group)
        assert kernel.standard_error is not None
        values["kd"].append((kernel.mean, kernel.standard_error))
    for found in values.values():
        value, error = torch.tensor(found, dtype=torch.float64).T
        assert least <= error.square().mean() / value.var() <= most


def test_the_deviation_over_subsets_is_no_error_of_few_samples():
    """All subsets of n <= 1000 samples are the same samples, whose chance is not in it."""
    reference = gaussian(300, 3, seed=99)
    found = []
    for seed in range(30):
        x = gaussian(100, 3, seed=seed) + 0.7
        found.append(kernel_distance(x, reference, 0, subsets=4, size=100, group=groups_of(100)))
    deviation = torch.tensor([one.mean for one in found]).std()
    assert deviation > 1.5 * np.mean([one.sd for one in found])
    assert deviation == pytest.approx(np.mean([one.standard_error for one in found]), rel=0.3)
