"""From a noise level's label, and a class, to one vector per image."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from rediffuse.errors import ConfigError


def sinusoidal(label: Float[Tensor, " batch"], dim: int) -> Float32[Tensor, "batch {dim}"]:
    """[sin(f·label), cos(f·label)] for dim/2 values of f, from 1 to 1/10000 in a geometric row.

    Vaswani et al. 2017, Sec. 3.5, in the order of Ho et al. 2020's code. `dim` is even, at least 4.
    Always float32: bfloat16 would turn label 999 into 1000.
    """
    steps = torch.arange(dim // 2, dtype=torch.float32, device=label.device)
    frequencies = torch.exp(-math.log(10_000) * steps / (dim // 2 - 1))
    angle = label.float()[:, None] * frequencies
    return torch.cat((angle.sin(), angle.cos()), dim=1)


class Embedding(nn.Module):
    """A two-layer MLP of the label, plus a row for the class (Ho et al. 2020, App. B).

    The class is added as in Dhariwal & Nichol 2021, Sec. 3; with `null_class` the table has one row
    more, number `num_classes`, for images whose class is not told. `base` is as for `sinusoidal`.
    Float32 even under autocast.
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
            waves = sinusoidal(label, self.base).to(self.linear_1.weight.dtype)
            embedding: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
            row = self._row(cond)
            return embedding if row is None else embedding + row

    def _row(self, cond: Tensor | None) -> Tensor | None:
        if self.classes is None and cond is not None:
            raise ConfigError(
                "this network was built without classes, but cond was given; "
                "leave cond out, or build it with num_classes"
            )
        if self.classes is not None and cond is None:
            raise ConfigError(
                "this network was built with classes, but no cond was given; "
                f"give one class index per image, 0 .. {self.classes.num_embeddings - 1}"
            )
        return None if self.classes is None else self.classes(cond)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off; `meta`, where parameters and FLOPs are counted, has none."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
