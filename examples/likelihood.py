"""How many bits per pixel value does a model need for images that it has not seen?

    uv run python examples/likelihood.py RUN [IMAGES]

The variational bound is that of a chain (Ho et al. 2020, Eq. 5), by step; the probability-flow ODE
(Song et al. 2021) gives a tighter figure for any schedule.
"""

import sys

import torch

import rediffuse
from rediffuse.data.pixels import pixel_range, to_model
from rediffuse.grids import log_snr, trailing
from rediffuse.images import prepare
from rediffuse.likelihood import bound, ode_bits_per_dim
from rediffuse.process import Prediction
from rediffuse.randomness import ImageNoise, Stream
from rediffuse.runs import runs_root


def main(run: str, count: str = "16") -> None:
    """Print both figures, and where the bound's bits go."""
    model = rediffuse.load(run)
    data, schedule = model.config.data, model.denoiser.schedule
    images = prepare(data, runs_root(None))
    part, rows = images.held_out, images.held_out_rows[: int(count)]
    assert part is not None, "this run held no images out"
    x_0 = to_model(torch.from_numpy(part.images[rows]), data.mean, data.std)
    low, high = pixel_range(data.mean, data.std)
    cond = torch.from_numpy(part.labels[rows]) if model.class_names else None
    noise = ImageNoise(0, torch.arange(len(x_0)), Stream.LIKELIHOOD)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        return model.denoiser(x_t, t, cond)

    with torch.inference_mode():
        steps = trailing(schedule, min(200, int(schedule.t_max)))
        found = bound(denoise, schedule, x_0, steps, noise, low=low, high=high)
        ode = ode_bits_per_dim(
            denoise, schedule, x_0, log_snr(schedule, 25), noise, low=low, high=high
        )
    print(f"bound {found.total.mean():.3f} bits per dimension over {len(x_0)} held-out images")
    print(f"  prior   {found.prior.mean():.4f}")
    print(f"  chain   {found.terms[:-1].sum(0).mean():.4f}")
    print(f"  decoder {found.decoder.mean():.4f}")
    print(f"ODE   {ode.mean():.3f} bits per dimension")


if __name__ == "__main__":
    main(*sys.argv[1:])
