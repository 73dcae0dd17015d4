"""What a training step tells the objective: times, noise, estimates, and what else learns."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import images
from test_engine import SIZE, Tiny, batches, recipe_for, same, weights
from torch import Tensor, nn

from rediffuse import weightings
from rediffuse.data.batches import Batch
from rediffuse.denoiser import Denoiser
from rediffuse.errors import CheckpointError
from rediffuse.losses import Noised
from rediffuse.process import diffuse
from rediffuse.randomness import Stream, normal, uniform
from rediffuse.schedules import discrete
from rediffuse.schedules.learned import learned
from rediffuse.targets import eps, x_0
from rediffuse.times import loss_aware
from rediffuse.times import uniform as evenly
from rediffuse.training import checkpoint
from rediffuse.training.average import Average
from rediffuse.training.loop import train
from rediffuse.training.optimizers import adamw, parameter_groups
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe, batch_losses, train_step

BATCH = Batch(torch.arange(32, 48), images(16, 1, 4, 4, seed=4).float(), torch.arange(16) % 2)


def told(**changes: object) -> Noised:
    """What the objective is told about one batch."""
    seen: list[Noised] = []

    def objective(denoiser: Denoiser, weighting: object, noised: Noised) -> Tensor:
        seen.append(noised)
        return noised.x_0.flatten(1).sum(1)

    batch_losses(recipe_for(Tiny(), objective=objective, **changes), BATCH)
    return seen[0]


def drawn(stream: Stream, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    return normal(3, stream, BATCH.index, shape, draw)


def test_plain_training_diffuses_each_image_with_its_own_first_draw() -> None:
    noised = told()
    assert noised.x_0.equal(BATCH.x_0)
    assert noised.eps.equal(drawn(Stream.NOISE, (1, 4, 4)))
    assert noised.x_t.equal(diffuse(discrete.linear(), noised.x_0, noised.eps, noised.t))
    assert noised.given is None


def test_offset_noise_is_one_more_normal_number_per_channel_of_the_noise_to_be_learned() -> None:
    plain, noised = told(), told(offset_noise=0.1)
    assert noised.eps.equal(plain.eps + 0.1 * drawn(Stream.NOISE_EXTRAS, (1, 1, 1)))
    assert noised.x_t.equal(diffuse(discrete.linear(), noised.x_0, noised.eps, noised.t))


def test_input_perturbation_is_seen_and_not_asked_for() -> None:
    """Ning et al. 2023, Alg. 1: y = √ᾱ·x_0 + √(1-ᾱ)·(ε + γξ), and the target stays ε."""
    plain, noised = told(), told(input_perturbation=0.1)
    assert noised.eps.equal(plain.eps)
    shown = plain.eps + 0.1 * drawn(Stream.NOISE_EXTRAS, (1, 4, 4), draw=1)
    assert noised.x_t.equal(diffuse(discrete.linear(), noised.x_0, shown, noised.t))


@pytest.mark.parametrize("strata", [4, 16])
def test_strata_put_one_time_into_each_part_of_the_clock(strata: int) -> None:
    """Each number by itself stays uniform: its block is shifted by one."""
    t = told(times=evenly, time_strata=strata, denoiser=cosine_denoiser()).t
    u = (t - 0.01) / (1 - 0.01)
    for block in u.split(strata):
        parts = (block.sort().values * strata).floor()
        assert parts.tolist() == list(range(strata))
        gaps = block.sort().values.diff()
        assert gaps.tolist() == pytest.approx([1 / strata] * (strata - 1), abs=1e-9)
    first = uniform(3, Stream.TIME, BATCH.index[::strata] // strata, 1)[:, 0]
    assert u[::strata].tolist() == pytest.approx(first.tolist(), abs=1e-9)


def cosine_denoiser() -> Denoiser:
    class Clock:
        t_min, t_max = 0.01, 1.0

        def __call__(self, t: Tensor):  # type: ignore[no-untyped-def]
            return discrete.linear()(1000 * t)

        def time(self, half_log_snr: Tensor) -> Tensor:
            raise NotImplementedError

        def snap(self, t: Tensor) -> Tensor:
            return t

        def label(self, t: Tensor) -> Tensor:
            return t

    return Denoiser(Tiny(), Clock(), eps)


class TwoChannels(nn.Module):
    """A network that is shown an estimate beside the image, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        self.shown.append(x)
        return self.conv(x)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_self_conditioned_network_is_shown_its_own_estimate_for_a_share_of_images(
    share: float,
) -> None:
    network = TwoChannels()
    held = (torch.tensor(-1.0), torch.tensor(1.0))
    denoiser = Denoiser(network, discrete.linear(), eps, estimate_range=held)
    noised = told(denoiser=denoiser, self_conditioning=share)
    assert noised.given is not None
    assert not noised.given.requires_grad
    guess = denoiser(noised.x_t, noised.t).x_0
    chosen = uniform(3, Stream.SELF_CONDITIONING, BATCH.index, 1)[:, 0] < share
    assert noised.given[chosen].equal(guess[chosen])
    assert (noised.given[~chosen] == 0).all()
    assert (~chosen).any() == (share < 1)
    network.shown.clear()
    denoiser(noised.x_t, noised.t, given=noised.given)
    assert network.shown[0][:, 1:].equal(noised.given.clamp(-1, 1))


# What learns beside the network


