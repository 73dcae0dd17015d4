"""A training step never waits for the device that it runs on (tests/far.py stands in for a GPU)."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from far import FAR, Far, Waited, far_away
from torch import Tensor

from rediffuse.data.batches import Batch, Batches
from rediffuse.denoiser import Denoiser
from rediffuse.losses import simple
from rediffuse.networks.norms import Norm, batch, group
from rediffuse.networks.unet import UNet
from rediffuse.schedules.discrete import linear
from rediffuse.targets import v
from rediffuse.times import uniform_steps
from rediffuse.training.average import Average
from rediffuse.training.devices import Devices
from rediffuse.training.hooks import NonFinite
from rediffuse.training.optimizers import adamw, parameter_groups
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe, train_step
from rediffuse.weightings import min_snr

CPU, SIZE = torch.device("cpu"), 8


def groups(channels: int) -> torch.nn.Module:
    return group(channels, groups=4)


def made(device: torch.device, norm: Norm = groups) -> tuple[TrainState, Recipe]:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same weights on both
        network = UNet(
            in_channels=1,
            out_channels=1,
            image_size=8,
            base_channels=8,
            channel_multipliers=(1, 2),
            blocks_per_level=1,
            attention_resolutions=(),
            num_classes=4,
            null_class=True,
            norm=norm,
            dropout=0.0,
        )
        for parameter in network.parameters():  # which begin as 0 in part
            torch.nn.init.normal_(parameter, std=0.1)
    for name, parameter in list(network.named_parameters()):
        place = network.get_submodule(name.rpartition(".")[0])
        there = torch.nn.Parameter(Far(parameter.data) if device == FAR else parameter.data)
        setattr(place, name.rpartition(".")[2], there)
    for name, buffer in list(network.named_buffers()):
        place = network.get_submodule(name.rpartition(".")[0])
        place.register_buffer(name.rpartition(".")[2], Far(buffer) if device == FAR else buffer)
    state = TrainState(
        network, adamw(parameter_groups(network), 1e-3), Average(network, half_life_images=100)
    )
    recipe = Recipe(
        denoiser=Denoiser(network, linear(steps=100), v),
        objective=simple,
        weighting=min_snr,
        times=uniform_steps,
        seed=0,
        batch_size=SIZE,
        learning_rate=lambda images: 1e-3,
        devices=Devices(device),
        clip_norm=0.1,
        label_dropout=0.5,
        null_class=4,
        time_strata=2,
        offset_noise=0.1,
    )
    return state, recipe


def steps(device: torch.device) -> Iterator[list[Batch]]:
    images = np.random.default_rng(0).integers(0, 256, (32, 1, 8, 8), dtype=np.uint8)
    return Batches(
        images=images,
        labels=np.arange(32) % 4,
        seed=0,
        batch_size=SIZE,
        micro_batches=2,
        flip=True,
        mean=[0.4],
        std=[0.5],
        device=device,
    ).since(0)


def trained(device: torch.device, count: int, poisoned: int | None = None) -> TrainState:
    """The state after so many steps, with a value that is not finite in one of them."""
    state, recipe = made(device)
    batches = steps(device)
    for number in range(count):
        step = next(batches)
        if number == poisoned:
            step[0] = step[0]._replace(x_0=step[0].x_0 * float("nan"))
        metrics = train_step(recipe, state, step)
        assert metrics["finite"].device == device
    return state


def values(state: TrainState) -> dict[str, Tensor]:
    """Everything that a step changes, on the CPU."""
    assert state.average
    found = dict(state.network.named_parameters("weights"))
    found |= state.network.named_buffers("weights")
    found |= state.average.network.named_parameters("average")
    found |= state.average.network.named_buffers("average")
    for index, moments in state.optimizer.state_dict()["state"].items():
        found |= {f"{index} {name}": moment for name, moment in moments.items()}
    found |= {name: getattr(state.since_log, name) for name in ("loss", "bin_loss", "bin_images")}
    found |= {"skipped": state.skipped_steps, "in a row": state.skipped_in_a_row}
    return {name: getattr(value, "near", value).detach() for name, value in found.items()}


@pytest.mark.parametrize("poisoned", [None, 1, 2])
def test_a_step_asks_its_device_nothing_and_leaves_what_a_cpu_leaves(
    poisoned: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(trained(CPU, 3, poisoned))
    with far_away(monkeypatch):
        found = values(trained(FAR, 3, poisoned))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Convolutions add up in another order there; a step moves weights by 1e-3, 100 x as far.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert expected["skipped"] == (poisoned is not None)
    assert expected["in a row"] == (poisoned == 2)


def test_a_skipped_step_moves_no_running_statistic_of_a_device_that_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[dict[str, Tensor]] = []
    with far_away(monkeypatch):
        state, recipe = made(FAR, batch)
        for number, step in zip(range(3), steps(FAR), strict=False):
            if number == 1:
                step[0] = step[0]._replace(x_0=step[0].x_0 * float("nan"))
            train_step(recipe, state, step)
            found.append({name: value.clone() for name, value in values(state).items()})
    first, skipped, last = found
    assert {n for n in first if not first[n].equal(skipped[n])} == {"skipped", "in a row"}
    statistics = [n for n in first if "running_" in n or "num_batches" in n]
    assert any(n.startswith("average") for n in statistics)
    assert not any(skipped[n].equal(last[n]) for n in statistics)


def test_skipped_steps_are_read_together_from_a_device_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[int] = []
    look = NonFinite(lambda values, images: written.append(values["step"]), limit=9, due=3)
    with far_away(monkeypatch):
        state, recipe = made(FAR)
        batches = steps(FAR)
        for number in range(4):
            step = next(batches)
            if number in (0, 3):
                step[0] = step[0]._replace(x_0=step[0].x_0 * float("inf"))
            metrics = train_step(recipe, state, step)
            if number < 2:
                look(state, metrics)
        with pytest.raises(Waited):  # the third one is due
            look(state, metrics)
    assert not written


def test_what_stands_in_for_a_device_notices_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with far_away(monkeypatch):
        x = torch.ones(3, device=FAR)
        for waiting in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x.cpu()):
            with pytest.raises(Waited):
                waiting()
        with pytest.raises(Waited):
            torch.ones(3).to(FAR)
        assert torch.ones(3).pin_memory().to(FAR, non_blocking=True).device == FAR
