"""Rediffuse's own step and evaluation, with nothing but torch below them."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from benchmarks.measure import Work
from benchmarks.sizes import Size
from rediffuse.data.batches import Batch, Batches
from rediffuse.denoiser import Denoiser
from rediffuse.losses import simple
from rediffuse.networks.replay import Replay
from rediffuse.randomness import normal
from rediffuse.schedules.cosine import cosine
from rediffuse.targets import eps
from rediffuse.times import uniform
from rediffuse.training.average import Average
from rediffuse.training.compiling import compile_network, compile_noise
from rediffuse.training.devices import PRECISIONS, Devices, keep_freed_memory, set_determinism
from rediffuse.training.optimizers import adamw, parameter_groups
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe, train_step
from rediffuse.weightings import unit


def pixels(size: Size, images: int = 2048) -> np.ndarray:
    """Random pixels: time does not depend on what they show."""
    shape = images, size.channels, size.image_size, size.image_size
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def training(
    size: Size,
    precision: str,
    device: torch.device,
    *,
    compiled: bool = False,
    determinism: str = "auto",
) -> tuple[TrainState, Recipe, Iterator[list[Batch]]]:
    """What `rediffuse train` would train with for this size: state, recipe, and the steps."""
    keep_freed_memory()
    set_determinism(determinism, device, None, compiled=compiled)
    network = _network(size, device, compiled, replayed=True)
    state = TrainState(
        network, adamw(parameter_groups(network), 1e-4), Average(network, half_life_images=50_000)
    )
    recipe = Recipe(
        denoiser=Denoiser(network, cosine(), eps),
        objective=simple,
        weighting=unit,
        times=uniform,
        seed=0,
        batch_size=size.batch_size,
        learning_rate=lambda images: 1e-4,
        devices=Devices(device),
        precision=PRECISIONS[precision],
        normal=compile_noise(device) if compiled else normal,
    )
    steps = Batches(
        images=pixels(size),
        seed=0,
        batch_size=size.batch_size,
        device=device,
        on_device=device.type != "cpu",
        workers=1,
    ).since(0)
    return state, recipe, steps


def train(
    size: Size,
    precision: str,
    device: torch.device,
    *,
    compiled: bool = False,
    determinism: str = "auto",
) -> Work:
    """One step after another: data, noise, loss, gradients, clipping, AdamW and average."""
    state, recipe, steps = training(
        size, precision, device, compiled=compiled, determinism=determinism
    )

    def step() -> None:
        train_step(recipe, state, next(steps))

    return step


def evaluate(
    size: Size,
    precision: str,
    device: torch.device,
    *,
    compiled: bool = False,
    determinism: str = "auto",
) -> Work:
    """One denoising evaluation of a batch, as a solver asks for it."""
    keep_freed_memory()
    set_determinism(determinism, device, None, compiled=compiled)
    network = _network(size, device, compiled).eval()
    if device.type == "cuda":
        network = Replay(network)
    denoiser, dtype = Denoiser(network, cosine(), eps), PRECISIONS[precision]
    shape = size.batch_size, size.channels, size.image_size, size.image_size
    x = torch.randn(shape, device=device)
    t = torch.tensor(500.0, dtype=torch.float64)

    def once() -> None:
        enabled = dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=enabled):
            denoiser(x, t)

    return once


def _network(
    size: Size, device: torch.device, compiled: bool, *, replayed: bool = False
) -> nn.Module:
    network = size.ours().to(device)
    if compiled:
        compile_network(network, device, replayed=replayed)
    return network
