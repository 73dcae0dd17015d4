"""What a run will take, told before it begins: size, memory, speed, time and room."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from rediffuse import build, runs
from rediffuse.config.schema import Config
from rediffuse.images import Images, prepare
from rediffuse.launch import batches_of, few, fresh, settled
from rediffuse.legality import check, check_new
from rediffuse.lengths import planned_images
from rediffuse.processes import alone
from rediffuse.progress import Progress
from rediffuse.training import checkpoint, memory
from rediffuse.training.devices import choose
from rediffuse.training.memory import free_bytes
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe, train_step

Facts = dict[str, Any]

MEASURED_S = 10.0
"""How long `plan` may train to measure, after the first two steps."""


def plan(
    config: Config, *, root: Path | None = None, trusted: Sequence[str] | None = None
) -> Facts:
    """Build the run, take a few steps, and tell what all of it will take; nothing is kept.

    The images are packed, as for training.

    Raises:
        RediffuseError: if the configuration or the images cannot work.
    """
    alone("plan")
    check(config, trusted)
    check_new(config, trusted)
    home = runs.runs_root(root)
    devices = choose(config.device)
    images = prepare(config.data, home, trusted)
    config = settled(config, images, devices, trusted)
    memory.give_back()
    before, free = memory.resident(devices.device), free_bytes(devices.device)
    state, recipe = fresh(config, images, devices, trusted)
    wanted = memory.estimated(state, recipe, few(images, devices, 2))
    rate, first, peak = _measured(config, images, state, recipe, before)
    images_planned = planned_images(config, images.per_epoch)
    forward = forward_flops(config, len(images.class_names), trusted)
    micro = config.training.batch_size // config.training.accumulation // devices.ranks
    kept = _checkpoint_bytes(state)
    every = config.training.keep_every_images
    count = config.training.keep_checkpoints + 2 + (images_planned // every if every else 0)
    return {
        "parameters": sum(p.numel() for p in state.network.parameters()),
        "device": _named(devices.device),
        "GFLOP_per_image": {"forward": forward / 1e9, "training": 3 * forward / 1e9},
        "batch": {"images": config.training.batch_size, "at_once": micro},
        "memory_MB": {
            "lasting": wanted.lasting / 1e6,
            "per_image": wanted.each / 1e6,
            "estimated": wanted.total(micro) / 1e6,
            "measured": peak / 1e6,
            "free": free / 1e6,
        },
        "speed": {
            "images_per_s": rate,
            "GFLOP_per_s": rate * 3 * forward / 1e9,
            "first_step_s": first,
        },
        "length": {
            "images": images_planned,
            "epochs": images_planned / images.per_epoch,
            "hours": images_planned / rate / 3600,
        },
        "disk_MB": {
            "checkpoint": kept / 1e6,
            "checkpoints_at_most": count * kept / 1e6,
            "packed_images": sum(p.images.nbytes for p in images.packed.parts.values()) / 1e6,
        },
    }


def forward_flops(config: Config, num_classes: int, trusted: Sequence[str] | None = None) -> int:
    """FLOPs of the network for one image, 2 for a multiplication with its addition."""
    network = build.empty_network(config, num_classes, trusted).eval()
    with torch.device("meta"):
        size, channels = config.data.image_size, config.data.channels
        x = torch.empty(1, channels * (2 if config.training.self_conditioning else 1), size, size)
        cond = torch.zeros(1, dtype=torch.int64) if num_classes else None
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            network(x, torch.empty(1), cond)
    return int(counter.get_total_flops())


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def _measured(
    config: Config, images: Images, state: TrainState, recipe: Recipe, before: int
) -> tuple[float, float, int]:
    """Images a second (the median step), seconds of the first step, and the most bytes."""
    steps = batches_of(config, images, recipe.devices).since(0)
    memory.forget_peak(recipe.devices.device)
    taken: list[float] = []
    began = time.perf_counter()
    with Progress(_MOST_STEPS, "steps, or fewer,") as bar:
        while len(taken) < 3 or (sum(taken[2:]) < MEASURED_S and len(taken) < _MOST_STEPS):
            start = time.perf_counter()
            train_step(recipe, state, next(steps))["loss"].item()
            taken.append(time.perf_counter() - start)
            bar.move(len(taken))
            if len(taken) == 1:
                first = time.perf_counter() - began
    peak = memory.peak(recipe.devices.device) - before
    return config.training.batch_size / statistics.median(taken[2:]), first, peak


_MOST_STEPS = 50


def _checkpoint_bytes(state: TrainState) -> int:
    return checkpoint.snapshot(state).bytes_needed
