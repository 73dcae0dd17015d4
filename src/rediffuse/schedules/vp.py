"""The variance-preserving SDE (Song et al. 2021): ᾱ(t) = exp(-½·β_d·t² - β_min·t), t in [0, 1]."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from rediffuse.process import Scales
from rediffuse.ranges import InsideOne, NonNegative, Positive


@dataclass(frozen=True)
class VP:
    """α² = ᾱ(t), σ² = 1 - ᾱ(t)."""

    beta_min: float
    beta_d: float
    t_min: float

    t_max = 1.0

    def __call__(self, t: Tensor) -> Scales:
        """(√ᾱ, √(1 - ᾱ)), with 1 - ᾱ exact near data."""
        log_alpha_bar = -(0.5 * self.beta_d * t + self.beta_min) * t
        return Scales((0.5 * log_alpha_bar).exp(), (-log_alpha_bar.expm1()).sqrt())

    def time(self, half_log_snr: Tensor) -> Tensor:
        """The root of ½·β_d·t² + β_min·t = -ln ᾱ (Lu et al. 2022, App. D.4)."""
        minus_log_alpha_bar = softplus(-2 * half_log_snr, threshold=700)
        root = (self.beta_min**2 + 2 * self.beta_d * minus_log_alpha_bar).sqrt()
        return 2 * minus_log_alpha_bar / (self.beta_min + root)

    def snap(self, t: Tensor) -> Tensor:
        """Hold t inside the interval that was trained."""
        return t.clamp(self.t_min, self.t_max)

    def label(self, t: Tensor) -> Tensor:
        """1000·t: sinusoidal embeddings are made for numbers up to a thousand."""
        return 1000 * t


def vp(*, beta_min: NonNegative = 0.1, beta_d: Positive = 19.9, t_min: InsideOne = 1e-3) -> VP:
    """Song et al. 2021, App. C, with their β_max = β_min + β_d = 20 and sampling ε = 1e-3."""
    return VP(beta_min, beta_d, t_min)
