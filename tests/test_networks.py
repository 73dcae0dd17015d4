"""Networks: published sizes, a reference library, and laws of shape, precision and independence."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rediffuse.errors import ConfigError
from rediffuse.networks import fused
from rediffuse.networks.attention import Attention, attend
from rediffuse.networks.blocks import ResidualBlock, repeated
from rediffuse.networks.embeddings import sinusoidal
from rediffuse.networks.norms import batch, group, instance, layer
from rediffuse.networks.unet import UNet

PUBLISHED = {
    "DDPM CIFAR-10": {"in_channels": 3, "out_channels": 3, "image_size": 32},
    "DDPM 256": {
        "in_channels": 3,
        "out_channels": 3,
        "image_size": 256,
        "channel_multipliers": (1, 1, 2, 2, 4, 4),
    },
    "improved DDPM CIFAR-10": {
        "in_channels": 3,
        "out_channels": 6,
        "image_size": 32,
        "blocks_per_level": 3,
        "attention_resolutions": (16, 8),
        "heads": 4,
        "scale_shift": True,
    },
    "ADM ImageNet-64": {
        "in_channels": 3,
        "out_channels": 6,
        "image_size": 64,
        "num_classes": 1000,
        "base_channels": 192,
        "channel_multipliers": (1, 2, 3, 4),
        "blocks_per_level": 3,
        "attention_resolutions": (32, 16, 8),
        "head_channels": 64,
        "scale_shift": True,
        "residual_resampling": True,
    },
}

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "image_size": 8,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
    "norm": partial(group, groups=4),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "grey": {"in_channels": 1, "out_channels": 1},
    "two channels, 20 pixels": {
        "in_channels": 2,
        "out_channels": 2,
        "image_size": 20,
        "attention_resolutions": (),
    },
    "four channels, 12 pixels": {
        "in_channels": 4,
        "out_channels": 8,
        "image_size": 12,
        "attention_resolutions": (12, 6),
    },
    "one level": {"channel_multipliers": (2,), "attention_resolutions": (8,)},
    "four levels, down to a pixel": {
        "channel_multipliers": (1, 1, 2, 2),
        "attention_resolutions": (2, 1),
    },
    "scale-shift, four heads": {"scale_shift": True, "heads": 4},
    "adm": {
        "scale_shift": True,
        "residual_resampling": True,
        "head_channels": 8,
        "num_classes": 5,
        "null_class": True,
    },
    "residual resampling": {"residual_resampling": True, "blocks_per_level": 2},
    "layer norm": {"norm": layer},
    "instance norm": {"norm": instance, "scale_shift": True},
    "batch norm": {"norm": batch},
}


Network = TypeVar("Network", bound=nn.Module)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as little as these spend their time waking threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(**changes: Any) -> UNet:
    """A little network whose every weight is random, so that nothing is hidden behind zeros."""
    return randomised(UNet(**SMALL | changes))


def randomised(network: Network) -> Network:
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 4
        nn.init.normal_(weight, std=fan_in**-0.5, generator=generator)
    return network


def inputs(network: UNet, size: int = 8, images: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(images, network.conv_in.in_channels, size, size, generator=generator)
    label = torch.tensor([1.0, 321.0, 1000.0, 17.0])[:images]
    cond = torch.arange(images) if network.embedding.classes else None
    return x, label, cond


@pytest.mark.parametrize(
    ("name", "parameters", "forward_gflop"),
    [
        ("DDPM CIFAR-10", 35_746_307, 12.44),
        ("DDPM 256", 113_673_219, None),
        ("improved DDPM CIFAR-10", 52_546_438, 16.77),
        ("ADM ImageNet-64", 295_904_454, 219.3),
    ],
)
def test_published_networks_have_their_parameters_and_flops(
    name: str, parameters: int, forward_gflop: float | None
) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = UNet(**PUBLISHED[name])
        size = PUBLISHED[name]["image_size"]
        cond = torch.empty(1, dtype=torch.long) if network.embedding.classes else None
        network(torch.empty(1, 3, size, size), torch.empty(1), cond)
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    if forward_gflop:
        assert counter.get_total_flops() / 1e9 == pytest.approx(forward_gflop, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
def test_unet_is_the_ddpm_unet_of_diffusers(dtype: torch.dtype, tolerance: float) -> None:
    theirs = randomised(
        UNet2DModel(
            sample_size=32,
            block_out_channels=(32, 64, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            norm_num_groups=16,
        )
    ).to(dtype)
    ours = UNet(
        in_channels=3,
        out_channels=3,
        image_size=32,
        base_channels=32,
        channel_multipliers=(1, 2, 2),
        norm=partial(group, groups=16),
    ).to(dtype)
    copy_from_diffusers(theirs, ours)
    x, label, _ = inputs(ours, size=32, images=2)
    with torch.no_grad():
        expected = theirs(x.to(dtype), label).sample
        torch.testing.assert_close(
            ours(x.to(dtype), label), expected, rtol=0, atol=tolerance * expected.std().item()
        )


def copy_from_diffusers(theirs: UNet2DModel, ours: UNet) -> None:
    """Give ours the weights of theirs; what is forgotten stays NaN."""
    for weight in ours.parameters():
        nn.init.constant_(weight, math.nan)
    copy_layer(theirs.time_embedding.linear_1, ours.embedding.linear_1)
    copy_layer(theirs.time_embedding.linear_2, ours.embedding.linear_2)
    copy_layer(theirs.conv_in, ours.conv_in)
    stages = iter([*ours.down, ours.middle, *ours.up])
    for block in theirs.down_blocks:
        for layers in rows(block):
            copy_row(layers, next(stages))
        if block.downsamplers:
            copy_row(block.downsamplers, next(stages))
    middle = theirs.mid_block
    copy_row([middle.resnets[0], middle.attentions[0], middle.resnets[1]], next(stages))
    for block in theirs.up_blocks:
        *before, last = rows(block)
        for layers in [*before, [*last, *(block.upsamplers or ())]]:
            copy_row(layers, next(stages))
    copy_layer(theirs.conv_norm_out, ours.norm_out)
    copy_layer(theirs.conv_out, ours.conv_out)


def rows(block: nn.Module) -> list[list[nn.Module]]:
    """A block's residual blocks, each with its attention if there is one."""
    attention = [block.attentions] if hasattr(block, "attentions") else []
    return [list(row) for row in zip(block.resnets, *attention, strict=True)]


