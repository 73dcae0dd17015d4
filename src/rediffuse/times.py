"""How training draws t: from uniform numbers in [0, 1), so that times are keyed too."""

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Schedule

Times = Callable[[Schedule, Tensor], Tensor]
Uniform = Float64[Tensor, " batch"]


def uniform_steps(schedule: Schedule, u: Uniform) -> Uniform:
    """Every step 1 .. T of a discrete chain equally often (Ho et al. 2020, Alg. 1).

    Raises:
        ConfigError: if the schedule's clock does not go in steps.
    """
    if schedule.t_max <= 1 or schedule.snap(torch.tensor(schedule.t_max - 0.25)) != schedule.t_max:
        raise ConfigError(
            "times 'uniform_steps' draws whole steps, and this schedule's clock has none; "
            "use times=uniform, logit_normal or log_normal"
        )
    return schedule.snap((u * schedule.t_max).floor() + 1)


def uniform(schedule: Schedule, u: Uniform) -> Uniform:
    """Every time of the clock equally often (Song et al. 2021; Lipman et al. 2023)."""
    return schedule.snap(schedule.t_min + u * (schedule.t_max - schedule.t_min))


def log_normal(schedule: Schedule, u: Uniform, *, mean: float = -1.2, std: float = 1.2) -> Uniform:
    """ln(σ/α) ~ N(-1.2, 1.2²) (Karras et al. 2022, Table 1)."""
    return schedule.snap(schedule.time(-(mean + std * _standard_normal(u))))


def logit_normal(schedule: Schedule, u: Uniform, *, mean: float = 0.0, std: float = 1.0) -> Uniform:
    """logit(t/t_max) ~ N(0, 1): the middle of the path more often (Esser et al. 2024, Eq. 19)."""
    return schedule.snap(torch.sigmoid(mean + std * _standard_normal(u)) * schedule.t_max)


def _standard_normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp(min=2**-54))  # u = 0 would be -inf
