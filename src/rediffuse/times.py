"""How training draws t: from uniform numbers in [0, 1), so that times are keyed too."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import one_hot

from rediffuse.errors import ConfigError
from rediffuse.process import Schedule, goes_in_steps
from rediffuse.ranges import Count, Finite, Positive, PositiveFraction

Times = Callable[[Schedule, Tensor], Tensor]
Uniform = Float64[Tensor, " batch"]


def uniform_steps(schedule: Schedule, u: Uniform) -> Uniform:
    """Every step 1 .. T of a discrete chain equally often (Ho et al. 2020, Alg. 1).

    Raises:
        ConfigError: if the schedule's clock does not go in steps.
    """
    if not goes_in_steps(schedule):
        raise ConfigError(
            "times 'uniform_steps' draws whole steps, and this schedule's clock has none; "
            "use times=uniform, logit_normal or log_normal"
        )
    return _step(schedule, u)


def uniform(schedule: Schedule, u: Uniform) -> Uniform:
    """Every time of the clock equally often (Song et al. 2021; Lipman et al. 2023).

    On a chain that is every step, as `uniform_steps` draws them.
    """
    if goes_in_steps(schedule):
        return _step(schedule, u)
    return schedule.snap(schedule.t_min + u * (schedule.t_max - schedule.t_min))


def log_normal(
    schedule: Schedule, u: Uniform, *, mean: Finite = -1.2, std: Positive = 1.2
) -> Uniform:
    """ln(σ/α) ~ N(-1.2, 1.2²) (Karras et al. 2022, Table 1)."""
    return schedule.snap(schedule.time(-(mean + std * _standard_normal(u))))


def logit_normal(
    schedule: Schedule, u: Uniform, *, mean: Finite = 0.0, std: Positive = 1.0
) -> Uniform:
    """logit(t/t_max) ~ N(0, 1): the middle of the path more often (Esser et al. 2024, Eq. 19).

    Step k of a chain stands for the times between k - 1 and k.
    """
    place = torch.sigmoid(mean + std * _standard_normal(u))
    return (
        _step(schedule, place) if goes_in_steps(schedule) else schedule.snap(place * schedule.t_max)
    )


class LossAware(nn.Module):
    """Times drawn in proportion to √E[L²], from the last losses in each of some bins.

    The clock is cut into equal bins, a chain into equal numbers of steps. Until each bin holds its
    `history` of losses, every time is drawn equally often.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, bins: int, history: int, even_share: float) -> None:
        super().__init__()
        self.even_share = even_share
        self.register_buffer("losses", torch.zeros(bins, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))

    def forward(self, schedule: Schedule, u: Uniform) -> Uniform:
        """Draw a bin, and from what is left of u a time in it."""
        shares = self.shares()
        ends = shares.cumsum(0)
        drawn = torch.searchsorted(ends, u, right=True).clamp(max=len(shares) - 1)
        inside = 1 - (ends[drawn] - u) / shares[drawn]
        start, width = self._cut(schedule)
        if goes_in_steps(schedule):
            return start + drawn * width + (inside * width).floor().clamp(0, width - 1)
        return schedule.snap(start + (drawn + inside) * width)

    def evenly(self, schedule: Schedule, u: Uniform) -> Uniform:
        """Every time equally often, whatever the losses were."""
        return uniform(schedule, u)

    def weight(self, schedule: Schedule, t: Uniform) -> Uniform:
        """1/(bins·p): losses at drawn times, times this, have the mean of evenly drawn ones."""
        return 1 / (len(self.losses) * self.shares()[self._bin(schedule, t)])

    @torch.no_grad()
    def update(self, schedule: Schedule, t: Uniform, losses: Float[Tensor, " batch"]) -> None:
        """Remember each bin's newest losses; those of a step in any division give equal bits."""
        bins, history = self.losses.shape
        bin_of = self._bin(schedule, t)
        hits = one_hot(bin_of, bins)
        place = self.counts[bin_of] + (hits.cumsum(0) * hits).sum(1) - 1
        self.counts += hits.sum(0)
        newest = self.counts[bin_of] - place <= history  # others would share a place with these
        self.losses[bin_of[newest], place[newest] % history] = losses.to(self.losses)[newest]

    def shares(self) -> Float64[Tensor, " bins"]:
        """How often each bin is drawn."""
        bins, history = self.losses.shape
        even = torch.full_like(self.losses[:, 0], 1 / bins)
        if (self.counts < history).any():
            return even
        size = self.losses.square().mean(1).sqrt() + 1e-300  # even where every loss is 0
        return (1 - self.even_share) * size / size.sum() + self.even_share * even

    def _bin(self, schedule: Schedule, t: Uniform) -> Int64[Tensor, " batch"]:
        start, width = self._cut(schedule)
        return ((t - start) / width).floor().long().clamp(0, len(self.losses) - 1)

    def _cut(self, schedule: Schedule) -> tuple[float, float]:
        """Where the first bin starts, and the width of each."""
        bins = len(self.losses)
        if not goes_in_steps(schedule):
            return schedule.t_min, (schedule.t_max - schedule.t_min) / bins
        if schedule.t_max % bins:
            raise ConfigError(
                f"times 'loss_aware' cannot cut {schedule.t_max:g} steps into {bins} equal bins; "
                "let times.bins divide the schedule's steps"
            )
        return 1.0, schedule.t_max / bins


def loss_aware(
    *, bins: Count = 100, history: Count = 10, uniform: PositiveFraction = 0.001
) -> LossAware:
    """p ∝ √E[L²] (Nichol & Dhariwal 2021, Sec. 3.3), whose bins are a chain's single steps.

    A share `uniform` of all draws is even, so that no bin is forgotten.
    """
    if bins < 1 or history < 1 or not 0 < uniform <= 1:
        raise ConfigError(
            "times 'loss_aware' needs at least one bin, one loss in each and a uniform share above "
            f"0, at most 1, not bins={bins}, history={history}, uniform={uniform:g}"
        )
    return LossAware(bins, history, uniform)


def _step(schedule: Schedule, place: Tensor) -> Tensor:
    """The step of a chain at a place in [0, 1) of T equal parts."""
    return schedule.snap((place * schedule.t_max).floor() + 1)


def _standard_normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp(min=2**-54))  # u = 0 would be -inf
