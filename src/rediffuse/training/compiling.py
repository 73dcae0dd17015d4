"""A compiled network is checked against the plain one, and taken where it is faster."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rediffuse.errors import TrainingError
from rediffuse.networks.convolutions import Convolution
from rediffuse.networks.fused import try_loops
from rediffuse.networks.norms import GroupNorm
from rediffuse.randomness import Normal, normal

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far outputs and gradients of the compiled network may lie from the plain one's (Trial)."""

_ROUNDS, _FEWEST_ROUNDS, _LONG_ENOUGH_S = 3, 2, 5.0


def compile_network(network: nn.Module, device: torch.device, *, replayed: bool = False) -> None:
    """Let torch's compiler fuse what it can, in place, and lay the network out channels-last.

    On a CPU these are the group norms (`networks.fused`): compiling all the rest took minutes and
    gained nothing. Convolutions are a library's there, but for the gradients of wide ones in
    float32 (`networks.convolutions`). Elsewhere it is the whole network. Its kernels are `replayed`
    together as CUDA graphs where that is asked for; gradients then lie in the graph's memory, which
    the next forward pass overwrites. Nothing is compiled before that: without a compiler it raises
    a RuntimeError (`try_compiler`).
    """
    network.to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, GroupNorm | Convolution):
            module.fast = True
    if device.type != "cpu":
        network.compile(mode="reduce-overhead" if replayed else "default")


def try_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        TrainingError: if there is no compiler that works.
    """
    try:
        if device.type == "cpu":
            try_loops()
        else:
            torch.compile(torch.square)(torch.ones(8, device=device))
    except RuntimeError as failed:
        raise _no_compiler(failed) from failed


def compile_noise(device: torch.device) -> Normal:
    """`randomness.normal` in one kernel on a GPU, where it is 300 small ones; else as it is.

    Words stay as they are, the normal numbers may differ in their last digit.
    """
    compiled: Normal = torch.compile(normal) if device.type == "cuda" else normal
    return compiled


def _no_compiler(failed: RuntimeError) -> TrainingError:
    why = str(failed).strip().splitlines()[0]
    return TrainingError(
        f"training.compile: the compiler failed ({why[:200]}); install a C++ compiler such as g++, "
        "or set training.compile=false"
    )


@dataclass(frozen=True)
class Trial:
    """How a compiled network compares with the plain one on the same images.

    `difference` is the norm of the difference of outputs and weights' gradients, relative to the
    plain ones' norm; `seconds` and `plain_seconds` are those of the faster of two or three forward
    and backward passes, since other work may disturb one.
    """

    difference: float
    seconds: float
    plain_seconds: float
    precision: torch.dtype

    @property
    def pays(self) -> bool:
        """Whether the compiled network is clearly faster; a close race would be decided anew."""
        return self.seconds < 0.95 * self.plain_seconds

    @property
    def agrees(self) -> bool:
        """Whether the difference is one that the precision explains."""
        return self.difference <= TOLERANCES[self.precision]


def trial(
    network: nn.Module,
    inputs: Sequence[Tensor | None],
    precision: torch.dtype = torch.float32,
    *,
    replayed: bool = False,
) -> Trial:
    """Compile a copy of a network and compare it with another copy; the network is not touched.

    Weights that begin as 0, which would hide what lies before them, are small numbers in the
    copies. `inputs` are the network's own: images, labels and perhaps classes. What is compiled for
    them serves every network of the same build, as long as its batches have the same shapes.

    Raises:
        TrainingError: if there is no compiler that works.
    """
    plain = copy.deepcopy(network).eval()
    with torch.no_grad():
        for number, weight in enumerate(p for p in plain.parameters() if not p.any()):
            ramp = torch.arange(weight.numel(), device=weight.device) * 0.7 + number
            weight.copy_(0.05 * ramp.cos().view_as(weight))
    compiled = copy.deepcopy(plain)
    compile_network(compiled, next(network.parameters()).device, replayed=replayed)
    expected = _answer(plain, inputs, precision)
    try:
        answer = _answer(compiled, inputs, precision)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failed:
        raise _no_compiler(failed) from failed
    differing = ((answer - expected).norm() / expected.norm()).item()
    seconds: dict[nn.Module, list[float]] = {compiled: [], plain: []}
    began = time.perf_counter()
    for turn in range(_ROUNDS):
        if turn >= _FEWEST_ROUNDS and time.perf_counter() - began > _LONG_ENOUGH_S:
            break
        for either, taken in seconds.items():
            start = time.perf_counter()
            _answer(either, inputs, precision)
            taken.append(time.perf_counter() - start)
    return Trial(differing, min(seconds[compiled]), min(seconds[plain]), precision)


def _answer(network: nn.Module, inputs: Sequence[Tensor | None], precision: torch.dtype) -> Tensor:
    """The output and the weights' gradients, each of norm 1, in one vector; waits for them."""
    network.zero_grad()
    device = next(network.parameters()).device
    with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
        output = network(*inputs).float()
    output.square().mean(dim=0).sum().backward()  # large enough for float16
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    parts = (output.detach().flatten(), torch.cat(gradients).float())
    both = torch.cat([part / part.norm() for part in parts])
    both[0].item()
    return both
