"""From a noise level's label, and a class, to one vector per image."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rediffuse.errors import ConfigError


def sinusoidal(label: Float[Tensor, " batch"], dim: int) -> Float[Tensor, "batch {dim}"]:
    """[sin(f·label), cos(f·label)], f from 1 down to 1/10000 (Vaswani et al. 2017, Sec. 3.5; Ho et al. 2020).

    `dim` is even and at least 4. Always float32: bfloat16 would turn label 999 into 1000.
    """
    steps = torch.arange(dim // 2, dtype=torch.float32, device=label.device)
    frequencies = torch.exp(-math.log(10_000) * steps / (dim // 2 - 1))
    angle = label.float()[:, None] * frequencies
    return torch.cat((angle.sin(), angle.cos()), dim=1)


class Embedding(nn.Module):
    """SiLU of an MLP of the label plus a row per class (Ho et al. 2020; Dhariwal & Nichol 2021, Sec. 3.1).

    `null_class` adds row `num_classes`, for images whose class is not told. `base` is even.
    """

    def __init__(
        self, base: int, dim: int, *, num_classes: int = 0, null_class: bool = False
    ) -> None:
        super().__init__()
        self.base = base
        self.linear_1 = nn.Linear(base, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.classes = nn.Embedding(num_classes + null_class, dim) if num_classes else None

    def forward(
        self, label: Float[Tensor, " batch"], cond: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch dim"]:
        with _without_autocast(label.device):
            wave = sinusoidal(label, self.base).to(self.linear_1.weight.dtype)
            h = self.linear_2(F.silu(self.linear_1(wave)))
            return F.silu(self._add_class(h, cond))

    def _add_class(self, h: Tensor, cond: Tensor | None) -> Tensor:
        if self.classes is None:
            if cond is not None:
                raise ConfigError(
                    "this network knows no classes, but cond was given; leave it out, "
                    "or build the network with num_classes"
                )
            return h
        if cond is None:
            raise ConfigError(
                f"this network needs cond, one class index per image "
                f"(0 .. {self.classes.num_embeddings - 1}), but none was given"
            )
        row: Tensor = self.classes(cond)
        return h + row


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep float32 where a device has autocast; `meta`, where shapes and FLOPs are counted, has none."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
