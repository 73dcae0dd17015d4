"""A denoiser is a network, a schedule and a target; it always answers with both x_0 and ε."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rediffuse.process import Prediction, Scales, Schedule
from rediffuse.targets import Target, check_target, solve
from rediffuse.tensors import expand, sent

Denoise = Callable[[Tensor, Tensor], Prediction]


@dataclass(frozen=True)
class Denoiser:
    """Read a network's output as x_0 and ε.

    `sigma_data` is the standard deviation of the data: with it the network's input is scaled to
    unit variance (Karras et al. 2022, c_in), without it x_t goes in as it is. A network that
    answers with twice the image's channels has learned a variance fraction, too (Nichol & Dhariwal
    2021, Eq. 15). A self-conditioned one is shown its last estimate of x_0 beside x_t (Chen et al.
    2023, Analog Bits, Sec. 3.2), held in `estimate_range`, as what ε says of pure noise is huge.

    Raises:
        ConfigError: if the target cannot give x_0 somewhere on the schedule.
    """

    network: nn.Module
    schedule: Schedule
    target: Target
    sigma_data: float | None = None
    estimate_range: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        check_target(self.target, self.schedule)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, given: Tensor | None = None
    ) -> Prediction:
        """Denoise x_t at t: a float64 scalar, or one time per image.

        `cond` is what the network was trained to be told, such as one class index per image;
        `given` is the estimate of x_0 that a self-conditioned network is shown, None for none yet.
        """
        at = self.schedule(t)
        output, variance = self.output(x_t, t, at, cond, given)
        x_0, eps = solve(output, x_t, at, *self.target(at))
        return Prediction(x_0, eps, variance)

    def output(
        self, x_t: Tensor, t: Tensor, at: Scales, cond: Tensor | None, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the network says, in x_t's precision, and its variance fraction if it has one."""
        label = sent(self.schedule.label(t).float(), x_t.device).expand(len(x_t))
        shown = x_t * expand(self._input_scale(at), x_t)
        if self.estimate_range:
            low, high = (end.to(x_t) for end in self.estimate_range)
            estimate = torch.zeros_like(x_t) if given is None else given.clamp(low, high)
            shown = torch.cat((shown, estimate), dim=1)
        said = self.network(shown, label, cond).to(x_t.dtype)
        if said.shape[1] == x_t.shape[1]:
            return said, None
        output, fraction = said.chunk(2, dim=1)
        return output, (fraction + 1) / 2

    def _input_scale(self, at: Scales) -> Tensor:
        if self.sigma_data is None:
            return at.alpha.new_ones(())
        return ((at.alpha * self.sigma_data) ** 2 + at.sigma**2).rsqrt()


def turning(denoise: Denoise, schedule: Schedule, y: Tensor, angle: Tensor) -> Tensor:
    """dy/dφ = cos φ·ε - sin φ·x_0 of y = x_t/√(α² + σ²) at φ = atan2(σ, α).

    It is the ODE of `process.travel` without a clock or a scale, and regular from data to noise,
    also at α = 0 (Salimans & Ho 2022, App. D, for any α and σ). `angle` is one for all images, or
    one each; a network is asked at its nearest time in t_min .. t_max, between a chain's steps.
    """
    t = schedule.time(-angle.tan().log()).clamp(schedule.t_min, schedule.t_max)
    at = schedule(t)
    size = (at.alpha**2 + at.sigma**2).sqrt()
    predicted = denoise(expand(size, y) * y, t)
    on_eps, on_x_0 = expand(at.alpha / size, y), expand(-at.sigma / size, y)
    return on_eps * predicted.eps + on_x_0 * predicted.x_0
