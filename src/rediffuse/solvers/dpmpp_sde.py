"""DPM-Solver++ (SDE), single-step."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated

from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.process import Scales, Schedule, between
from rediffuse.ranges import NonNegative, Range
from rediffuse.solvers import Noise
from rediffuse.tensors import expand


def dpmpp_sde(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    eta: NonNegative = 1.0,
    noise_scale: NonNegative = 1.0,
    r: Annotated[float, Range(0.0, 1.0, above=True)] = 0.5,
) -> Iterator[Tensor]:
    """DPM-Solver++(2S) with an ancestral step for each of its two moves (Crowson's k-diffusion).

    `eta` = 0 is the ODE of `dpmpp_2s`, 1 the SDE, which both moves follow on one Brownian path.
    `r` is how far in ln(α/σ) the second evaluation lies; a chain takes its nearest step. From
    α = 0 and onto data the step is of first order. `noise_scale` multiplies the noise, and should
    be 1 for the right marginals.
    """
    for t, s in pairwise(times):
        now, then = schedule(t), schedule(s)
        x_0 = denoise(x, t).x_0
        middle = between(schedule, t, s, r)
        z = noise(x) if eta and s > 0 else None
        if middle is not None:
            at = schedule(middle)
            halfway = _moved(x, x_0, now, at, z, eta, noise_scale)
            h = then.half_log_snr - now.half_log_snr
            slope = (denoise(halfway, middle).x_0 - x_0) / 2
            x_0 = x_0 + expand(h / (at.half_log_snr - now.half_log_snr), x) * slope
            if z is not None:
                # The path's clock is the SNR: so far the path has come on its way from t to s.
                snr_t, snr, snr_s = ((scale.alpha / scale.sigma) ** 2 for scale in (now, at, then))
                part = (snr - snr_t) / (snr_s - snr_t)
                z = expand(part.sqrt(), x) * z + expand((1 - part).sqrt(), x) * noise(x)
        x = _moved(x, x_0, now, then, z, eta, noise_scale)
        yield x


def _moved(
    x: Tensor,
    x_0: Tensor,
    now: Scales,
    then: Scales,
    z: Tensor | None,
    eta: float,
    noise_scale: float,
) -> Tensor:
    """Step to the part of the noise that `then` keeps, and add the rest afresh."""
    ratio = then.sigma * now.alpha / (then.alpha * now.sigma)  # e^-h, also where h is infinite
    up = (eta * (1 - ratio**2).clamp(min=0).sqrt()).clamp(max=1)
    down = (1 - up**2).sqrt()
    on_x_0 = then.alpha * (1 - down * ratio)
    x = expand(then.sigma / now.sigma * down, x) * x + expand(on_x_0, x) * x_0
    return x if z is None else x + expand(noise_scale * then.sigma * up, x) * z
