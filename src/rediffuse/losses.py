"""What training minimises."""

from jaxtyping import Float, Float64
from torch import Tensor

from rediffuse.denoiser import Denoiser
from rediffuse.process import diffuse
from rediffuse.targets import combine
from rediffuse.weightings import Weighting


def simple_loss(
    denoiser: Denoiser,
    weighting: Weighting,
    x_0: Float[Tensor, "batch *shape"],
    eps: Float[Tensor, "batch *shape"],
    t: Float64[Tensor, " batch"],
    cond: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    """L_simple per image (Ho et al. 2020, Eq. 14): the mean squared error of the network's output.

    With the target ε and weight 1 it is the paper's; other targets and weights change nothing else.
    """
    at = denoiser.schedule(t)
    x_t = diffuse(denoiser.schedule, x_0, eps, t)
    output, _ = denoiser.output(x_t, t, at, cond)
    error = output - combine(x_0, eps, *denoiser.target(at))
    per_image = error.square().flatten(1).mean(dim=1)
    return weighting(at, denoiser.target).to(per_image) * per_image
