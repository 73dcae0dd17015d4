"""Diffusion from scratch on eight points of a circle: about ten seconds on a CPU.

    uv run python examples/toy.py

Every line of the training loop is here; schedule, target, network, grid and solver are the
library's and can be swapped for any other.
"""

import math

import torch

from rediffuse import Denoiser
from rediffuse.grids import trailing
from rediffuse.losses import Noised, simple
from rediffuse.networks.mlp import MLP
from rediffuse.process import diffuse
from rediffuse.randomness import ImageNoise
from rediffuse.sampling import trajectory
from rediffuse.schedules.cosine import cosine
from rediffuse.solvers.dpmpp_2m import dpmpp_2m
from rediffuse.targets import v
from rediffuse.times import uniform
from rediffuse.weightings import unit


def points(count: int) -> torch.Tensor:
    """Draw points around eight modes, as images of two channels and one pixel."""
    angle = torch.randint(8, (count,)) * math.pi / 4
    mode = torch.stack((angle.cos(), angle.sin()), dim=1)
    return (mode + 0.05 * torch.randn(count, 2))[..., None, None]


def train(steps: int = 2000) -> Denoiser:
    """Ho et al. 2020, Alg. 1."""
    network = MLP(in_channels=2, out_channels=2, image_size=1, width=128, depth=3)
    denoiser = Denoiser(network, cosine(), v)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x_0 = points(256)
        eps, t = torch.randn_like(x_0), uniform(denoiser.schedule, torch.rand(256).double())
        noised = Noised(x_0, eps, diffuse(denoiser.schedule, x_0, eps, t), t)
        loss = simple(denoiser, unit, noised).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 500 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    return denoiser


def main() -> None:
    """Train, draw 1,000 points, and count how many lie on a mode."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads would wait for one another in layers as small as these
    denoiser = train()
    schedule, noise = denoiser.schedule, ImageNoise(seed=0, images=torch.arange(1000))
    like = torch.empty(1000, 2, 1, 1)
    *_, x = trajectory(denoiser, schedule, dpmpp_2m, trailing(schedule, 20), noise, like)
    x = x[:, :, 0, 0]
    angle = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round() * math.pi / 4
    distance = (x - torch.stack((angle.cos(), angle.sin()), dim=1)).norm(dim=1)
    print(f"{(distance < 0.2).float().mean():.1%} of the points lie on a mode")


if __name__ == "__main__":
    main()
