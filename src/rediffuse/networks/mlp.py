"""A residual network of fully connected layers, for points and tiny images."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from rediffuse.networks.blocks import zero
from rediffuse.networks.embeddings import Embedding
from rediffuse.ranges import Depth, Width


class MLP(nn.Module):
    """Flatten the image, add `depth` residual layers of `width` that know the noise level.

    Points of n numbers are images of n channels and one pixel. A new network answers 0 to
    everything.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        image_size: int,
        num_classes: int = 0,
        null_class: bool = False,
        width: Width = 256,
        depth: Depth = 4,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.embedding = Embedding(width, width, num_classes=num_classes, null_class=null_class)
        self.first = nn.Linear(in_channels * image_size**2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = zero(nn.Linear(width, out_channels * image_size**2))

    def forward(
        self,
        x: Float[Tensor, "batch in_c height width"],
        label: Float[Tensor, " batch"],
        cond: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out_c height width"]:
        embedding = F.silu(self.embedding(label, cond))
        h = self.first(x.flatten(1))
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            scale, shift = modulation(embedding).chunk(2, dim=1)
            h = h + layer(F.silu(self.norm(h) * (1 + scale) + shift))
        size = self.image_size
        return rearrange(self.last(F.silu(h)), "b (c h w) -> b c h w", h=size, w=size)
