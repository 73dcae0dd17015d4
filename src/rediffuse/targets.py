"""What a network learns: two numbers (a, b) such that its output is a·x_0 + b·ε.

Together with x_t = α·x_0 + σ·ε that is a 2×2 system; `solve` inverts it for every target at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Scales, Schedule
from rediffuse.ranges import Positive
from rediffuse.tensors import expand

Target = Callable[[Scales], tuple[Tensor, Tensor]]


def eps(at: Scales) -> tuple[Tensor, Tensor]:
    """ε (Ho et al. 2020, Eq. 12)."""
    return at.alpha.new_zeros(()), at.alpha.new_ones(())


def x_0(at: Scales) -> tuple[Tensor, Tensor]:
    """x_0 (Ho et al. 2020, Sec. 3.2)."""
    return at.alpha.new_ones(()), at.alpha.new_zeros(())


def v(at: Scales) -> tuple[Tensor, Tensor]:
    """α·ε - σ·x_0 (Salimans & Ho 2022, App. D)."""
    return -at.sigma, at.alpha


def flow(at: Scales) -> tuple[Tensor, Tensor]:
    """ε - x_0, the velocity of the straight path (Lipman et al. 2023; Liu et al. 2023)."""
    return -at.alpha.new_ones(()), at.alpha.new_ones(())


def edm(at: Scales, *, sigma_data: Positive = 0.5) -> tuple[Tensor, Tensor]:
    """F of D = c_skip·x + c_out·F (Karras et al. 2022, Table 1), for any α.

    With n² = σ² + α²·σ_data², solving their Eq. 7 for F gives (σ·x_0/σ_data - α·σ_data·ε) / n: unit
    variance at every noise level, and -v where σ_data = 1 and α² + σ² = 1.
    """
    n = (at.sigma**2 + (at.alpha * sigma_data) ** 2).sqrt()
    return at.sigma / (sigma_data * n), -at.alpha * sigma_data / n


def combine(first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a·x_0 + b·ε, the output that a perfect network would give."""
    return expand(a, first) * first + expand(b, second) * second


def solve(output: Tensor, x_t: Tensor, at: Scales, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Recover (x_0, ε) from what the network said: invert [[α, σ], [a, b]]."""
    det = determinant(at, a, b)
    return (
        combine(x_t, output, b / det, -at.sigma / det),
        combine(output, x_t, at.alpha / det, -a / det),
    )


def determinant(at: Scales, a: Tensor, b: Tensor) -> Tensor:
    """α·b - σ·a: 0 where the target says nothing that x_t does not say."""
    return at.alpha * b - at.sigma * a


def check_target(target: Target, schedule: Schedule, name: str = "this target") -> None:
    """Refuse a target that cannot give x_0 somewhere on the schedule, as ε where α = 0."""
    for t in (schedule.t_min, schedule.t_max):
        at = schedule(torch.tensor(t, dtype=torch.float64))
        if abs(determinant(at, *target(at)).item()) < 1e-9:
            raise ConfigError(
                f"target '{name}' cannot give x_0 at t = {t:g}, where the schedule has α = "
                f"{at.alpha.item():g} and σ = {at.sigma.item():g}; use target=v, flow or x_0, "
                "or a schedule that keeps some of the image there"
            )
