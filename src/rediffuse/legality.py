"""Which combinations can work: asked before anything is built or written.

Every axis is tried on numbers small enough to take no time: a part that cannot work with the others
says so itself, and an infinity that nobody speaks of is found here.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rediffuse import build
from rediffuse.config.schema import Config, Sampling
from rediffuse.data.pixels import Level, pixel_range, to_model
from rediffuse.denoiser import Denoiser
from rediffuse.errors import ConfigError
from rediffuse.guidance import apart
from rediffuse.losses import Noised
from rediffuse.process import Schedule, diffuse
from rediffuse.targets import check_target
from rediffuse.training.memory import free_bytes


def check(config: Config, trusted: Sequence[str] | None = None) -> None:
    """Refuse, before anything is built or written, what can be known to fail.

    Raises:
        ConfigError: naming the key, what was given and what would work.
    """
    of = partial(build.bind, trusted=trusted)
    to_model(torch.zeros(1, config.data.channels, 1, 1, dtype=torch.uint8), *_levels(config))
    network = build.empty_network(config, num_classes=2, trusted=trusted)
    _check_size(network)
    clock = build.schedule(config, trusted)
    check_target(of("target", config.target, "target"), clock, config.target.name)
    _check_input_scale(config, clock)
    denoiser = replace(build.denoiser(config, network, trusted), network=_Nothing(config))
    _check_training(config, denoiser, of, trusted)
    of("optimizer", config.optimizer, "optimizer")
    build.rate(config, trusted)(0)
    of("data", config.data.source, "data")
    check_sampling(config, config.sampling, clock, trusted)


def check_new(config: Config, trusted: Sequence[str] | None = None) -> None:
    """Refuse what no new run should begin with, though a run that has begun with it can go on.

    Raises:
        ConfigError: if the data has more than one standard deviation.
    """
    said = {} if config.sigma_data is None else {"sigma_data": config.sigma_data}
    for axis, part in (("target", config.target), ("weighting", config.weighting)):
        takes = inspect.signature(build.bind(axis, part, axis, trusted)).parameters
        if "sigma_data" in takes:
            said[f"{axis}.sigma_data"] = takes["sigma_data"].default
    if len(set(said.values())) > 1:
        given = ", ".join(f"{key}={value:g}" for key, value in said.items())
        one = config.sigma_data or said["target.sigma_data"]
        raise ConfigError(
            f"{given}: these are one number, the standard deviation of the data; set "
            f"{' '.join(f'{key}={one:g}' for key in said)}"
        )


def check_sampling(
    config: Config, how: Sampling, schedule: Schedule, trusted: Sequence[str] | None = None
) -> None:
    """Walk a few steps of the grid with the solver, guided and held in range, on one pixel.

    Raises:
        ConfigError: if they do not go together, or the walk does not end on a number.
    """
    if not 1 <= how.steps <= _MOST_STEPS:
        raise ConfigError(f"sampling.steps={how.steps}: expected 1 to {_MOST_STEPS:,} steps")
    solver, grid = build.solver(how.solver, trusted), build.grid(how.grid, trusted)
    grid(schedule, how.steps)
    times = grid(schedule, min(how.steps, _FEW_STEPS))
    target = build.bind("target", config.target, "target", trusted)
    denoiser = Denoiser(_Nothing(config), schedule, target, config.sigma_data)
    guided = build.bind("guidance", how.guidance, "sampling.guidance", trusted)
    threshold = build.bind("threshold", how.threshold, "sampling.threshold", trusted)
    low, high = pixel_range(config.data.mean, config.data.std)
    denoise = threshold(guided(apart(denoiser, denoiser), schedule), schedule, low=low, high=high)
    x = torch.ones(8, config.data.channels, 1, 1) * schedule(times[0]).sigma.float()
    with torch.inference_mode():
        *_, x = solver(denoise, schedule, x, times, torch.ones_like)
    if not x.isfinite().all():
        raise ConfigError(
            f"sampling.solver={how.solver.name} does not end on a number on this schedule with "
            f"sampling.grid={how.grid.name}; use sampling.grid=trailing or another solver"
        )


_FEW_STEPS, _MOST_STEPS, _MOST_IMAGES = 5, 100_000, 1_000_000


# The bound does not depend on a schedule between its ends; every other loss does.
_HONEST = {"weighting": ("vlb",), "objective": ("simple",), "times": ("uniform", "loss_aware")}


def _check_training(
    config: Config, denoiser: Denoiser, of: Callable[..., Any], trusted: Sequence[str] | None
) -> None:
    """Draw times, weigh them, and measure the objective at both ends of the clock."""
    clock = denoiser.schedule
    if config.training.batch_size > _MOST_IMAGES:
        raise ConfigError(
            f"training.batch_size={config.training.batch_size}: expected at most {_MOST_IMAGES:,}"
        )
    count = config.training.batch_size // config.training.accumulation
    micro_batch = torch.zeros(count or 1, 1)  # 0: still to be found
    of("pairing", config.pairing, "pairing")(micro_batch, lambda k: micro_batch)
    weighting = of("weighting", config.weighting, "weighting")
    for axis, (honest, *others) in _HONEST.items() if isinstance(clock, nn.Module) else ():
        if (name := getattr(config, axis).name) not in (honest, *others):
            raise ConfigError(
                f"schedule '{config.schedule.name}' learns, which needs {axis}={honest}: with "
                f"{axis}={name} it would make the loss small by hiding noise levels"
            )
    u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    drawn = of("times", config.times, "times")(clock, u)
    t = torch.cat((drawn, torch.tensor([clock.t_min, clock.t_max], dtype=torch.float64)))
    weights = weighting(clock, t, denoiser.target).detach()
    if bad := [f"{at:g}" for at in t[~weights.isfinite()].tolist()]:
        raise ConfigError(
            f"weighting '{config.weighting.name}' is not finite at t = {', '.join(bad)} of "
            f"schedule '{config.schedule.name}' with target '{config.target.name}'; use "
            "weighting=unit or min_snr, or another target"
        )
    x_0 = torch.zeros(len(t), config.data.channels, 1, 1)
    noised = Noised(x_0, torch.ones_like(x_0), diffuse(clock, x_0, torch.ones_like(x_0), t), t)
    losses = build.objective(config, trusted)(denoiser, weighting, noised)
    said: Tensor = denoiser.network.said  # type: ignore[assignment]
    (slope,) = torch.autograd.grad(losses.sum(), said, allow_unused=True, materialize_grads=True)
    if config.learned_variance and not slope.chunk(2, dim=1)[1].any():
        raise ConfigError(
            f"learned_variance=true: objective '{config.objective.name}' teaches no variance; use "
            "objective=hybrid or bound"
        )


def _check_input_scale(config: Config, clock: Schedule) -> None:
    loudest = clock(torch.tensor(clock.t_max, dtype=torch.float64))
    if config.sigma_data is None and loudest.alpha**2 + loudest.sigma**2 > 2:
        raise ConfigError(
            f"schedule '{config.schedule.name}' reaches σ = {loudest.sigma.item():g}, too loud for "
            "a network; set sigma_data to the images' standard deviation (0.5 for [-1, 1])"
        )


def _check_size(network: nn.Module) -> None:
    """Refuse, before it is made, a network whose weights alone do not fit into memory."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    needed, free = 4 * parameters, free_bytes(torch.device("cpu"))
    if needed > free:
        raise ConfigError(
            f"model: {parameters:,} parameters take {needed / 1e9:,.1f} GB for the weights alone, "
            f"and {free / 1e9:,.1f} GB of memory are free; use a smaller network"
        )


def _levels(config: Config) -> tuple[Level, Level]:
    return config.data.mean, config.data.std


class _Nothing(nn.Module):
    """A network that answers 0 to everything, in the shape that the real one would."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.channels = config.data.channels * (2 if config.learned_variance else 1)

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        """Remember what was said, so that it can be asked what a loss would teach."""
        self.said = x.new_zeros(len(x), self.channels, *x.shape[2:]).requires_grad_()
        return self.said
