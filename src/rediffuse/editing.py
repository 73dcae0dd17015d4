"""Using a model on given images: variations, inpainting and interpolation.

All randomness is `noise`'s, so these images depend on (seed, j) alone, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor

from rediffuse.denoiser import Denoise
from rediffuse.errors import ConfigError
from rediffuse.guidance.inpainting import inpainting
from rediffuse.process import Images, Schedule, diffuse, transition_variance
from rediffuse.sampling import trajectory, walk
from rediffuse.solvers import Noise, Solver
from rediffuse.tensors import expand


def image_to_image(
    denoise: Denoise,
    schedule: Schedule,
    solver: Solver,
    times: Tensor,
    noise: Noise,
    x_0: Images,
    *,
    strength: float,
) -> Iterator[Tensor]:
    """Noise x_0 part of the way and walk back down (Meng et al. 2022, SDEdit).

    `strength` is the share of the grid's steps that is walked: 0 yields x_0 itself, and 1 starts
    from pure noise, as if there were no x_0.
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"image-to-image needs a strength from 0 to 1, not {strength:g}")
    steps = len(times) - 1
    left = round(strength * steps)
    if left == 0:
        yield x_0
    elif left == steps:
        yield from trajectory(denoise, schedule, solver, times, noise, x_0)
    else:
        times = times[steps - left :]
        with torch.inference_mode():
            x = diffuse(schedule, x_0, noise(x_0), times[0])
        yield from walk(denoise, schedule, solver, x, times, noise)


def inpaint(
    denoise: Denoise,
    schedule: Schedule,
    solver: Solver,
    times: Tensor,
    noise: Noise,
    known: Images,
    mask: Tensor,
    *,
    resamplings: int = 1,
    jump: int = 1,
) -> Iterator[Tensor]:
    """Keep `known` where `mask` is 1 and paint the rest; given pixels end equal to the last bit.

    One resampling walks the grid once, on `inpainting`. More are RePaint (Lugmayr et al. 2022,
    Alg. 1): every `jump` steps are walked that often, each time with fresh noise on the given
    pixels at their end, and q(x_t | x_s) back up in between; the step onto data is walked once.
    """
    if resamplings < 1 or jump < 1:
        raise ConfigError(
            "inpainting needs at least one resampling and a jump of at least one step, not "
            f"resamplings={resamplings}, jump={jump}"
        )
    given, painted = mask.bool(), inpainting(denoise, schedule, known=known, mask=mask)

    def resampled() -> Iterator[Tensor]:
        last = len(times) - 2
        with torch.inference_mode():
            x = expand(schedule(times[0]).sigma, known) * noise(known)
        for i, j in pairwise([*range(0, last, jump), last]):
            for again in range(resamplings):
                if again:
                    with torch.inference_mode():
                        x = _back_up(schedule, x, times[j], times[i], noise)
                for state in walk(painted, schedule, solver, x, times[i : j + 1], noise):
                    yield state
                with torch.inference_mode():
                    fresh = diffuse(schedule, known, noise(known), times[j])
                    x = torch.where(given, fresh, state)
        yield from walk(painted, schedule, solver, x, times[last:], noise)

    once = trajectory(painted, schedule, solver, times, noise, known)
    for state, following in pairwise(chain(once if resamplings == 1 else resampled(), (None,))):
        assert state is not None
        if following is None:  # most solvers land on the given pixels but for rounding
            with torch.inference_mode():
                state = torch.where(given, known, state)
        yield state


def _back_up(schedule: Schedule, x: Tensor, s: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """Draw from q(x_t | x_s), s < t (Kingma et al. 2021, App. A.1)."""
    kept = schedule(t).alpha / schedule(s).alpha
    added = transition_variance(schedule, t, s).clamp(min=0).sqrt()
    return expand(kept, x) * x + expand(added, x) * noise(x)


def slerp(a: Images, b: Images, weight: float | Tensor) -> Tensor:
    """Go from a (0) to b (1) along the arc between them, image by image (Shoemake 1985).

    `weight` is one number, or one per image. At 0 and 1 the result is a and b to the last bit;
    between vectors that are almost parallel the way is straight.
    """
    part = torch.as_tensor(weight, dtype=torch.float64, device=a.device).expand(len(a))
    one, other = a.double().flatten(1), b.double().flatten(1)
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    angle = cosine.acos()
    # Also where there is no angle: an image is 0, or rounding took a cosine above 1.
    straight = ~(angle.sin() > 1e-6)
    on_a = torch.where(straight, 1 - part, ((1 - part) * angle).sin() / angle.sin())
    on_b = torch.where(straight, part, (part * angle).sin() / angle.sin())
    return expand(on_a, a) * a + expand(on_b, b) * b


@dataclass(frozen=True)
class Interpolated:
    """Noise between two others, at every draw, so that stochastic solvers interpolate, too."""

    first: Noise
    last: Noise
    weight: float | Tensor

    def __call__(self, like: Tensor) -> Tensor:
        return slerp(self.first(like), self.last(like), self.weight)
