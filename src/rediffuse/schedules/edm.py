"""The variance-exploding process on the clock t = σ (Karras et al. 2022)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Scales
from rediffuse.ranges import Positive


@dataclass(frozen=True)
class EDM:
    """α = 1, σ = t."""

    t_min: float
    t_max: float

    def __call__(self, t: Tensor) -> Scales:
        """(1, t)."""
        return Scales(torch.ones_like(t), t)

    def time(self, half_log_snr: Tensor) -> Tensor:
        """Invert λ = -ln σ."""
        return (-half_log_snr).exp()

    def snap(self, t: Tensor) -> Tensor:
        """Leave t alone: every σ > 0 was trained, the far ones rarely."""
        return t

    def label(self, t: Tensor) -> Tensor:
        """c_noise = ¼·ln σ (Karras et al. 2022, Table 1)."""
        return t.log() / 4


def edm(*, sigma_min: Positive = 0.002, sigma_max: Positive = 80.0) -> EDM:
    """σ from 0.002 to 80 (Karras et al. 2022, Table 1); the network's input needs `sigma_data`.

    Raises:
        ConfigError: unless `sigma_min` is below `sigma_max`.
    """
    if sigma_min >= sigma_max:
        raise ConfigError(
            f"schedule.sigma_min={sigma_min:g} must be below schedule.sigma_max={sigma_max:g}"
        )
    return EDM(sigma_min, sigma_max)
