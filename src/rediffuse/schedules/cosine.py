"""The continuous cosine schedule: α = cos(πt/2), σ = sin(πt/2) (Salimans & Ho 2022)."""

import math
from dataclasses import dataclass

from torch import Tensor

from rediffuse.process import Scales


@dataclass(frozen=True)
class Cosine:
    """A quarter circle, cut at both ends where |ln(α²/σ²)| reaches a limit."""

    t_min: float
    t_max: float

    def __call__(self, t: Tensor) -> Scales:
        """(cos(πt/2), sin(πt/2))."""
        return Scales((t * math.pi / 2).cos(), (t * math.pi / 2).sin())

    def time(self, half_log_snr: Tensor) -> Tensor:
        """Invert tan(πt/2) = exp(-λ)."""
        return (-half_log_snr).exp().atan() * (2 / math.pi)

    def snap(self, t: Tensor) -> Tensor:
        """Hold t inside the interval that was trained."""
        return t.clamp(self.t_min, self.t_max)

    def label(self, t: Tensor) -> Tensor:
        """1000·t: sinusoidal embeddings are made for numbers up to a thousand."""
        return 1000 * t


def cosine(*, max_log_snr: float = 15.0) -> Cosine:
    """Log-SNR between -15 and 15 (Hoogeboom et al. 2023, App. B)."""
    end = math.atan(math.exp(max_log_snr / 2)) * (2 / math.pi)
    return Cosine(1 - end, end)
