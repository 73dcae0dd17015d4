"""Where a solver stops: [steps + 1] times in float64, decreasing, from t_max to data (t = 0)."""

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Schedule
from rediffuse.ranges import Positive

Grid = Callable[[Schedule, int], Tensor]
Stops = Float64[Tensor, " stops"]

_ALIGNED = 14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029


def trailing(schedule: Schedule, steps: int) -> Stops:
    """Even steps of the clock that end on data (Lin et al. 2023, Table 2, "trailing")."""
    return _settled(schedule, torch.linspace(schedule.t_max, 0, steps + 1, dtype=torch.float64))


def uniform(schedule: Schedule, steps: int) -> Stops:
    """Even steps of the clock down to t_min, then data: how Song et al. 2021b sample their SDEs."""
    if schedule.t_min <= 0:
        raise ConfigError(
            "grid 'uniform' stops at t_min before it goes to data, and here t_min = 0 is data "
            "itself; use grid=trailing, which is even down to t = 0"
        )
    ends = schedule.t_max, schedule.t_min
    return _settled(schedule, _then_data(torch.linspace(*ends, steps, dtype=torch.float64)))


def quadratic(schedule: Schedule, steps: int) -> Stops:
    """t = t_max·(i/steps)² for i = steps .. 0 (Song et al. 2021a, DDIM, App. D.2, "quadratic").

    Where that would pass t_min, √t goes in even steps down to t_min instead, and then to data.
    """
    first, last = schedule.t_max, max(schedule.t_min, schedule.t_max / steps**2)
    times = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    times[0], times[-1] = first, last  # to the last digit
    return _settled(schedule, _then_data(times))


def karras(schedule: Schedule, steps: int, *, rho: Positive = 7.0) -> Stops:
    """(σ/α)^(1/ρ) in even steps, then data (Karras et al. 2022, Eq. 5)."""
    if rho <= 0:
        raise ConfigError(f"grid 'karras' needs a rho above 0, not {rho:g}")
    first, last = (-_ends(schedule, "karras")).exp()
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    ratio = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    return _at_half_log_snr(schedule, -ratio.log())


def log_snr(schedule: Schedule, steps: int) -> Stops:
    """ln(α/σ) in even steps, then data (Lu et al. 2022, Sec. 3.3).

    Even in ln(σ/α) is the same: what is called "exponential" where σ is the clock.
    """
    first, last = _ends(schedule, "log_snr").tolist()
    return _at_half_log_snr(schedule, torch.linspace(first, last, steps, dtype=torch.float64))


def stops(schedule: Schedule, steps: int, *, ratios: tuple[Positive, ...] = _ALIGNED) -> Stops:
    """Stops at these σ/α, the last of them taken for data (Sabour et al. 2024, Align Your Steps).

    The first is moved to t_max; for another number of steps ln(σ/α) is interpolated linearly. The
    default is what the authors found for Stable Diffusion, whose schedule is `scaled_linear`.
    """
    asked = torch.tensor(ratios, dtype=torch.float64)
    noisiest = schedule(torch.tensor(schedule.t_max, dtype=torch.float64)).half_log_snr.neg().exp()
    lawful = len(asked) > 1 and asked.diff().lt(0).all() and asked.gt(0).all()
    if not lawful or asked[1] >= noisiest:
        raise ConfigError(
            f"grid 'stops' needs two or more falling ratios σ/α above 0, from the second on below "
            f"{noisiest.item():g}, where this schedule ends, not {list(ratios)}"
        )
    if noisiest.isfinite():
        asked[0] = noisiest.detach()
    place = torch.linspace(0, len(asked) - 1, steps + 1, dtype=torch.float64)[:-1]
    after = place.floor().long() + 1
    part = place + 1 - after
    times = schedule.time(-torch.lerp(asked.log()[after - 1], asked.log()[after], part))
    times[0] = schedule.t_max
    return _settled(schedule, _then_data(times.clamp(schedule.t_min, schedule.t_max)))


def _ends(schedule: Schedule, name: str) -> Tensor:
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    half_log_snr = schedule(ends).half_log_snr.detach()
    if (without := half_log_snr.isinf()).any():
        what = "α = 0" if without[0] else "σ = 0"
        raise ConfigError(
            f"grid '{name}' walks in log-SNR, which is infinite at t = {ends[without][0]:g} of "
            f"this schedule ({what}); use grid=trailing"
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
    if not known.equal(known.round()):
        raise ConfigError(
            f"{steps} sampling steps of this grid do not all lie between t = {schedule.t_max:g} "
            f"and {schedule.t_min:g}, where the schedule was trained; use fewer, or grid=uniform"
        )
    if steps > schedule.t_max:
        raise ConfigError(f"{steps} sampling steps on a schedule of {schedule.t_max:g}; use fewer")
    # Whole steps that fell on one another: push up from data, then down from the noise, one apart.
    rank = torch.arange(steps, dtype=torch.float64)
    up = (known.flip(0) - rank).cummax(0).values + rank
    return _then_data(torch.minimum(up, schedule.t_max - (steps - 1) + rank).flip(0))
