"""What `test_gpu.py` does, each in a process of its own: `python on_gpu.py NAME`.

Nothing here needs more than torch and the floors below the door, as a bare GPU machine has them.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from rediffuse.data.batches import Batch, Batches
from rediffuse.denoiser import Denoiser
from rediffuse.grids import uniform
from rediffuse.losses import simple
from rediffuse.networks.fused import group_norm
from rediffuse.networks.norms import group
from rediffuse.networks.replay import Replay, _Captured
from rediffuse.networks.unet import UNet
from rediffuse.randomness import ImageNoise, Stream, normal, torch_seeded
from rediffuse.sampling import trajectory
from rediffuse.schedules.discrete import linear
from rediffuse.solvers.dpmpp_2m import dpmpp_2m
from rediffuse.solvers.euler_ancestral import euler_ancestral
from rediffuse.targets import v
from rediffuse.times import uniform_steps
from rediffuse.training.average import Average
from rediffuse.training.checkpoint import load_checkpoint, save_checkpoint
from rediffuse.training.compiling import compile_network, compile_noise, trial
from rediffuse.training.devices import Devices, set_determinism
from rediffuse.training.hooks import digests
from rediffuse.training.optimizers import adamw, parameter_groups
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe, train_step
from rediffuse.weightings import min_snr

CUDA = torch.device("cuda")
Steps = Iterator[list[Batch]]


def unet(dropout: float = 0.0) -> UNet:
    """A small network with all that a large one has, the same for every call."""
    with torch_seeded(0, Stream.INITIALISATION):
        network = UNet(
            in_channels=3,
            out_channels=3,
            image_size=16,
            base_channels=32,
            channel_multipliers=(1, 2),
            blocks_per_level=1,
            attention_resolutions=(8,),
            num_classes=4,
            null_class=True,
            scale_shift=True,
            norm=lambda channels: group(channels, groups=8),
            dropout=dropout,
        )
        for parameter in network.parameters():  # which begin as 0 in part
            torch.nn.init.normal_(parameter, std=0.05)
    return network.to(CUDA)


def made(
    *,
    compiled: bool = True,
    dropout: float = 0.0,
    precision: torch.dtype = torch.bfloat16,
    pieces: int = 1,
) -> tuple[TrainState, Recipe, Callable[[int], Steps]]:
    """A state, a recipe, and the steps from an image on."""
    network = unet(dropout)
    if compiled:
        compile_network(network, CUDA, replayed=pieces == 1)
    state = TrainState(
        network, adamw(parameter_groups(network), 1e-3), Average(network, half_life_images=500)
    )
    recipe = Recipe(
        denoiser=Denoiser(network, linear(), v),
        objective=simple,
        weighting=min_snr,
        times=uniform_steps,
        seed=0,
        batch_size=32,
        learning_rate=lambda images: 1e-3,
        devices=Devices(CUDA),
        clip_norm=1.0,
        label_dropout=0.2,
        null_class=4,
        offset_noise=0.1,
        precision=precision,
        normal=compile_noise(CUDA) if compiled else normal,
    )
    images = np.random.default_rng(0).integers(0, 256, (256, 3, 16, 16), dtype=np.uint8)
    batches = Batches(
        images=images,
        labels=np.arange(256) % 4,
        seed=0,
        batch_size=32,
        micro_batches=pieces,
        flip=True,
        device=CUDA,
        on_device=True,
    )
    return state, recipe, batches.since


def weights(state: TrainState) -> Tensor:
    """All of them, in one vector."""
    return torch.cat([p.detach().flatten() for p in state.network.parameters()])


def waits_for_nothing() -> None:
    """After the first steps: no wait, no compiling, and the graph was never broken."""
    set_determinism("fast", CUDA, None, compiled=True)
    state, recipe, since = made()
    steps = since(0)
    for _ in range(8):  # the compiler, then the CUDA graphs, record
        train_step(recipe, state, next(steps))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3, counters["stats"]  # the network, its noise and the offset's
    assert not counters["graph_break"], counters["graph_break"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function("all steps"):
            for _ in range(10):
                train_step(recipe, state, next(steps))
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == graphs
    events = profiler.events()
    whole = next(e.time_range for e in events if e.name == "all steps")
    inside = [e.name for e in events if whole.start <= e.time_range.start < whole.end]
    waits = [name for name in inside if "Synchronize" in name or name == "cudaMemcpy"]
    assert not waits, waits
    launches = sum("LaunchKernel" in name for name in inside) / 10
    replays = sum("GraphLaunch" in name for name in inside) / 10
    assert replays == 2, replays  # forward and backward
    print(f"{launches:.0f} kernels launched one by one in a step, {replays:.0f} graphs")
    assert state.skipped_steps.item() == 0


def a_trial_serves_training() -> None:
    """What the trial compiled is what training runs; nothing is compiled twice."""
    set_determinism("fast", CUDA, None, compiled=True)
    x = torch.randn(32, 3, 16, 16, device=CUDA)
    inputs = x, torch.linspace(1, 999, 32, device=CUDA), torch.arange(32, device=CUDA) % 4
    found = trial(unet(), inputs, torch.bfloat16, replayed=True)
    assert 1e-5 < found.difference < 3e-2, found
    assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
    state, recipe, since = made()
    steps = since(0)
    for _ in range(6):
        train_step(recipe, state, next(steps))
    assert counters["stats"]["unique_graphs"] == 3, counters["stats"]  # the noise is two more
    print(f"difference {found.difference:.1e}, {found.seconds / found.plain_seconds:.2f} x as long")


def compiled_is_plain() -> None:
    """Weights after some steps in float32, however they were computed."""
    torch.backends.cudnn.allow_tf32 = False
    set_determinism("exact", CUDA, None, compiled=True)
    found = []
    for how in ({"compiled": False}, {}, {"pieces": 2}, {"compiled": False, "pieces": 2}):
        state, recipe, since = made(precision=torch.float32, **how)  # type: ignore[arg-type]
        begun, steps = weights(state).clone(), since(0)
        for _ in range(8):
            train_step(recipe, state, next(steps))
        found.append(weights(state) - begun)
    for moved in found[1:]:
        apart = (moved - found[0]).norm() / found[0].norm()
        # 2e-6 was seen; Adam divides by a gradient's size, so the least of them count whole.
        assert apart < 1e-4, apart
        print(f"apart {apart:.1e} of the way")


def resumes_bit_for_bit() -> None:
    """In `exact` mode, with dropout: a whole run, and one that is cut in two."""
    set_determinism("exact", CUDA, None, compiled=True)
    for how in ({"compiled": False}, {}, {"pieces": 2}):
        ends = []
        for cut in (6, 3):
            state, recipe, since = made(dropout=0.1, **how)  # type: ignore[arg-type]
            steps = since(0)
            for _ in range(cut):
                metrics = train_step(recipe, state, next(steps))
            if cut < 6:
                with TemporaryDirectory() as folder:
                    saved = save_checkpoint(state, Path(folder))
                    state, recipe, since = made(dropout=0.1, **how)  # type: ignore[arg-type]
                    load_checkpoint(state, saved)
                steps = since(state.images_seen)
                for _ in range(6 - cut):
                    metrics = train_step(recipe, state, next(steps))
            ends.append(digests(state, metrics))
        assert ends[0] == ends[1], (how, ends)
        print(how, ends[0]["weights"])


def draws_the_same_by_replaying() -> None:
    """A captured network gives the plain one's bits, and the loop over steps never waits."""
    set_determinism("exact", CUDA, None)
    plain = unet().eval()
    replay, schedule = Replay(plain), linear()
    cond = torch.arange(16, device=CUDA) % 4
    like = torch.empty(16, 3, 16, 16, device=CUDA)
    for solver in (dpmpp_2m, euler_ancestral):
        ends = []
        for network in (plain, replay, replay):

            def denoise(x: Tensor, t: Tensor, network=network):  # type: ignore[no-untyped-def]
                with torch.autocast("cuda", torch.bfloat16):
                    return Denoiser(network, schedule, v)(x, t, cond)

            noise = ImageNoise(0, torch.arange(16))
            states = trajectory(denoise, schedule, solver, uniform(schedule, 12), noise, like)
            for _ in range(4):
                next(states)
            torch.cuda.set_sync_debug_mode("error")
            *_, end = states
            torch.cuda.set_sync_debug_mode("default")
            ends.append(end)
        assert ends[0].isfinite().all()
        assert all(torch.equal(ends[0], end) for end in ends[1:])
    assert [type(known) for known in replay._known.values()] == [_Captured]
    x = torch.randn(8, 3, 16, 16, device=CUDA, requires_grad=True)
    replay(x, torch.ones(8, device=CUDA), cond[:8]).sum().backward()
    assert x.grad is not None


