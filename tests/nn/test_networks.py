"""Networks do what their docstrings say: every weight works, every input counts, and no example sees another.

Attention is held against its own formula written with einsum, the embedding of time against Vaswani's, the size of the
U-Net against the 35.7 million parameters that Ho et al. 2020 report for theirs.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genzoo.conditions import ClassLabels
from genzoo.nn.coupling import GlowNet
from genzoo.nn.dit import DiT
from genzoo.nn.layers import (
    Attention,
    ResBlock,
    SinusoidalEmbedding,
    TimeAndCondition,
    UpsampleConv2d,
    attend,
    group_norm,
)
from genzoo.nn.mlp import MLP, TimeMLP
from genzoo.nn.resnet import ConvDecoder, ConvEncoder, ConvNet, resolutions
from genzoo.nn.unet import UNet

CLASSES = 3
CONDITION = ClassLabels(CLASSES)
# Each network as a family builds it, shapes of one input and one output, and whether the time is an input.
NETWORKS = {
    "MLP": (functools.partial(MLP, width=8, depth=2), (2,), (3,), False),
    "MLP-zero": (functools.partial(MLP, width=8, depth=2, zero_init=True), (2,), (3,), False),
    "TimeMLP": (functools.partial(TimeMLP, width=8, depth=2), (2,), (2,), True),
    "ConvEncoder": (functools.partial(ConvEncoder, width=4), (1, 8, 8), (5,), False),
    "ConvEncoder-critic": (functools.partial(ConvEncoder, width=4, norm=False), (1, 8, 8), (1,), False),
    "ConvEncoder-plain": (functools.partial(ConvEncoder, width=4, blocks=0), (1, 8, 8), (1,), False),
    "ConvDecoder": (functools.partial(ConvDecoder, width=4), (5,), (1, 8, 8), False),
    "ConvDecoder-plain": (functools.partial(ConvDecoder, width=4, blocks=0, norm=False), (5,), (1, 8, 8), False),
    "ConvNet": (functools.partial(ConvNet, width=8, blocks=2), (2, 8, 8), (4, 8, 8), False),
    "GlowNet": (functools.partial(GlowNet, width=8), (2, 8, 8), (4, 8, 8), False),
    "UNet": (functools.partial(UNet, channels=8, multipliers=(1, 2), attention=(8,)), (1, 8, 8), (1, 8, 8), True),
    "UNet-patch": (functools.partial(UNet, channels=8, multipliers=(1, 2), patch=2), (1, 8, 8), (1, 8, 8), True),
    "DiT": (functools.partial(DiT, patch=4, width=8, layers=2, heads=2), (1, 8, 8), (1, 8, 8), True),
    "DiT-convolution": (functools.partial(DiT, width=8, layers=2, convolution=True), (1, 8, 8), (1, 8, 8), True),
}
every = pytest.mark.parametrize("name", NETWORKS)
classes = pytest.mark.parametrize("condition", [None, CONDITION], ids=["unconditional", "conditional"])


def built(name: str, condition: ClassLabels | None = None, moved: bool = True) -> nn.Module:
    """Build a network in float64 and move all of its weights away from zero."""
    network, in_shape, out_shape, _ = NETWORKS[name]
    torch.manual_seed(0)
    module = network(in_shape, out_shape, condition).double()
    if moved:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return module


def inputs(name: str, n: int, condition: ClassLabels | None = None) -> tuple[torch.Tensor, ...]:
    """Make up an input of a network: x, the time where it is an input, classes of a conditional one."""
    _, in_shape, _, timed = NETWORKS[name]
    x = torch.randn(n, *in_shape, dtype=torch.float64)
    t = (torch.linspace(0.1, 0.8, n, dtype=torch.float64),) if timed else ()
    return x, *t, *((torch.arange(n) % CLASSES,) if condition else ())


@classes
@every
def test_every_weight_works(name, condition):
    network = built(name, condition)
    out = network(*inputs(name, 6, condition))
    assert out.shape == (6, *NETWORKS[name][2])
    (out * torch.randn_like(out)).sum().backward()
    # A network of noisy data also has a null class, which was not asked for here; its row is one of a larger matrix.
    assert not [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]


@classes
@every
def test_no_example_sees_another(name, condition):
    network = built(name, condition)  # in training mode, where batch statistics would show
    x, *rest = inputs(name, 4, condition)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, *rest)[1].square().sum(), x)
    reached = gradient.flatten(1).abs().sum(1) > 0
    assert reached.tolist() == [False, True, False, False]


@every
def test_the_class_changes_the_output(name):
    network = built(name, CONDITION)
    *rest, y = inputs(name, 3, CONDITION)
    change = (network(*rest, y) - network(*rest, (y + 1) % CLASSES)).flatten(1).abs().amax(1)
    assert change.min() > 1e-3


@pytest.mark.parametrize("name", [name for name, (*_, timed) in NETWORKS.items() if timed])
def test_the_time_changes_the_output_and_no_class_is_the_null_class(name):
    network = built(name, CONDITION)
    x, t, y = inputs(name, 3, CONDITION)
    assert (network(x, t, y) - network(x, t + 1e-2, y)).flatten(1).abs().amax(1).min() > 1e-3
    null = torch.full_like(y, CLASSES)
    assert torch.equal(network(x, t), network(x, t, null))
    assert (network(x, t) - network(x, t, y)).flatten(1).abs().amax(1).min() > 1e-3


@every
def test_what_should_start_as_zero_does_and_the_rest_does_not(name):
    out = built(name, moved=False)(*inputs(name, 4))
    starts_as_zero = name in (
        "MLP-zero",
        "TimeMLP",
        "ConvNet",
        "GlowNet",
        "UNet",
        "UNet-patch",
        "DiT",
        "DiT-convolution",
    )
    assert bool((out == 0).all()) == starts_as_zero


@pytest.mark.parametrize("attend", [False, True])
def test_residual_branches_start_as_the_identity(attend):
    x = torch.randn(2, 8, 5, 5)
    block = Attention(8, 4) if attend else ResBlock(8, 8)
    assert torch.equal(block(x), x)


# Sizes


@pytest.mark.parametrize("side", [1, 2, 7, 8, 28, 32, 33])
def test_networks_of_images_fit_any_side(side):
    x = torch.randn(2, 3, side, side)
    assert ConvEncoder((3, side, side), (4,), width=4)(x).shape == (2, 4)
    assert ConvDecoder((4,), (3, side, side), width=4)(torch.randn(2, 4)).shape == x.shape
    assert ConvNet((3, side, side), (6, side, side), width=8)(x).shape == (2, 6, side, side)
    unet = UNet((3, side, side), (3, side, side), channels=8, multipliers=(1, 1, 2), attention=((side + 1) // 2,))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    x.requires_grad_()
    out = unet(x, torch.rand(2))
    assert out.shape == x.shape
    out.square().sum().backward()
    assert bool((x.grad != 0).all()), "some pixel does not count"


@pytest.mark.parametrize("size", [None, (8, 12), (7, 12), (7, 11)])
def test_a_convolution_of_doubled_pixels_is_what_it_says(size):
    layer, x = UpsampleConv2d(3, 5).double(), torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    literal = F.conv2d(F.interpolate(x, size=size or (8, 12), mode="nearest"), layer.weight, layer.bias, padding=1)
    out, sources = layer(x, size), (x, *layer.parameters())
    torch.testing.assert_close(out, literal, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(out)
    for mine, its in zip(*(torch.autograd.grad(y, sources, slope) for y in (out, literal)), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_images_are_halved_while_even_and_longer_than_four():
    assert resolutions(28, 28) == [(28, 28), (14, 14), (7, 7)]
    assert resolutions(32, 32) == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert resolutions(8, 8) == [(8, 8), (4, 4)]
    assert resolutions(32, 12) == [(32, 12), (16, 6), (8, 3)]
    assert resolutions(33, 33) == [(33, 33)]


def test_rectangular_images_keep_their_sides_apart():
    x = torch.randn(2, 1, 8, 12)
    assert ConvDecoder((5,), (1, 8, 12), width=4)(ConvEncoder((1, 8, 12), (5,), width=4)(x)).shape == x.shape
    assert UNet((1, 8, 12), (2, 8, 12), channels=8, multipliers=(1, 2), patch=2)(x, torch.rand(2)).shape == (
        2,
        2,
        8,
        12,
    )


def test_the_u_net_of_ddpm_has_the_parameters_that_its_paper_counts():
    with torch.device("meta"):
        unet = UNet(
            (3, 32, 32), (3, 32, 32), channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1
        )
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307


def test_attention_stands_at_the_resolutions_that_were_named():
    def places(*attention: int) -> int:
        unet = UNet((1, 16, 16), (1, 16, 16), channels=8, multipliers=(1, 2), blocks=2, attention=attention)
        return sum(isinstance(module, Attention) for module in unet.modules())

    assert places() == 1  # the middle always attends
    assert places(16) == 1 + 2 + 3
    assert places(16, 8) == 1 + 2 * (2 + 3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: UNet((1, 7, 7), (1, 7, 7), channels=8, patch=2), "patch=2 does not divide the 7x7 image"),
        (lambda: Attention(8, head_channels=3), "head_channels=3 does not divide the 8 channels"),
        (lambda: SinusoidalEmbedding(5), "even number of features, at least 4, not 5"),
        (lambda: SinusoidalEmbedding(2), "even number of features, at least 4, not 2"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# Layers against their formulas


@pytest.mark.parametrize("head_channels", [None, 4, 2])
def test_attention_is_softmax_of_scaled_products(head_channels):
    layer = Attention(8, head_channels).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    heads, width = (1, 8) if head_channels is None else (8 // head_channels, head_channels)

    tokens = torch.einsum("oc,bchw->bohw", layer.qkv.weight[:, :, 0, 0], layer.norm(x)) + layer.qkv.bias.view(-1, 1, 1)
    q, k, v = tokens.reshape(2, 3, heads, width, 15).unbind(1)
    weights = torch.einsum("bhcn,bhcm->bhnm", q, k).div(math.sqrt(width)).softmax(-1)
    h = torch.einsum("bhnm,bhcm->bhcn", weights, v).reshape(2, 8, 3, 5)
    expected = x + torch.einsum("oc,bchw->bohw", layer.out.weight[:, :, 0, 0], h) + layer.out.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_attention_in_bfloat16_is_that_of_its_rounded_tokens():
    q, k, v = (torch.randn(2, 3, 16, 8).bfloat16().requires_grad_() for _ in range(3))
    exact = [tokens.detach().double().requires_grad_() for tokens in (q, k, v)]
    out, expected = attend(q, k, v), F.scaled_dot_product_attention(*exact)
    assert out.dtype == torch.bfloat16
    slope = torch.randn_like(out)
    mine = [out, *torch.autograd.grad(out, (q, k, v), slope)]
    its = [expected, *torch.autograd.grad(expected, exact, slope.double())]
    for rounded, true in zip(mine, its, strict=True):
        assert float(((rounded.double() - true).norm() / true.norm()).detach()) < 0.02


def test_the_embedding_of_time_is_sines_and_cosines_at_geometric_frequencies():
    t = torch.tensor([0.0, 1e-3, 0.37, 1.0])
    embedded = SinusoidalEmbedding(10)(t)
    for row, time in zip(embedded.tolist(), t.tolist(), strict=True):
        angles = [1000 * time * 10_000 ** (-i / 4) for i in range(5)]
        assert row == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=2e-4)


def test_time_and_class_add_up():
    layer = TimeAndCondition(6, CONDITION, frequencies=8)
    t, y = torch.rand(4), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(
        layer(t, y) - layer(t, torch.zeros_like(y)), layer.condition.embed_y.weight - layer.condition.embed_y.weight[0]
    )


def test_groups_divide_the_channels_and_hold_four_or_more():
    assert [group_norm(c).num_groups for c in (1, 3, 4, 8, 12, 48, 64, 128, 256)] == [1, 1, 1, 2, 3, 12, 16, 32, 32]


def test_a_convolution_of_an_image_sees_only_its_neighbourhood_without_norms():
    network = ConvEncoder((1, 32, 32), (1,), width=4, blocks=1, norm=False).double()
    before_flatten = nn.Sequential(*list(network.body)[:2])  # one halving, one residual block of two 3x3 convolutions
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(before_flatten(x)[0, :, 8, 8].sum(), x)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    # A 4x4 kernel of stride 2 starts at 2 * 8 - 1; two 3x3 convolutions widen it by 2 on either side, 4 pixels each.
    assert (int(rows.min()), int(rows.max())) == (2 * 8 - 1 - 4, 2 * 8 + 2 + 4)


def test_dropout_works_in_training_alone():
    unet = UNet((1, 8, 8), (1, 8, 8), channels=8, multipliers=(1,), dropout=0.5)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert not torch.equal(unet.train()(x, t), unet(x, t))
    assert torch.equal(unet.eval()(x, t), unet(x, t))
