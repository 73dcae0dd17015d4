"""Self-attention over the positions of a feature map."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from rediffuse.errors import ConfigError
from rediffuse.networks.blocks import zero
from rediffuse.networks.norms import Norm, divisors, group

Heads = Float[Tensor, "batch head token channel"]

# On a CPU the formula beats the fused kernel in bfloat16 up to here: forward and backward of
# Attention took 1/1.8 to 1/2.9 of the time at 49 and 64 tokens, 1/1.7 at 144 and 1/1.3 at 256 (one
# Zen 4 core). In float32 the kernel is never slower.
_FEW_TOKENS = 256


class Attention(nn.Module):
    """Norm, softmax attention and projection, added to the input (Ho et al. 2020, App. B).

    There are `heads` heads; `head_channels` instead says how wide each is (64 in Dhariwal & Nichol
    2021, Sec. 3.1).

    Raises:
        ConfigError: if the heads cannot be equally wide.
    """

    def __init__(
        self, channels: int, *, norm: Norm = group, heads: int = 1, head_channels: int | None = None
    ) -> None:
        super().__init__()
        parts = heads if head_channels is None else head_channels
        if parts < 1 or channels % parts:
            asked = f"{heads} heads" if head_channels is None else f"heads of {head_channels}"
            raise ConfigError(
                f"attention cannot split {channels} channels into {asked}; "
                f"numbers that divide {channels}: {divisors(channels)}"
            )
        self.heads = heads if head_channels is None else channels // head_channels
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        # A token's channels lie together: where x is channels_last, these are all views.
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(self.qkv(tokens), "b n (qkv k d) -> qkv b k n d", qkv=3, k=self.heads)
        h = self.out(rearrange(attend(q, k, v), "b k n d -> b n (k d)"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


def attend(q: Heads, k: Heads, v: Heads) -> Heads:
    """softmax(q·kᵀ/√d)·v (Vaswani et al. 2017, Eq. 1); every softmax sums in float32."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= _FEW_TOKENS:
        return ((q * q.shape[3] ** -0.5) @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