def chooses_by_values() -> None:
    """A network that cannot be captured is asked as it is."""

    class Choosing(torch.nn.Module):
        def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
            return x if label.sum() > 0 else -x

    replay, x = Replay(Choosing()), torch.randn(2, 3, device=CUDA)
    with torch.inference_mode():
        for _ in range(4):
            assert torch.equal(replay(x, torch.ones(2, device=CUDA)), x)
            assert torch.equal(replay(x, -torch.ones(2, device=CUDA)), -x)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def norms_agree() -> None:
    """The formula that the compiler fuses is torch's group norm, in float64, with gradients."""
    compiled = torch.compile(group_norm)
    for dtype, mean, tolerance in ((torch.float32, 100.0, 3e-6), (torch.bfloat16, 0.0, 6e-3)):
        torch.manual_seed(0)
        x = (2 * torch.randn(4, 24, 6, 6, device=CUDA) + mean).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        given = [torch.randn(24, device=CUDA, requires_grad=True) for _ in range(2)]
        changed = [torch.randn(4, 24, device=CUDA, requires_grad=True) for _ in range(2)]
        y = compiled(x, *given, 6, 1e-6, *changed)
        assert y.dtype is dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        exact = [a.detach().double().requires_grad_() for a in (x, *given, *changed)]
        scale, shift = (m[:, :, None, None] for m in exact[3:])
        wanted = F.group_norm(exact[0], 6, *exact[1:3], 1e-6) * (1 + scale) + shift
        g = torch.randn_like(wanted)
        y.backward(g.to(dtype))
        wanted.backward(g.to(dtype).double())
        pairs = [(a.grad, b.grad) for a, b in zip((x, *given, *changed), exact, strict=True)]
        for mine, theirs in [*pairs, (y, wanted)]:
            apart = ((mine - theirs).norm() / theirs.norm()).item()
            assert apart < tolerance, (dtype, apart)


if __name__ == "__main__":
    {
        work.__name__: work
        for work in (
            waits_for_nothing,
            a_trial_serves_training,
            compiled_is_plain,
            resumes_bit_for_bit,
            draws_the_same_by_replaying,
            chooses_by_values,
            norms_agree,
        )
    }[sys.argv[1]]()
