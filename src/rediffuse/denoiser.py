"""A denoiser is a network, a schedule and a target; it always answers with both x_0 and ε."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from rediffuse.process import Prediction, Scales, Schedule
from rediffuse.targets import Target, check_target, solve
from rediffuse.tensors import expand

Denoise = Callable[[Tensor, Tensor], Prediction]


@dataclass(frozen=True)
class Denoiser:
    """Read a network's output as x_0 and ε.

    `sigma_data` is the standard deviation of the data: with it the network's input is scaled to
    unit variance (Karras et al. 2022, c_in), without it x_t goes in as it is. A network with twice
    the image's channels also answers with a variance fraction (Nichol & Dhariwal 2021, Eq. 15).

    Raises:
        ConfigError: if the target cannot give x_0 somewhere on the schedule.
    """

    network: nn.Module
    schedule: Schedule
    target: Target
    sigma_data: float | None = None

    def __post_init__(self) -> None:
        check_target(self.target, self.schedule)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Prediction:
        """Denoise x_t at t: a float64 scalar, or one time per image.

        `cond` is what the network was trained to be told, such as one class index per image.
        """
        at = self.schedule(t)
        output, variance = self.output(x_t, t, at, cond)
        x_0, eps = solve(output, x_t, at, *self.target(at))
        return Prediction(x_0, eps, variance)

    def output(
        self, x_t: Tensor, t: Tensor, at: Scales, cond: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the network says, in x_t's precision, and its variance fraction if it has one."""
        label = self.schedule.label(t).float().to(x_t.device).expand(len(x_t))
        said = self.network(x_t * expand(self._input_scale(at), x_t), label, cond).to(x_t.dtype)
        if said.shape[1] == x_t.shape[1]:
            return said, None
        output, fraction = said.chunk(2, dim=1)
        return output, (fraction + 1) / 2

    def _input_scale(self, at: Scales) -> Tensor:
        if self.sigma_data is None:
            return at.alpha.new_ones(())
        return ((at.alpha * self.sigma_data) ** 2 + at.sigma**2).rsqrt()
