"""Where a solver stops: [steps + 1] times in float64, decreasing, from t_max to data (t = 0)."""

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Schedule

Grid = Callable[[Schedule, int], Tensor]
Stops = Float64[Tensor, " stops"]


def trailing(schedule: Schedule, steps: int) -> Stops:
    """Even steps of the clock that end on data (Lin et al. 2023, Table 2, "trailing")."""
    return _settled(schedule, torch.linspace(schedule.t_max, 0, steps + 1, dtype=torch.float64))


def karras(schedule: Schedule, steps: int, *, rho: float = 7.0) -> Stops:
    """(σ/α)^(1/ρ) in even steps, then data (Karras et al. 2022, Eq. 5)."""
    first, last = (-_ends(schedule, "karras")).exp()
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    ratio = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    return _at_half_log_snr(schedule, -ratio.log())


def log_snr(schedule: Schedule, steps: int) -> Stops:
    """ln(α/σ) in even steps, then data (Lu et al. 2022, Sec. 3.3)."""
    first, last = _ends(schedule, "log_snr").tolist()
    return _at_half_log_snr(schedule, torch.linspace(first, last, steps, dtype=torch.float64))


def _ends(schedule: Schedule, name: str) -> Tensor:
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    half_log_snr = schedule(ends).half_log_snr
    if half_log_snr.isinf().any():
        raise ConfigError(
            f"grid '{name}' walks in log-SNR, which is infinite at t = {schedule.t_max:g} of this "
            "schedule (α = 0); use grid=trailing"
        )
    return half_log_snr


def _at_half_log_snr(schedule: Schedule, half_log_snr: Tensor) -> Tensor:
    """Read the clock at each λ, then data; the ends are exact, as solvers ask if s >= t_min."""
    times = schedule.time(half_log_snr)
    times[-1] = schedule.t_min
    times[0] = schedule.t_max  # afterwards: a grid of one step starts at the noise
    return _settled(schedule, _then_data(times))


def _then_data(times: Tensor) -> Tensor:
    return torch.cat((times, times.new_zeros(1)))


def _settled(schedule: Schedule, times: Tensor) -> Tensor:
    """Move every stop but data to a time the network knows, and keep neighbours apart."""
    asked, steps = times[:-1], len(times) - 1
    known = schedule.snap(asked)
    if known.diff().lt(0).all():
        return _then_data(known)
    if steps > schedule.t_max:
        raise ConfigError(f"{steps} sampling steps on a schedule of {schedule.t_max:g}; use fewer")
    # Whole steps that fell on one another: push up from data, then down from the noise, one apart.
    rank = torch.arange(steps, dtype=torch.float64)
    up = (known.flip(0) - rank).cummax(0).values + rank
    return _then_data(torch.minimum(up, schedule.t_max - (steps - 1) + rank).flip(0))
