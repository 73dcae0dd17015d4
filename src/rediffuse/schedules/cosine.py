"""The continuous cosine schedule: σ/α = shift·tan(πt/2) (Salimans & Ho 2022, with shift 1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.process import Scales
from rediffuse.ranges import Positive


@dataclass(frozen=True)
class Cosine:
    """A quarter circle, cut at both ends."""

    t_min: float
    t_max: float
    shift: float = 1.0

    def __call__(self, t: Tensor) -> Scales:
        """(cos(πt/2), shift·sin(πt/2)), brought to the circle again."""
        alpha, sigma = (t * math.pi / 2).cos(), self.shift * (t * math.pi / 2).sin()
        length = torch.hypot(alpha, sigma)
        return Scales(alpha / length, sigma / length)

    def time(self, half_log_snr: Tensor) -> Tensor:
        """Invert shift·tan(πt/2) = exp(-λ)."""
        return ((-half_log_snr).exp() / self.shift).atan() * (2 / math.pi)

    def snap(self, t: Tensor) -> Tensor:
        """Hold t inside the interval that was trained."""
        return t.clamp(self.t_min, self.t_max)

    def label(self, t: Tensor) -> Tensor:
        """1000·t: sinusoidal embeddings are made for numbers up to a thousand."""
        return 1000 * t


def cosine(*, max_log_snr: Positive = 15.0, shift: Positive = 1.0) -> Cosine:
    """Log-SNR between -15 and 15, both less 2·ln(shift) (Hoogeboom et al. 2023, App. B).

    A shift above 1 is noisier throughout: that paper's 2·ln(64/image_size) is shift=image_size/64.
    """
    if shift <= 0:
        raise ConfigError(f"cosine's shift must be above 0, not {shift:g}")
    end = math.atan(math.exp(max_log_snr / 2)) * (2 / math.pi)
    return Cosine(1 - end, end, shift)