def with_learned(times: nn.Module | None = None, weighting: nn.Module | None = None) -> TrainState:
    torch.manual_seed(0)
    network = Tiny()
    network.norm = nn.Identity()  # whose statistics would be those of a micro-batch
    parts = {"times": times, "weighting": weighting}
    extra = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
    optimizer = adamw(parameter_groups(network, extra), 1.0)
    return TrainState(network, optimizer, Average(network, half_life_images=100), learned=extra)


def test_loss_aware_times_see_every_loss_of_a_step_in_order_however_it_is_cut() -> None:
    histories = []
    for pieces in (1, 2, 4):
        times = loss_aware(bins=4, history=2)
        state = with_learned(times)
        recipe = recipe_for(state.network, times=times)
        train(recipe, state, batches(pieces).since(0), [], 96)
        histories.append({n: value.clone() for n, value in times.state_dict().items()})
    for other in histories[1:]:
        for name, value in histories[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


def test_loss_aware_times_go_on_from_a_checkpoint_to_the_last_bit(tmp_path: Path) -> None:
    def begun() -> tuple[TrainState, Recipe]:
        times = loss_aware(bins=4, history=2)
        state = with_learned(times)
        return state, recipe_for(state.network, times=times)

    whole, recipe = begun()
    train(recipe, whole, batches().since(0), [], 160)
    half, recipe = begun()
    train(recipe, half, batches().since(0), [], 80)
    saved = checkpoint.save_checkpoint(half, tmp_path)
    again, recipe = begun()
    checkpoint.load_checkpoint(again, saved)
    train(recipe, again, batches().since(80), [], 160)
    assert same(weights(whole.network), weights(again.network))
    assert same(weights(whole.learned), weights(again.learned))


@pytest.mark.usefixtures("unchecked")
def test_a_learned_weighting_moves_towards_minus_log_of_the_loss() -> None:
    """w·L - ln w is least at w = 1/L (Karras et al. 2024, Eq. 14-15)."""
    weighting = weightings.uncertainty(channels=8)
    state = with_learned(weighting=weighting)
    for p in state.network.parameters():
        p.requires_grad_(False)
        p.grad = torch.zeros_like(p)
    t = torch.tensor([500.0], dtype=torch.float64)
    recipe = recipe_for(
        state.network, weighting=weighting, learning_rate=lambda images: 3e-2, clip_norm=None
    )
    before = weighting(discrete.linear(), t, eps).item()
    train(recipe, state, batches().since(0), [], SIZE * 200)
    losses = []
    for batch in next(batches().since(0)):
        plain = replace(recipe, weighting=weightings.unit)
        losses += batch_losses(plain, batch)[0].tolist()
    after = weighting(discrete.linear(), t, eps).item()
    assert before == pytest.approx(1)
    assert after == pytest.approx(1 / np.mean(losses), rel=0.35)  # 16 images are what is known


@pytest.mark.usefixtures("unchecked")
def test_a_learned_schedule_makes_the_losses_more_even_and_leaves_its_ends() -> None:
    """Kingma et al. 2021, App. H: its gradient is that of the loss' variance."""
    torch.manual_seed(0)
    schedule = learned(max_log_snr=3.0, min_log_snr=-3.0)
    network = Tiny()
    network.norm = nn.Identity()
    for p in network.parameters():
        nn.init.zeros_(p).requires_grad_(p is network.conv.bias)
    extra = nn.ModuleDict({"schedule": schedule})
    state = TrainState(network, adamw(parameter_groups(network, extra), 1.0), learned=extra)
    recipe = recipe_for(
        network,
        denoiser=Denoiser(network, schedule, x_0),  # 0 for x_0: losses go as -dSNR/dt
        weighting=weightings.vlb,
        times=evenly,
        learning_rate=lambda images: 3e-2,
        clip_norm=None,
    )
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    before, spread_before = schedule(ends).half_log_snr.detach(), spread(recipe)
    train(recipe, state, batches().since(0), [], SIZE * 400)
    torch.testing.assert_close(schedule(ends).half_log_snr.detach(), before, rtol=1e-9, atol=1e-9)
    assert spread(recipe) < 0.7 * spread_before


def spread(recipe: Recipe) -> float:
    """The relative standard deviation of the loss over times."""
    steps = batches().since(10_000)
    losses = torch.cat([batch_losses(recipe, next(steps)[0])[0].detach() for _ in range(20)])
    return (losses.std() / losses.mean()).item()


def test_a_checkpoint_without_what_was_learned_is_refused(tmp_path: Path) -> None:
    plain = with_learned()
    saved = checkpoint.save_checkpoint(plain, tmp_path)
    assert "learned.safetensors" not in json.loads((saved / "manifest.json").read_text())["files"]
    with pytest.raises(CheckpointError, match=r"learned\.safetensors is not in its manifest"):
        checkpoint.load_checkpoint(with_learned(loss_aware(bins=4)), saved)


def test_a_step_without_finite_gradients_teaches_the_times_nothing() -> None:
    times = loss_aware(bins=4, history=2)
    state = with_learned(times)
    recipe = recipe_for(state.network, times=times)
    batch = next(batches().since(0))[0]
    batch.x_0[0, 0, 0, 0] = torch.nan
    before = weights(times)
    train_step(recipe, state, [batch])
    assert same(before, weights(times))
    assert state.skipped_steps == 1
