"""Image j depends on (seed, j) alone: on a CPU to the last bit, whatever else is drawn."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
import torch

from rediffuse import build, drawing
from rediffuse.config.compose import compose
from rediffuse.data.pixels import to_uint8
from rediffuse.drawing import CPU_ROWS, Job, classes_for, draw, share, states, watched
from rediffuse.gallery import Options, wanted
from rediffuse.models import Model
from rediffuse.training.devices import PRECISIONS

NETWORKS = {
    "unet": ("model.base_channels=16", "model.attention_resolutions=[4]"),
    "rgb": ("data.channels=3", "data.image_size=16", "model.base_channels=16"),
    "odd": ("data.image_size=9", "model.base_channels=12", "model.norm.groups=3"),
    "adm": ("model=adm", "data.image_size=8", "model.base_channels=32", "model.head_channels=16"),
    "mlp": ("model=mlp", "model.width=48"),
    "self-conditioned": ("model.base_channels=16", "training.self_conditioning=0.5"),
}
LEVELS = ("model.channel_multipliers=[1,2]", "model.blocks_per_level=1")
MORE = {
    "rgb": (*LEVELS, "model.attention_resolutions=[8]"),
    "odd": ("model.channel_multipliers=[1]", "model.attention_resolutions=[9]"),
    "adm": (*LEVELS, "model.attention_resolutions=[4]"),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model(name: str = "unet", precision: torch.dtype = torch.float32) -> Model:
    """A network of ten classes whose every weight is random; a new one answers 0."""
    config = compose([*NETWORKS[name], *MORE.get(name, ())])
    network = build.network(config, 10).eval()
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=numbers) * 0.1)
    names = tuple("0123456789")
    denoiser = build.denoiser(config, network)
    return Model(config, denoiser, names, torch.device("cpu"), precision)


def last(of: Model, images: Sequence[int], **how: object) -> torch.Tensor:
    """The float states in which a job of these images ends."""
    options = Options(**{"steps": 2, "guidance": 1.0, **how})  # type: ignore[arg-type]
    job = Job(tuple(images), classes_for(images, of.class_names))
    *_, x = states(of, wanted(of.config.sampling, options), job)
    assert x.isfinite().all()
    return x


QUICK = {*((name, 1, "fp32") for name in NETWORKS), ("unet", 1, "bf16")}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in product(NETWORKS, (1, 2, 3, 4), ("fp32", "bf16"))
]


@pytest.mark.usefixtures("threads", "unchecked")
@pytest.mark.parametrize(("name", "count", "precision"), CASES)
def test_an_image_has_the_same_bits_whatever_it_is_drawn_with(
    name: str, count: int, precision: str
) -> None:
    torch.set_num_threads(count)
    of, images = model(name, PRECISIONS[precision]), (*range(20), 37)
    together = last(of, images)
    for job in ((5,), (19, 3), tuple(range(4, 12)), (37, 5, 21)):
        alone = last(of, job)
        for k, image in enumerate(job):
            if image in images:
                assert torch.equal(alone[k], together[images.index(image)])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "solver", ["dpmpp_2m", "ancestral", "heun churn=10", "adaptive rtol=0.2", "unipc"]
)
def test_it_has_with_every_kind_of_solver(solver: str) -> None:
    of = model()
    together = last(of, range(34), solver=solver, guidance=2.0)
    assert torch.equal(last(of, [33, 7], solver=solver, guidance=2.0), together[[33, 7]])


@pytest.mark.usefixtures("unchecked")
def test_a_network_on_a_cpu_meets_one_size_and_an_image_one_row() -> None:
    of = model("mlp")
    met: list[tuple[int, ...]] = []
    of.denoiser.network.register_forward_pre_hook(lambda _, given: met.append(given[0].shape))
    how = wanted(of.config.sampling, Options(steps=2, guidance=1.0))
    images = (*range(18, 36), 3, 19, 4)
    job = Job(images, classes_for(images, of.class_names), batch_size=5)
    drawn = list(draw(of, how, job))
    assert [number for numbers, _ in drawn for number in numbers] == list(images)
    assert {shape[0] for shape in met} == {CPU_ROWS}
    assert len(met) == 2 * 4  # 18-33, 34 35 3, 19 4 wait for their places: 16, 3, 2
    data = of.config.data
    expected = to_uint8(last(of, images), data.mean, data.std).numpy()
    assert np.array_equal(np.concatenate([pixels for _, pixels in drawn]), expected)


@pytest.mark.usefixtures("unchecked")
def test_who_looks_on_sees_the_images_that_were_asked_for() -> None:
    of, seen = model("mlp"), []
    how = wanted(of.config.sampling, Options(steps=2, solver="ddim", guidance=1.0))
    plain = Job((35, 3), (0, 1))
    job = Job((35, 3), (0, 1), way=watched(lambda x_t, t, x_0: seen.append((x_t, x_0))))
    for one, other in zip(states(of, how, job), states(of, how, plain), strict=True):
        assert torch.equal(one, other)
    assert [tuple(x.shape) for at in seen for x in at] == [(2, 1, 8, 8)] * 4
    assert torch.equal(seen[1][0], next(states(of, how, plain)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_a_job_without_dividing_a_batch(ranks: int) -> None:
    job = Job(tuple(range(70)), classes_for(range(70), "ab"))
    parts = [share(job, rank, ranks) for rank in range(ranks)]
    assert [image for part in parts for image in part.images] == list(range(70))
    assert all(part.images[0] % CPU_ROWS == 0 for part in parts)


def test_elsewhere_batches_are_filled_up_to_a_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_fixed_rows", lambda model: None)  # as on a GPU
    of, met = model("mlp"), []
    of.denoiser.network.register_forward_pre_hook(lambda _, given: met.append(len(given[0])))
    how = wanted(of.config.sampling, Options(steps=1, guidance=1.0))
    job = Job(tuple(range(13)), (0,) * 13, batch_size=10)
    assert [len(pixels) for _, pixels in draw(of, how, job)] == [10, 3]
    assert met == [16, 8]
