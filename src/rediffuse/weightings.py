"""Weights on the squared error of the network's own output.

On that scale `unit` is L_simple for ε, flow matching for flow and λ(σ)·c_out² = 1 for EDM, and one
formula per weighting serves every target.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rediffuse.process import Scales
from rediffuse.targets import Target, determinant

Weighting = Callable[[Scales, Target], Tensor]


def unit(at: Scales, target: Target) -> Tensor:
    """1 (Ho et al. 2020, Eq. 14)."""
    return torch.ones_like(at.sigma)


def min_snr(at: Scales, target: Target, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, γ) on the error of x_0 (Hang et al. 2023, Sec. 3.4)."""
    return _on_output((at.alpha / at.sigma).square().clamp(max=gamma), at, target)


def _on_output(on_x_0: Tensor, at: Scales, target: Target) -> Tensor:
    """An error d of the output is an error σ·d/det of x_0 (`targets.solve`)."""
    return on_x_0 * (at.sigma / determinant(at, *target(at))) ** 2
