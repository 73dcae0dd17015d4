"""The engine's own laws, on a network of one convolution."""

import errno
import json
import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rediffuse import drawing, losses, weightings
from rediffuse.config.compose import compose
from rediffuse.data.batches import Batches
from rediffuse.denoiser import Denoiser
from rediffuse.errors import CheckpointError, TrainingError
from rediffuse.models import Model
from rediffuse.schedules import discrete
from rediffuse.targets import eps
from rediffuse.times import uniform_steps
from rediffuse.training import checkpoint, committed, hooks, rates
from rediffuse.training.average import Average
from rediffuse.training.devices import Devices
from rediffuse.training.loop import DONE, every, train
from rediffuse.training.optimizers import adam, adamw, parameter_groups
from rediffuse.training.state import Sums, TrainState, UsualLoss
from rediffuse.training.step import Recipe, train_step

SIZE = 16


class Tiny(nn.Module):
    """One convolution, a norm and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.norm = nn.BatchNorm2d(1)
        self.table = nn.Embedding(3, 1)

    def forward(
        self, x: torch.Tensor, label: torch.Tensor, cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        shift = 0 if cond is None else self.table(cond)[:, :, None, None]
        return self.norm(self.conv(x)) + shift


def recipe_for(network: nn.Module, **changes: object) -> Recipe:
    base = Recipe(
        denoiser=Denoiser(network, discrete.linear(), eps),
        objective=losses.simple,
        weighting=weightings.unit,
        times=uniform_steps,
        seed=3,
        batch_size=SIZE,
        learning_rate=lambda images: 1e-2,
        devices=Devices(torch.device("cpu")),
        null_class=2,
        label_dropout=0.25,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def fresh() -> TrainState:
    torch.manual_seed(0)
    network = Tiny()
    optimizer = adamw(parameter_groups(network), 1.0)
    return TrainState(network, optimizer, Average(network, half_life_images=100))


def batches(micro_batches: int = 1, **more: int) -> Batches:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 1, 4, 4), dtype=np.uint8)
    labels = np.arange(40) % 2
    return Batches(
        images=pixels, labels=labels, seed=3, batch_size=SIZE, micro_batches=micro_batches, **more
    )


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(one[name].equal(two[name]) for name in one)


def test_micro_batches_see_the_same_images_times_and_noise() -> None:
    # Without the batch norm, whose statistics are those of a micro-batch, gradients just add up.
    states = []
    for pieces in (1, 2, 4):
        state = fresh()
        state.network.norm = nn.Identity()  # type: ignore[assignment]
        train(
            recipe_for(state.network),
            replace(state, average=None),
            batches(pieces).since(0),
            [],
            64,
        )
        states.append(weights(state.network))
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


def test_two_ranks_see_what_one_rank_sees() -> None:
    whole = next(batches().since(32))[0]
    halves = [next(batches(rank=rank, ranks=2).since(32))[0] for rank in (0, 1)]
    assert torch.cat([half.index for half in halves]).equal(whole.index)
    assert torch.cat([half.x_0 for half in halves]).equal(whole.x_0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_finite_gradients_changes_no_weight_buffer_or_average(value: float) -> None:
    state = fresh()
    recipe = recipe_for(state.network)
    steps = batches().since(0)
    train_step(recipe, state, next(steps))
    written: list[dict[str, Any]] = []
    look = hooks.NonFinite(lambda values, images: written.append({**values, "at": images}), 3)
    before, averaged = weights(state.network), weights(state.average.network)  # type: ignore[union-attr]
    moments = json.dumps(str(state.optimizer.state_dict()["state"]))
    poisoned = [batch._replace(x_0=batch.x_0.clone()) for batch in next(steps)]
    poisoned[0].x_0[0, 0, 0, 0] = value
    look(state, train_step(recipe, state, poisoned))
    learned = [name for name, _ in state.network.named_parameters()]
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} < before.keys()
    assert same(before, state.network.state_dict())
    assert same(averaged, state.average.network.state_dict())  # type: ignore[union-attr]
    assert moments == json.dumps(str(state.optimizer.state_dict()["state"]))
    assert (state.skipped_steps, state.skipped_in_a_row, state.images_seen) == (1, 1, 2 * SIZE)
    assert math.isfinite(state.since_log.means()["loss"])
    look(state, train_step(recipe, state, poisoned))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        look(state, train_step(recipe, state, poisoned))
    assert [(line["step"], line["at"]) for line in written] == [(n, n * SIZE) for n in (2, 3, 4)]
    assert written[0]["samples"] == poisoned[0].index.tolist()
    assert written[0]["not_finite"] == list(written[0]["gradient_norms"]) == learned
    assert json.dumps(written, allow_nan=False)


def test_a_spike_in_the_loss_is_counted_once_and_moves_what_is_usual_by_little() -> None:
    usual = UsualLoss()
    losses = 1 + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    for step, loss in enumerate(losses):
        usual.see(loss, step)
    assert usual.spikes.item() == 0
    torch.testing.assert_close(usual.mean, torch.tensor(1.0), rtol=0, atol=0.05)
    torch.testing.assert_close(usual.variance.sqrt(), torch.tensor(0.1), rtol=0.3, atol=0)
    usual.see(torch.tensor(5.0), 400)
    known = (usual.mean, usual.variance)
    usual.see(torch.tensor(math.nan), 401)
    assert (usual.mean, usual.variance) == known
    usual.see(torch.tensor(1.0), 402)
    assert (usual.spikes.item(), usual.last_spike_images.item()) == (1, 400)
    torch.testing.assert_close(usual.mean, torch.tensor(1.0), rtol=0, atol=0.05)
    again = UsualLoss.from_json(json.loads(json.dumps(usual.as_json())))
    for loss in (1.1, 7.0):
        usual.see(torch.tensor(loss), 403)
        again.see(torch.tensor(loss), 403)
    assert usual.as_json() == again.as_json()


def test_the_average_moves_parameters_and_running_statistics_and_copies_other_buffers() -> None:
    state = fresh()
    state.network.register_buffer("mask", torch.full((2,), -math.inf))
    average = state.average = Average(state.network, half_life_images=100)
    start = weights(average.network)
    train_step(recipe_for(state.network), state, next(batches().since(0)))
    live = state.network.state_dict()
    moved = {name for name, _ in state.network.named_parameters()}
    moved |= {"norm.running_mean", "norm.running_var"}
    for name, value in average.network.state_dict().items():
        # (1 + 0)/(10 + 0): after the first step nine tenths are new.
        expected = 0.1 * start[name] + 0.9 * live[name].float() if name in moved else live[name]
        torch.testing.assert_close(value, expected)
        assert value.dtype == expected.dtype
    assert not start["norm.running_var"].equal(average.network.norm.running_var)  # type: ignore


def test_the_average_of_a_batch_norm_after_a_linear_map_has_the_mean_of_what_it_normalises() -> (
    None
):
    # The mean of W̄·x + b̄ is the average of the means of W_k·x + b_k; momentum 1 forgets the past.
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=1.0))
    average = Average(network, half_life_images=64, warm_up=False)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    network(x)
    average.restart(network)
    for seen in range(0, 5 * SIZE, SIZE):
        with torch.no_grad():
            network[0].weight.add_(0.5 + seen)  # type: ignore[operator]
        network(x)
        average.update(network, seen, SIZE)
    linear, norm = average.network
    torch.testing.assert_close(norm.running_mean, linear(x).mean(dim=0))


def test_an_average_that_is_switched_on_starts_from_the_present_weights(tmp_path: Path) -> None:
    state = replace(fresh(), average=None)
    train(recipe_for(state.network), state, batches().since(0), [], 48)
    saved = checkpoint.save_checkpoint(state, tmp_path)
    other = fresh()
    checkpoint.load_checkpoint(other, saved)
    assert other.average
    assert same(weights(state.network), weights(other.average.network))


def batch_norm_model() -> tuple[TrainState, Recipe, Model]:
    """A state whose network normalises over the batch, after a few steps, and a model of it."""
    state = fresh()
    recipe = recipe_for(state.network)
    train(recipe, state, batches().since(0), [], 48)
    config = compose(["data.image_size=4", "data.channels=1", "sampling.steps=3"])
    denoiser = replace(recipe.denoiser, network=state.sampler.eval())
    return state, recipe, Model(config, denoiser, ("a", "b"), recipe.devices.device)


def test_evaluating_and_drawing_with_batch_norm_change_no_statistic_and_next_steps_move_them() -> (
    None
):
    state, recipe, model = batch_norm_model()
    for average in (state.average, None):
        state.average = average
        denoiser = replace(model.denoiser, network=state.sampler.eval())
        before = weights(state.network), weights(state.sampler)
        hooks.validation_loss(recipe, state, next(batches().since(640)))
        job = drawing.Job((0, 1), (0, 1), batch_size=8)
        list(drawing.draw(replace(model, denoiser=denoiser), model.config.sampling, job))
        assert same(before[0], state.network.state_dict())
        assert same(before[1], state.sampler.state_dict())
        train_step(recipe, state, next(batches().since(state.images_seen)))
        moved = state.network.state_dict()["norm.running_mean"]
        assert not before[0]["norm.running_mean"].equal(moved)


def test_an_image_drawn_with_batch_norm_does_not_depend_on_its_neighbours() -> None:
    _, _, model = batch_norm_model()

    def drawn(numbers: tuple[int, ...]) -> np.ndarray:
        job = drawing.Job(numbers, tuple(n % 2 for n in numbers), batch_size=8)
        return np.concatenate([p for _, p in drawing.draw(model, model.config.sampling, job)])

    assert (drawn((0, 1, 2, 3, 4, 5, 6, 7))[5] == drawn((5, 11, 12))[0]).all()


def test_the_average_halves_in_its_half_life() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = Average(network, half_life_images=64, warm_up=False)
    start = network.weight.item()
    with torch.no_grad():
        network.weight.fill_(start + 1)
    for seen in range(0, 64, SIZE):
        average.update(network, seen, SIZE)
    assert average.network.weight.item() == pytest.approx(start + 0.5, abs=1e-6)


def test_learning_rates_are_pure_functions_of_images() -> None:
    assert rates.constant(50, 1000, warmup_images=100) == 0.5
    assert rates.cosine(550, 1000, warmup_images=100) == pytest.approx(0.5)
    assert rates.cosine(1000, 1000) == pytest.approx(0)
    assert rates.cosine(5000, 1000, final=0.1) == pytest.approx(0.1)
    assert rates.linear(250, 1000, final=0.2) == pytest.approx(0.8)
    assert rates.step(399, 1000, every_images=200) == 0.5
    assert rates.step(5000, 1000, every_images=200) == 0.5**5


@pytest.mark.parametrize("optimizer", [adam, adamw])
def test_norms_biases_and_embeddings_do_not_decay(optimizer: object) -> None:
    network = Tiny()
    built = optimizer(parameter_groups(network), 0.1, weight_decay=0.5)  # type: ignore[operator]
    names = {id(p): name for name, p in network.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in built.param_groups for p in g["params"]}
    assert decays == {
        "conv.weight": 0.5,
        "conv.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "table.weight": 0.0,
    }


def test_the_rate_is_written_into_every_group_at_every_step() -> None:
    state = fresh()
    recipe = recipe_for(state.network, learning_rate=lambda images: images / 1000)
    train(recipe, state, batches().since(0), [], 48)
    assert {group["lr"] for group in state.optimizer.param_groups} == {0.048}


def test_hooks_come_when_their_images_pass_and_never_depend_on_the_start() -> None:
    def seen_from(start: int) -> list[int]:
        called: list[int] = []
        state = fresh()
        state.images_seen = start
        note = every(40, SIZE, lambda s, m: called.append(s.images_seen))
        assert train(recipe_for(state.network), state, batches().since(start), [note], 208) == DONE
        return called

    whole = seen_from(0)
    assert whole == [48, 80, 128, 160, 208]
    assert seen_from(96) == whole[2:]


def test_training_stops_after_so_many_checks_without_a_better_one() -> None:
    state = fresh()
    recipe = recipe_for(state.network, learning_rate=lambda images: 0.0)
    steps = batches().since(0)
    held_out = next(batches().since(640))
    state.average = None  # with weights that stand still, only the first check is better
    state.network.norm = nn.Identity()  # type: ignore[assignment]
    check = hooks.validate(recipe, held_out, lambda values, images: None)
    looks = [check, hooks.stop_when(lambda state: hooks.stopped_early(state, 3))]
    assert train(recipe, state, steps, looks, 10_000) == "no better validation loss in 3 checks"
    assert state.images_seen == 4 * SIZE


def test_losses_by_noise_level_add_up_to_the_loss() -> None:
    sums = Sums.of(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-9.0, 0.5, 0.7]).double())
    means = sums.means()
    assert means == {
        "loss": 3.0,
        "loss/half_log_snr -inf to -4": 1.0,
        "loss/half_log_snr 0 to 2": 4.0,
    }
    assert Sums.from_json(json.loads(json.dumps(sums.as_json()))).means() == means


def test_validation_is_the_same_number_every_time_and_leaves_training_alone() -> None:
    state = fresh()
    recipe = recipe_for(state.network)
    steps = batches().since(0)
    held_out = next(batches().since(640))
    train_step(recipe, state, next(steps))
    before, generator = weights(state.network), torch.get_rng_state()
    one, two = (hooks.validation_loss(recipe, state, held_out) for _ in range(2))
    assert one == two
    assert same(before, weights(state.network))
    assert generator.equal(torch.get_rng_state())


def test_a_checkpoint_brings_back_every_bit(tmp_path: Path) -> None:
    state = fresh()
    recipe = recipe_for(state.network)
    train(recipe, state, batches().since(0), [], 48)
    saved = checkpoint.save_checkpoint(state, tmp_path)
    train(recipe, state, batches().since(48), [], 96)
    other = fresh()
    checkpoint.load_checkpoint(other, saved)
    train(recipe_for(other.network), other, batches().since(48), [], 96)
    assert same(weights(state.network), weights(other.network))
    assert same(weights(state.average.network), weights(other.average.network))  # type: ignore[union-attr]
    assert same(checkpoint._optimizer_tensors(state), checkpoint._optimizer_tensors(other))


@pytest.mark.parametrize("file", ["model", "average", "optimizer"])
@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, file: str, damage: str
) -> None:
    state = fresh()
    older, newer = (save_as(state, tmp_path, step) for step in (1, 2))
    target = newer / f"{file}.safetensors"
    content = bytearray(target.read_bytes())
    content[-5] ^= 1
    {
        "flip": lambda: target.write_bytes(content),
        "cut": lambda: target.write_bytes(content[:-1]),
        "lose": target.unlink,
    }[damage]()
    told: list[str] = []
    assert committed.newest(tmp_path, told.append) == older
    assert target.name in told[0]
    assert [c.name for c in committed.checkpoints(tmp_path)] == [older.name]
    (older / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies"):
        committed.newest(tmp_path)


def save_as(state: TrainState, folder: Path, step: int) -> Path:
    state.step, state.images_seen = step, step * SIZE
    return checkpoint.save_checkpoint(state, folder)


def test_retention_keeps_the_newest_and_the_best_by_the_metric_asked_for(tmp_path: Path) -> None:
    state = fresh()
    for step, loss in enumerate([0.5, 0.1, math.nan, 0.3, 0.2]):
        state.metrics = {"validation/loss": loss, "loss": -loss}
        save_as(state, tmp_path, step)
        committed.retain(tmp_path, 2)
    kept = [int(c.name[5:]) for c in committed.checkpoints(tmp_path)]
    assert kept == [1, 3, 4]
    assert committed.best(tmp_path) == tmp_path / "step-00000001"
    assert committed.best(tmp_path, "loss") == tmp_path / "step-00000003"
    assert committed.best(tmp_path, "epoch/loss") is None


def test_a_checkpoint_that_cannot_be_removed_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def retained() -> list[str]:
        committed.retain(tmp_path, 1, told.append)
        return sorted(file.name[:19] for file in tmp_path.iterdir())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    save_as(fresh(), tmp_path, 1)
    save_as(fresh(), tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)  # a file of it is in use
        assert retained() == [".trash-step-0000000", "step-00000002"]
        patched.setattr(Path, "rename", refuse)  # it is immutable
        save_as_is(tmp_path, 3)
        assert retained() == [".trash-step-0000000", "step-00000002", "step-00000003"]
    assert len(told) == 3
    assert all("could not be removed (Device or resource busy); it is tried" in t for t in told)
    assert retained() == ["step-00000003"]


def save_as_is(folder: Path, step: int) -> None:
    """A copy of the newest checkpoint under the name of another step."""
    shutil.copytree(committed.checkpoints(folder)[-1], folder / f"step-{step:08d}")


def test_retention_keeps_the_first_after_every_multiple(tmp_path: Path) -> None:
    for step in range(12):
        save_as(fresh(), tmp_path, step)
        committed.retain(tmp_path, 1, every_images=4 * SIZE)
    assert [int(c.name[5:]) for c in committed.checkpoints(tmp_path)] == [4, 8, 11]


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = fresh()
    save_as(state, tmp_path, 1)

    def full(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(committed, "_write", full)
    wanted = r"No space left on device \([\d,]+ bytes needed, [\d,]+ free\); the one before"
    with pytest.raises(TrainingError, match=wanted):
        save_as(state, tmp_path, 2)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_that_would_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoint.snapshot(fresh())
    room = shutil.disk_usage(tmp_path)._replace(free=saved.bytes_needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    wanted = rf"\({saved.bytes_needed:,} bytes needed, {saved.bytes_needed - 1:,} free\)"
    with pytest.raises(TrainingError, match=wanted):
        checkpoint.write(saved, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["network", "average", "optimizer"])
def test_what_is_not_finite_is_never_saved(tmp_path: Path, where: str) -> None:
    state = fresh()
    train(recipe_for(state.network), state, batches().since(0), [], 32)
    assert state.average
    tensors = {
        "network": [*state.network.parameters()],
        "average": [*state.average.network.parameters()],
        "optimizer": [state.optimizer.state[next(state.network.parameters())]["exp_avg"]],
    }[where]
    with torch.no_grad():
        tensors[0].view(-1)[0] = math.nan
    with pytest.raises(TrainingError, match="is not finite after 32 images"):
        checkpoint.save_checkpoint(state, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_does_not_change_while_training_goes_on(tmp_path: Path) -> None:
    state = fresh()
    recipe = recipe_for(state.network)
    saved = checkpoint.snapshot(state)
    train(recipe, state, batches().since(0), [], 48)
    again = fresh()
    checkpoint.load_checkpoint(again, checkpoint.write(saved, tmp_path))
    assert same(weights(again.network), weights(fresh().network))
    assert again.images_seen == 0


def test_of_two_things_in_the_background_the_second_waits_and_tells_how_the_first_failed() -> None:
    background, gate, done = checkpoint.Background(), threading.Event(), []

    def first() -> None:
        gate.wait(10)
        done.append("first")
        raise TrainingError("full")

    background.start(first)
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(TrainingError, match="full"):
        background.start(lambda: done.append("second"))
    assert done == ["first"]
    background.start(lambda: done.append("third"))
    background.wait()
    assert done == ["first", "third"]


def test_labels_are_dropped_one_image_at_a_time_at_the_rate_asked_for() -> None:
    from rediffuse.training.step import _some_dropped

    recipe = recipe_for(Tiny())
    many = Batches(
        images=np.zeros((4000, 1, 1, 1), np.uint8),
        labels=np.zeros(4000, np.int64),
        seed=3,
        batch_size=4000,
    )
    batch = next(many.since(0))[0]
    dropped = _some_dropped(recipe, batch) == 2  # type: ignore[operator]
    assert abs(dropped.float().mean().item() - 0.25) < 0.02
    assert dropped[:100].equal(_some_dropped(recipe, _first(batch, 100)) == 2)  # type: ignore[arg-type]


def _first(batch: object, count: int) -> object:
    return type(batch)(*(part[:count] for part in batch))  # type: ignore
