"""The straight path x_t = (1 - t)·x_0 + t·ε (Lipman et al. 2023; Liu et al. 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Scales
from rediffuse.ranges import Count, InsideOne, Positive


@dataclass(frozen=True)
class Flow:
    """σ = s·t / (1 + (s - 1)·t) and α = 1 - σ: pure noise, α = 0, at t = 1."""

    shift: float
    t_min: float

    t_max = 1.0

    def __call__(self, t: Tensor) -> Scales:
        """Both scales without cancellation."""
        below = 1 + (self.shift - 1) * t
        return Scales((1 - t) / below, self.shift * t / below)

    def time(self, half_log_snr: Tensor) -> Tensor:
        """Undo the shift of σ = sigmoid(-λ)."""
        sigma, alpha = torch.sigmoid(-half_log_snr), torch.sigmoid(half_log_snr)
        return sigma / (sigma + self.shift * alpha)

    def snap(self, t: Tensor) -> Tensor:
        """Hold t inside the interval that was trained."""
        return t.clamp(self.t_min, self.t_max)

    def label(self, t: Tensor) -> Tensor:
        """1000·t: sinusoidal embeddings are made for numbers up to a thousand."""
        return 1000 * t


def flow(*, shift: Positive = 1.0, t_min: InsideOne = 1e-3) -> Flow:
    """Esser et al. 2024, Eq. 23: a shift above 1 spends more of the clock on noise."""
    if shift <= 0:
        raise ConfigError(f"flow's shift must be above 0, not {shift:g}")
    return Flow(shift, t_min)


def resolution(*, image_size: Count = 64, base_size: Count = 32, t_min: InsideOne = 1e-3) -> Flow:
    """`flow` with the shift √(m/n) of m pixels for n (Esser et al. 2024, Eq. 23).

    It moves a schedule that suits images of `base_size`² pixels to ones of `image_size`².
    """
    return flow(shift=image_size / base_size, t_min=t_min)
