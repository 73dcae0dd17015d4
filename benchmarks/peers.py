"""What people would use instead, used as its own documentation does it.

Each is optional: where a package is missing, its function raises ImportError.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Work
from benchmarks.ours import pixels
from benchmarks.sizes import Size
from rediffuse.schedules.cosine import cosine
from rediffuse.training.compiling import compile_network
from rediffuse.training.devices import PRECISIONS


def diffusers_network(size: Size) -> nn.Module:
    """UNet2DModel of this size; the large one is the published `ddpm-cifar10-32`."""
    from diffusers import UNet2DModel

    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in size.attention]
    up = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(size.attention)]
    return UNet2DModel(
        sample_size=size.image_size,
        in_channels=size.channels,
        out_channels=size.channels,
        block_out_channels=tuple(size.base_channels * m for m in size.multipliers),
        layers_per_block=2,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        norm_num_groups=size.groups,
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        resnet_time_scale_shift="scale_shift" if size.scale_shift else "default",
    )


def diffusers_train(
    size: Size, precision: str, device: torch.device, *, compiled: bool = False
) -> Work:
    """The step of diffusers' unconditional training example: DDPMScheduler, AdamW, EMAModel."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    accelerator = _accelerator(precision, device)
    network = diffusers_network(size)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    network, optimizer = accelerator.prepare(network, optimizer)
    average.to(device)
    if compiled:
        network.compile()
    batches = _dataset(size, device)

    def step() -> None:
        clean = batches()
        noise = torch.randn(clean.shape, device=device)
        t = torch.randint(0, 1000, (len(clean),), device=device)
        noisy = schedule.add_noise(clean, noise, t)
        loss = F.mse_loss(network(noisy, t).sample.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.detach().item()

    return step


def diffusers_evaluate(
    size: Size, precision: str, device: torch.device, *, compiled: bool = False
) -> Work:
    """One forward of UNet2DModel, as its pipelines do it."""
    network = diffusers_network(size).to(device).eval()
    if compiled:
        network.compile()
    return _forward(size, precision, device, lambda x, t: network(x, t).sample)


def bare_evaluate(
    size: Size, precision: str, device: torch.device, *, compiled: bool = False
) -> Work:
    """Our network's forward alone: what an evaluation cannot be faster than."""
    network = size.ours().to(device).eval()
    if compiled:
        compile_network(network, device)
    return _forward(size, precision, device, network)


def plain_train(
    size: Size, precision: str, device: torch.device, *, compiled: bool = False
) -> Work:
    """The loop that tutorials and Lightning modules have, around our network.

    torch's own random numbers, AdamW as it comes, and an average that walks over the parameters.
    """
    network = size.ours().to(device)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    if compiled:
        network.compile()
    schedule, dtype, batches = cosine(), PRECISIONS[precision], _dataset(size, device)
    steps = torch.arange(1, 1001, dtype=torch.float64)
    alphas, sigmas = (scale.float().to(device) for scale in schedule(steps))

    def step() -> None:
        clean = batches()
        noise = torch.randn(clean.shape, device=device)
        t = torch.randint(0, 1000, (len(clean),), device=device)
        noisy = alphas[t, None, None, None] * clean + sigmas[t, None, None, None] * noise
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = F.mse_loss(network(noisy, t.float()).float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, live in zip(average.parameters(), network.parameters(), strict=True):
                mine.mul_(0.9999).add_(live, alpha=1 - 0.9999)
        loss.item()

    return step


def lucidrains_network(size: Size) -> nn.Module:
    """Unet of denoising-diffusion-pytorch, with the widths of this size."""
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=size.base_channels, dim_mults=size.multipliers, channels=size.channels)


def lucidrains_train(
    size: Size, precision: str, device: torch.device, *, compiled: bool = False
) -> Work:
    """The step of denoising-diffusion-pytorch's Trainer, without its data loader."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    accelerator = _accelerator(precision, device)
    diffusion = GaussianDiffusion(
        lucidrains_network(size), image_size=size.image_size, beta_schedule="cosine"
    ).to(device)
    average = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    diffusion, optimizer = accelerator.prepare(diffusion, optimizer)
    if compiled:
        diffusion.compile()
    batches = _dataset(size, device)

    def step() -> None:
        with accelerator.autocast():
            loss = diffusion((batches() + 1) / 2)  # it takes [0, 1]
        loss.item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return step


def _accelerator(precision: str, device: torch.device) -> Any:
    """One for this precision; accelerate keeps the first one's for the whole process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")


def _dataset(size: Size, device: torch.device) -> Callable[[], Tensor]:
    """Batches out of float images that lie on the device: no peer is slowed by its data loader."""
    images = torch.from_numpy(pixels(size)).to(device).float() / 127.5 - 1
    return lambda: images[torch.randint(0, len(images), (size.batch_size,), device=device)]


def _forward(
    size: Size, precision: str, device: torch.device, network: Callable[[Tensor, Tensor], Tensor]
) -> Work:
    shape = size.batch_size, size.channels, size.image_size, size.image_size
    x, t = torch.randn(shape, device=device), torch.full(shape[:1], 500.0, device=device)
    dtype = PRECISIONS[precision]

    def once() -> None:
        enabled = dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=enabled):
            network(x, t)

    return once
