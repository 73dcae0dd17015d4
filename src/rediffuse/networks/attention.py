"""Self-attention over the positions of a feature map."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from rediffuse.errors import ConfigError
from rediffuse.networks.norms import Norm, group, zero


class Attention(nn.Module):
    """Norm, softmax attention, projection, added to the input (Ho et al. 2020, App. B).

    `head_channels` asks for as many heads as channels allow (Dhariwal & Nichol 2021, Sec. 3.1), else
    there are `heads`.

    Raises:
        ConfigError: if heads cannot be equally wide.
    """

    def __init__(
        self, channels: int, *, norm: Norm = group, heads: int = 1, head_channels: int | None = None
    ) -> None:
        super().__init__()
        self.heads = channels // head_channels if head_channels else heads
        if channels % (head_channels or heads):
            asked = f"heads of {head_channels} channels" if head_channels else f"{heads} heads"
            possible = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
            raise ConfigError(
                f"attention cannot split {channels} channels into {asked}; numbers that divide "
                f"{channels}: {possible}"
            )
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            self.qkv(tokens), "b n (three k d) -> three b k n d", three=3, k=self.heads
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(rearrange(h, "b k n d -> b n (k d)"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