def copy_row(theirs: Sequence[nn.Module], ours: Sequence[nn.Module]) -> None:
    for their_layer, our_layer in zip(theirs, ours, strict=True):
        copy_layer(their_layer, our_layer)


THEIR_NAMES = {
    "norm": "group_norm",
    "out": "to_out.0",
    "norm_1": "norm1",
    "conv_1": "conv1",
    "modulation": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "skip": "conv_shortcut",
}


def copy_layer(theirs: nn.Module, ours: nn.Module) -> None:
    weights = theirs.state_dict()
    for name, ours_weight in ours.state_dict().items():
        *layer_name, kind = name.split(".")
        if layer_name == ["qkv"]:
            value = torch.cat([weights[f"to_{part}.{kind}"] for part in "qkv"])
        else:
            their_name = [THEIR_NAMES.get(part, part) for part in layer_name]
            value = weights[".".join([*their_name, kind])]
        ours_weight.copy_(value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_answers_in_its_shape_and_learns_from_label_and_class(variant: str) -> None:
    settings = SMALL | VARIANTS[variant]
    network = small(**VARIANTS[variant])
    size = settings["image_size"]
    output = network(*inputs(network, size))
    assert output.shape == (3, settings["out_channels"], size, size)
    output.square().mean().backward()
    for name, weight in network.named_parameters():
        assert weight.grad.isfinite().all(), name
    told = [module.modulation for module in network.modules() if isinstance(module, ResidualBlock)]
    for layer_of_label in [
        network.embedding.linear_1,
        *told,
        *filter(None, [network.embedding.classes]),
    ]:
        assert layer_of_label.weight.grad.abs().max() > 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_network_answers_zero(variant: str) -> None:
    network = UNet(**SMALL | VARIANTS[variant])
    output = network(*inputs(network, (SMALL | VARIANTS[variant])["image_size"]))
    assert torch.equal(output, torch.zeros_like(output))


def test_new_residual_blocks_and_attention_change_nothing() -> None:
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    norm = partial(group, groups=2)
    assert torch.equal(ResidualBlock(8, 8, 6, norm=norm)(x, embedding), x)
    assert torch.equal(Attention(8, norm=norm)(x), x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_image_is_answered_independently_of_the_others(variant: str) -> None:
    network = small(**VARIANTS[variant]).eval()
    x, label, cond = inputs(network, (SMALL | VARIANTS[variant])["image_size"])
    together = network(x, label, cond)
    for j in range(len(x)):
        alone = network(x[j : j + 1], label[j : j + 1], None if cond is None else cond[j : j + 1])
        torch.testing.assert_close(together[j : j + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("null_class", "rows_of_table"), [(False, 5), (True, 6)])
def test_the_class_table_has_a_null_row_only_if_asked(null_class: bool, rows_of_table: int) -> None:
    network = UNet(**SMALL, num_classes=5, null_class=null_class)
    assert network.embedding.classes.num_embeddings == rows_of_table


def test_cond_is_given_if_and_only_if_the_network_has_classes() -> None:
    x, label, _ = inputs(small())
    with pytest.raises(ConfigError, match=r"without classes.*leave cond out"):
        small()(x, label, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"no cond was given.*0 \.\. 5"):
        small(num_classes=5, null_class=True)(x, label)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size": 30, "channel_multipliers": (1, 1, 1, 1)},
            "30 cannot be halved 3 times.* 24, 32$",
        ),
        ({"image_size": 3, "channel_multipliers": (1, 1, 1)}, "3 cannot be halved 2 times.*: 4$"),
        ({"attention_resolutions": (16,)}, r"\[16\] names no feature map.* are 8, 4 pixels"),
        ({"norm": partial(group, groups=5)}, "16 channels into 5 .* divide 16: 1, 2, 4, 8, 16$"),
        ({"norm": partial(group, groups=0)}, "16 channels into 0 equal groups"),
        ({"heads": 3}, "32 channels into 3 heads.* divide 32: 1, 2, 4, 8, 16, 32$"),
        ({"heads": 0}, "32 channels into 0 heads"),
        ({"head_channels": 64}, "32 channels into heads of 64"),
        ({"norm": instance}, "subtracts what the noise level adds; use scale_shift=true"),
        ({"norm": partial(group, groups=16)}, "subtracts what the noise level adds"),
        ({"base_channels": 3}, "even and at least 4, not 3"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers"),
        ({"blocks_per_level": 0}, "blocks_per_level must be at least 1"),
        ({"dropout": 1.5}, "dropout must be a probability below 1"),
    ],
)
def test_what_cannot_work_is_refused_and_what_can_is_named(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        UNet(**SMALL | changes)


def test_attention_sits_where_it_is_asked_and_in_the_middle() -> None:
    def attentions(**changes: Any) -> int:
        return sum(isinstance(m, Attention) for m in UNet(**SMALL | changes).modules())

    assert attentions(attention_resolutions=()) == 1
    assert attentions(attention_resolutions=(8,)) == 1 + 1 + 2
    assert attentions(attention_resolutions=(8, 4, 99)) == 1 + 2 * (1 + 2)


def test_sinusoidal_embedding_is_ddpms() -> None:
    sin = [-0.54402113, 0.44767088, 0.02154268, 0.001]
    cos = [-0.83907151, 0.89419842, 0.9997679, 0.99999952]
    torch.testing.assert_close(
        sinusoidal(torch.tensor([10.0]), 8), torch.tensor([sin + cos]), rtol=0, atol=1e-6
    )


def test_embedding_is_float32_under_autocast() -> None:
    embedding = small().embedding
    label = torch.tensor([999.0, 1000.0])
    expected = embedding(label, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedding(label, None), expected)


@pytest.mark.parametrize("norm", [group, layer, instance, batch])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_statistics_are_float32_under_autocast(
    norm: Callable[[int], nn.Module], dtype: torch.dtype
) -> None:
    # A mean of 99.7, rounded to bfloat16, would be off by a quarter of the deviation.
    x = (99.7 + torch.randn(8, 32, 8, 8, generator=torch.Generator().manual_seed(3))).to(dtype)
    normalise = partial(group, groups=8) if norm is group else norm
    with torch.autocast("cpu", dtype=dtype):
        answered = normalise(32)(x)
    expected = normalise(32).double()(x.double())
    torch.testing.assert_close(answered.double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("variant", ["ddpm", "adm", "batch norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_answers_like_float32(variant: str, dtype: torch.dtype) -> None:
    network = small(**VARIANTS[variant])
    given = inputs(network)
    with torch.no_grad():
        expected = network(*given)
        with torch.autocast("cpu", dtype=dtype):
            answered = network(*given)
    assert (answered.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(("tokens", "dtype"), [(16, torch.bfloat16), (256, torch.bfloat16)])
def test_attention_by_its_formula_is_the_fused_kernel(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 2, tokens, 8, generator=torch.Generator().manual_seed(4)).to(dtype)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attend(q, k, v).double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_the_group_norm_that_a_gpus_compiler_is_given_is_torchs(mean: float) -> None:
    random = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    x, weight, bias = 2 * random(4, 24, 6, 6) + mean, random(24), random(24)
    given = [value.requires_grad_() for value in (x, weight, bias, random(4, 24), random(4, 24))]
    exact = [value.detach().double().requires_grad_() for value in given]
    scale, shift = (value[:, :, None, None] for value in exact[3:])
    wanted = F.group_norm(exact[0], 6, *exact[1:3], 1e-6) * scale + shift
    y, g = fused.formula(*given, 6, 1e-6), random(4, 24, 6, 6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(g)
    wanted.backward(g.double())
    for mine, theirs in [
        (y, wanted),
        *((a.grad, b.grad) for a, b in zip(given, exact, strict=True)),
    ]:
        # float32 knows a mean of 50 deviations to 50 x 6e-8 of one
        assert (mine - theirs).norm() < (3e-6 if mean else 3e-7) * theirs.norm()


def test_pixels_that_a_gpus_compiler_repeats_are_interpolates() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    twice, wanted = repeated(x), F.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.equal(twice, wanted)
    assert twice.is_contiguous(memory_format=torch.channels_last)
    g = torch.randn_like(wanted)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, g) for y in (twice, wanted))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("variant", ["ddpm", "adm"])
def test_every_convolution_sees_the_memory_layout_of_the_input(
    variant: str, memory_format: torch.memory_format
) -> None:
    network = small(**VARIANTS[variant]).to(memory_format=memory_format)
    x, label, cond = inputs(network)
    strayed = []

    def look(module: nn.Module, given: tuple[Tensor]) -> None:
        if not given[0].is_contiguous(memory_format=memory_format):
            strayed.append(module)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    network(x.contiguous(memory_format=memory_format), label, cond)
    assert strayed == []


@pytest.mark.slow  # a whole run does it in test_compiling.py
def test_the_compiler_sees_one_graph() -> None:
    """In a process of its own: the compiler cannot look through the tests' checks of shapes."""
    program = """
import torch
from rediffuse.networks.unet import UNet
torch.set_num_threads(1)
for adm in (False, True):
    network = UNet(in_channels=3, out_channels=3, image_size=8, base_channels=32, num_classes=2,
                   channel_multipliers=(1, 2), attention_resolutions=(4,), scale_shift=True,
                   blocks_per_level=1, residual_resampling=adm)
    torch.nn.init.normal_(network.conv_out.weight)
    given = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 9.0]), torch.tensor([0, 1])
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(*given), network(*given))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
