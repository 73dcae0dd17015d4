"""3x3 convolutions whose gradients take fewer multiplications, on a CPU in float32.

By Winograd's minimal filtering (Lavin & Gray 2016, Sec. 4.1) a tile of 2x2 pixels takes 16
multiplications for each pair of channels where there were 36, and they are matrix products. Against
oneDNN 3.13 on two AVX2 cores, from 128 channels on, the gradient of the weights takes half of the
time and is nearer to the exact one, as its sums are shorter; that of the images takes four fifths.
Forward passes would gain little, and are the library's, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Images = Float[Tensor, "batch height width channel"]
Tiles = Float[Tensor, "16 tile channel"]
Weights = Float[Tensor, "out_c in_c 3 3"]

_FEWEST_CHANNELS = 128  # fewer are convolved as fast as they are made into tiles
_TILES_AT_ONCE = 512  # 4-16 MB, which a cache holds: 2 images of 32x32 pixels


class Convolution(nn.Conv2d):
    """3x3, of stride 1, padded by zeros: torch's; once `fast`, with `gradients`."""

    fast = False

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "batch in_c height width"]
    ) -> Float[Tensor, "batch out_c height width"]:
        if self.fast and _pays(x, self.weight):
            answer: Tensor = _Convolution.apply(x, self.weight, self.bias)
            return answer
        return super().forward(x)


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and min(weight.shape[:2]) >= _FEWEST_CHANNELS
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), g = ctx.saved_tensors, grads[0]
        return *gradients(x, weight, g), g.sum(dim=(0, 2, 3))


def gradients(
    x: Float[Tensor, "batch in_c height width"],
    weight: Weights,
    g: Float[Tensor, "batch out_c height width"],
) -> tuple[Float[Tensor, "batch in_c height width"], Weights]:
    """dL/dx and dL/dw of y = conv2d(x, w, padding=1), for dL/dy = g; channels-last is fastest.

    A tile of 2x2 pixels of y is Aᵀ[(G w Gᵀ) ⊙ (Bᵀ x B)]A for the 4x4 pixels of x that it sees
    (Lavin & Gray 2016, Sec. 4.1). With the tile's m = A g Aᵀ, it adds B[(G w Gᵀ) ⊙ m]Bᵀ to those
    pixels' gradient, and Gᵀ[m ⊙ (Bᵀ x B)]G to that of w.
    """
    (height, width), channels = x.shape[2:], weight.shape[:2]
    even = (0, width % 2, 0, height % 2)
    x, g = (F.pad(images, even) if any(even) else images for images in (x, g))
    images_at_once = max(1, _TILES_AT_ONCE // (x[0, 0].numel() // 4))
    parts = (images.permute(0, 2, 3, 1).split(images_at_once) for images in (x, g))
    both = torch.kron(_G, _G)
    filters = (both @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(16, *channels)
    d_x, d_filters = [], torch.zeros_like(filters)
    for some_x, some_g in zip(*parts, strict=True):
        m = _of_g(some_g)
        d_x.append(_to_x(m @ filters, some_x.shape))
        d_filters.baddbmm_(m.transpose(1, 2), _of_x(some_x))
    d_weight = (both.T @ d_filters.flatten(1)).view(3, 3, *channels)
    all_x = torch.cat(d_x)[:, :height, :width]
    return all_x.permute(0, 3, 1, 2), d_weight.permute(2, 3, 0, 1)


_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def _of_x(x: Images) -> Tiles:
    """Bᵀ x B of each tile's 4x4 pixels, which overlap."""
    batch, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    rows = x.new_empty(4, batch, height // 2, width + 2, channels)
    _times_bt([padded[:, i : i + height : 2] for i in range(4)], rows.unbind())
    tiles = x.new_empty(4, 4, batch, height // 2, width // 2, channels)
    _times_bt([rows[:, :, :, j : j + width : 2] for j in range(4)], tiles.unbind(1))
    return tiles.view(16, -1, channels)


def _of_g(g: Images) -> Tiles:
    """A g Aᵀ of each tile's 2x2 pixels."""
    batch, height, width, channels = g.shape
    rows = g.new_empty(4, batch, height // 2, width, channels)
    _times_a([g[:, i::2] for i in range(2)], rows.unbind())
    tiles = g.new_empty(4, 4, batch, height // 2, width // 2, channels)
    _times_a([rows[:, :, :, j::2] for j in range(2)], tiles.unbind(1))
    return tiles.view(16, -1, channels)


def _to_x(tiles: Tiles, shape: torch.Size) -> Images:
    """B t Bᵀ of each tile, added up where they overlap; what falls on the padding is left out."""
    batch, height, width, channels = shape
    columns = tiles.view(4, 4, batch, height // 2, width // 2, channels).unbind()
    rows = tiles.new_empty(4, batch, height, width // 2, channels)
    _times_b(columns, rows[:, :, 0::2], rows[:, :, 1::2])
    x = tiles.new_empty(shape)
    _times_b(rows.unbind(), x[:, :, 0::2], x[:, :, 1::2])
    return x


def _times_bt(x: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    torch.sub(x[0], x[2], out=out[0])
    torch.add(x[1], x[2], out=out[1])
    torch.sub(x[2], x[1], out=out[2])
    torch.sub(x[1], x[3], out=out[3])


def _times_a(g: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    out[0].copy_(g[0])
    torch.add(g[0], g[1], out=out[1])
    torch.sub(g[0], g[1], out=out[2])
    torch.neg(g[1], out=out[3])


def _times_b(t: Sequence[Tensor], even: Tensor, odd: Tensor) -> None:
    """Of the four pixels of a tile the middle ones are its own, the others its neighbours'."""
    torch.sub(t[1], t[2], out=even).add_(t[3])
    even[:, :, 1:].sub_(t[3][:, :, :-1])
    torch.add(t[1], t[2], out=odd).sub_(t[0])
    odd[:, :, :-1].add_(t[0][:, :, 1:])
