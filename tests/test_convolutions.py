"""The convolution of a compiled network is torch's; its gradients are held to float64's."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rediffuse.networks.convolutions import Convolution, gradients
from rediffuse.training.compiling import compile_network


def images(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


Images = tuple[Tensor, Tensor, Tensor]


def some(batch: int, channels: tuple[int, int], size: tuple[int, int]) -> Images:
    """Images, weights, and a gradient of what they give together."""
    torch.manual_seed(0)
    weight = torch.randn(channels[1], channels[0], 3, 3)
    return images(batch, channels[0], *size), weight, images(batch, channels[1], *size)


def errors(found: Sequence[Tensor], given: Images) -> list[float]:
    """How far gradients of images and weights lie from those in float64, relative to these."""
    x, weight, g = (a.detach().double() for a in given)
    exact = (
        torch.nn.grad.conv2d_input(x.shape, weight, g, padding=1),
        torch.nn.grad.conv2d_weight(x, weight.shape, g, padding=1),
    )
    return [((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize(
    ("batch", "size"),
    # odd sides, a pixel, more images than are taken at once, images of more tiles than those
    [(4, (8, 8)), (3, (7, 7)), (2, (5, 8)), (2, (1, 1)), (70, (8, 10)), (1, (66, 64))],
)
def test_gradients_are_those_of_float64(batch: int, size: tuple[int, int]) -> None:
    given = some(batch, (7, 5), size)
    assert max(errors(gradients(*given), given)) < 2e-6  # float32, up to 5,600 pixels a sum


def test_long_sums_are_near_to_those_of_float64() -> None:
    """25,088 products a sum; added one by one in float32, a quarter of them err by 1.2e-6.

    oneDNN's own error depends on the processor's instructions (5e-7 to 3e-6 here), so it is no
    measure.
    """
    given = some(32, (128, 128), (28, 28))
    of_x, of_weight = errors(gradients(*given), given)
    assert of_weight < 8e-7
    assert of_x < 5e-7  # 9 x 128 products a sum


@pytest.mark.parametrize("asks_x", [True, False])
def test_a_fast_convolution_is_torchs(asks_x: bool) -> None:
    layer = Convolution(128, 130).to(memory_format=torch.channels_last)
    layer.fast = True
    x, _, g = some(3, (128, 130), (7, 6))
    y = layer(x.requires_grad_(asks_x))
    assert "_Convolution" in y.grad_fn.name()
    assert y.equal(F.conv2d(x, layer.weight, layer.bias, padding=1))
    y.backward(g)
    weight, bias = layer.weight.grad, layer.bias.grad
    found = (x.grad, weight) if asks_x else gradients(x, layer.weight.detach(), g)
    assert max(errors(found, (x, layer.weight, g))) < 1e-6
    assert weight.equal(found[1])
    assert weight.stride() == layer.weight.stride()
    torch.testing.assert_close(bias, g.sum(dim=(0, 2, 3)))


@pytest.mark.parametrize("otherwise", ["plain", "narrow", "bfloat16", "frozen", "drawing"])
def test_where_it_does_not_pay_it_is_torchs_own(otherwise: str) -> None:
    layer = Convolution(128, 64 if otherwise == "narrow" else 128)
    layer.fast = otherwise != "plain"
    layer.weight.requires_grad_(otherwise != "frozen")
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=otherwise == "bfloat16"),
        torch.set_grad_enabled(otherwise != "drawing"),
    ):
        y = layer(images(1, 128, 4, 4))
    assert y.grad_fn is None or y.grad_fn.name() == "ConvolutionBackward0"


def test_a_compiled_networks_are_fast() -> None:
    layer = Convolution(128, 128)
    compile_network(nn.Sequential(nn.SiLU(), layer), torch.device("cpu"))
    assert layer.fast
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
