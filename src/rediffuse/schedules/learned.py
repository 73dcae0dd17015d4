"""A schedule that is learned with the network: γ(t) = -ln(α²/σ²) rises (Kingma et al. 2021)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rediffuse.errors import ConfigError
from rediffuse.process import Scales
from rediffuse.ranges import Finite, Width


class Learned(nn.Module):
    """α² = sigmoid(-γ(t)) and σ² = sigmoid(γ(t)), between fixed ends γ_min and γ_max.

    γ is linear in t plus a layer of sigmoids, with positive weights (Kingma et al. 2021, App. H).
    It starts close to a straight line.
    """

    t_min = 1e-3
    t_max = 1.0

    def __init__(self, gamma_min: float, gamma_max: float, width: int) -> None:
        super().__init__()
        self.gamma_min, self.gamma_max = gamma_min, gamma_max
        steepness = torch.full((width,), 10.0, dtype=torch.float64)
        center = (torch.arange(width, dtype=torch.float64) + 0.5) / width
        self.slope = nn.Parameter(_inverse_softplus(torch.ones((), dtype=torch.float64)))
        self.steepness = nn.Parameter(_inverse_softplus(steepness))
        self.bias = nn.Parameter(-steepness * center)
        self.height = nn.Parameter(_inverse_softplus(torch.full_like(center, 1 / width)))

    def forward(self, t: Tensor) -> Scales:
        """(√sigmoid(-γ), √sigmoid(γ))."""
        gamma = self._gamma(t)
        return Scales(torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt())

    @torch.no_grad()
    def time(self, half_log_snr: Tensor) -> Tensor:
        """Invert by bisection, below t_min in closed form."""
        gamma = -2 * half_log_snr
        low, high = torch.full_like(gamma, self.t_min), torch.full_like(gamma, self.t_max)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            later = self._gamma(middle) < gamma
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        below = ((gamma - self.gamma_min) / 2).clamp(max=0).exp()
        return (low + high) / 2 * below

    def snap(self, t: Tensor) -> Tensor:
        """Hold t inside the interval that was trained."""
        return t.clamp(self.t_min, self.t_max)

    def label(self, t: Tensor) -> Tensor:
        """γ on a scale of 0 to 1000: the noise level, since what t means changes in training."""
        return 1000 * (self._gamma(t) - self.gamma_min) / (self.gamma_max - self.gamma_min)

    def _gamma(self, t: Tensor) -> Tensor:
        early = t < self.t_min
        u = torch.where(early, 0.0, (t - self.t_min) / (self.t_max - self.t_min))
        start, end = self._rising(u.new_zeros(())), self._rising(u.new_ones(()))
        part = (self._rising(u) - start) / (end - start)
        # Nobody is asked below t_min; there σ/α falls with t, to data at t = 0.
        falling = 2 * torch.where(early, t / self.t_min, 1.0).log()
        return self.gamma_min + (self.gamma_max - self.gamma_min) * part + falling

    def _rising(self, u: Tensor) -> Tensor:
        line = softplus(self.slope) * u
        steps = torch.sigmoid(softplus(self.steepness) * line[..., None] + self.bias)
        return line + (softplus(self.height) * steps).sum(-1)


def learned(
    *, max_log_snr: Finite = 13.3, min_log_snr: Finite = -5.0, width: Width = 64
) -> Learned:
    """A monotone schedule between the ends of Kingma et al. 2021's models of CIFAR-10."""
    if width < 1:
        raise ConfigError(f"schedule.width: expected 1 or more, not {width}")
    if min_log_snr >= max_log_snr:
        raise ConfigError(
            f"a learned schedule needs min_log_snr below max_log_snr, not {min_log_snr:g} and "
            f"{max_log_snr:g}"
        )
    return Learned(-max_log_snr, -min_log_snr, width)


_BISECTIONS = 60  # more than a float64 has digits


def _inverse_softplus(x: Tensor) -> Tensor:
    return x.expm1().log()
