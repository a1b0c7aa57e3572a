"""Cross-attention against its formula, and what of a text may and may not change the output of a denoising network."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Condition, Image, Joint, Tokens
from genzoo.nn.cross_attention import CrossAttention, MapCrossAttention, Text, TimeAndText
from genzoo.nn.dit import DiT
from genzoo.nn.text import PADDING, TextEncoder
from genzoo.nn.unet import UNet
from tests.test_conditions import values

L, V = 6, 9
TEXT = Tokens(L, V)
SHAPE = (2, 8, 8)
NETWORKS = {
    "UNet": functools.partial(
        UNet, channels=8, multipliers=(1, 2), attention=(8,), head_channels=4, cross_attention=(8, 4), text_width=12
    ),
    "UNet-middle": functools.partial(UNet, channels=8, multipliers=(1, 2), cross_attention=(99,), text_width=12),
    "DiT": functools.partial(DiT, width=16, layers=2, cross_attention=True, text_width=12),
}
every = pytest.mark.parametrize("name", NETWORKS)


def built(name: str, condition: Condition = TEXT, **settings) -> nn.Module:
    """Build a network in float64 with all of its weights moved away from zero."""
    torch.manual_seed(0)
    network = NETWORKS[name](SHAPE, SHAPE, condition, **settings).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network


def captions(n: int = 4) -> Tensor:
    """Make up captions of different lengths, (n, L)."""
    y = torch.randint(1, V, (n, L))
    y[torch.arange(L) >= 2 + torch.arange(n)[:, None] % (L - 1)] = PADDING
    return y


def inputs(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *SHAPE, dtype=torch.float64), torch.linspace(0.1, 0.9, n, dtype=torch.float64)


# The layer


@pytest.mark.parametrize("head_channels", [None, 4, 2])
@pytest.mark.parametrize("length", [5, 70])  # by the plain product, and by the fused kernel
def test_cross_attention_is_a_softmax_over_all_tokens_but_the_padding(head_channels, length):
    C, D, B, N = 8, 6, 3, 7
    layer = CrossAttention(C, D, head_channels).double()
    nn.init.normal_(layer.out.weight)
    x, h = torch.randn(B, N, C, dtype=torch.float64), torch.randn(B, length, D, dtype=torch.float64)
    lengths = [1, 3, length]
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    out = layer(x, Text(h, mask))
    c = head_channels or C
    for b, n in enumerate(lengths):
        expected = torch.zeros(N, C, dtype=torch.float64)
        for head in range(C // c):
            rows = slice(c * head, c * (head + 1))
            of_values = slice(C + c * head, C + c * (head + 1))
            q = x[b] @ layer.q.weight[rows].T + layer.q.bias[rows]
            k = h[b, :n] @ layer.kv.weight[rows].T + layer.kv.bias[rows]
            v = h[b, :n] @ layer.kv.weight[of_values].T + layer.kv.bias[of_values]
            weights = torch.exp(q @ k.T / math.sqrt(c))
            expected[:, rows] = weights / weights.sum(1, keepdim=True) @ v
        expected = expected @ layer.out.weight.T + layer.out.bias
        torch.testing.assert_close(out[b], expected, rtol=1e-10, atol=1e-10)


def test_a_feature_map_is_normalised_before_and_added_after():
    layer = MapCrossAttention(8, 6, 4).double()
    x = 3 + 5 * torch.randn(2, 8, 3, 5, dtype=torch.float64)
    text = Text(torch.randn(2, 4, 6, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(layer(x, text), x), "zero at initialisation"
    nn.init.normal_(layer.attend.out.weight)
    normed = nn.functional.group_norm(x, layer.norm.num_groups, layer.norm.weight, layer.norm.bias)
    for i in range(3):
        for j in range(5):
            expected = x[:, :, i, j] + layer.attend(normed[:, :, i, j][:, None], text)[:, 0]
            torch.testing.assert_close(layer(x, text)[:, :, i, j], expected, rtol=1e-10, atol=1e-10)


# Padding


@every
def test_padding_changes_no_bit(name):
    network, y, (x, t) = built(name), captions(), inputs()
    before = network(x, t, y)
    with torch.no_grad():
        network.embedding.encoder.tokens.weight[PADDING] += 10.0
    assert torch.equal(network(x, t, y), before)
    out = network(x, t, y)
    (gradient,) = torch.autograd.grad(out.square().sum(), network.embedding.encoder.tokens.weight)
    assert not gradient[PADDING].any() and bool(gradient[y[y != PADDING].unique()].any(1).all())


@every
def test_a_longer_padding_changes_nothing(name):
    network, y, (x, t) = built(name), captions(), inputs()
    longer = built(name, Tokens(L + 3, V))
    weights = network.state_dict()
    key = "embedding.encoder.positions"
    weights[key] = torch.cat([weights[key], torch.randn(3, weights[key].shape[1], dtype=torch.float64)])
    longer.load_state_dict(weights)
    padded = torch.cat([y, torch.full((len(y), 3), PADDING)], dim=1)
    torch.testing.assert_close(longer(x, t, padded), network(x, t, y), rtol=1e-10, atol=1e-10)


def test_padding_has_no_share_in_the_mean():
    encoder, y = TextEncoder(L, V, 8).double(), captions()
    h, mask = encoder(y)
    pooled = TextEncoder.pooled(h, mask)
    for row, tokens, mean in zip(h, y, pooled, strict=True):
        torch.testing.assert_close(mean, row[tokens != PADDING].mean(0), rtol=1e-12, atol=1e-12)


def test_an_empty_text_is_finite():
    for name in NETWORKS:
        network, (x, t) = built(name), inputs()
        out = network(x, t, torch.full((4, L), PADDING))
        out.sum().backward()
        assert bool(out.isfinite().all()) and all(bool(p.grad.isfinite().all()) for p in network.parameters())


# The null text


@every
def test_no_text_is_the_text_of_null_tokens(name):
    network, y, (x, t) = built(name), captions(), inputs()
    null = TEXT.null(y)
    assert torch.equal(network(x, t), network(x, t, null))
    assert (network(x, t) - network(x, t, y)).flatten(1).abs().amax(1).min() > 1e-3
    (gradient,) = torch.autograd.grad(network(x, t).square().sum(), network.embedding.encoder.tokens.weight)
    assert gradient[V].any() and not gradient[:V].any()
    some = torch.where(torch.tensor([True, False, False, True])[:, None], y, null)
    torch.testing.assert_close(network(x, t, some)[1:3], network(x, t)[1:3], rtol=1e-10, atol=1e-10)


# The text


@every
def test_each_token_and_its_place_count_for_each_pixel(name):
    network, (x, t) = built(name), inputs(2)
    y = torch.randint(1, V, (2, L))
    out = network(x, t, y)
    for place in range(L):
        other = y.clone()
        other[0, place] = other[0, place] % (V - 1) + 1
        change = (network(x, t, other) - out).abs()
        assert change[0].min() > 1e-9 and not change[1].any()
    swapped = y[:, [1, 0, *range(2, L)]]
    changed = (swapped != y).any(1)
    assert ((network(x, t, swapped) - out).flatten(1).abs().amax(1) > 1e-3)[changed].all()


@every
def test_the_text_is_read_by_the_tokens_and_by_their_mean(name):
    """With either way cut, the other one still changes the output."""
    (x, t), y = inputs(), captions()
    for cut in ("pooled", "out"):
        network = built(name)
        with torch.no_grad():
            for layer in network.modules():
                if cut == "out" and isinstance(layer, CrossAttention):
                    layer.out.weight.zero_()
            if cut == "pooled":
                network.embedding.pooled.weight.zero_()
        assert (network(x, t, y) - network(x, t, y.flip(0))).abs().max() > 1e-3


def test_cross_attention_stands_at_the_resolutions_that_were_named_and_in_the_middle():
    def places(*cross_attention: int) -> int:
        network = UNet((1, 16, 16), (1, 16, 16), TEXT, channels=8, multipliers=(1, 2), cross_attention=cross_attention)
        return sum(isinstance(module, MapCrossAttention) for module in network.modules())

    assert places() == 0
    assert places(99) == 1
    assert places(16) == 1 + 1 + 2
    assert places(16, 8) == 1 + 2 * (1 + 2)


def test_without_cross_attention_a_text_is_an_embedding_as_any_condition():
    network = UNet(SHAPE, SHAPE, TEXT, channels=8)
    assert not [key for key in network.state_dict() if "encoder" in key and "embed_y" not in key]


# Other conditions


@every
def test_a_text_may_be_one_of_several_conditions(name):
    (x, t), y = inputs(), captions()
    classes, image = torch.tensor([0, 1, 2, 1]), values(Image((1, 4, 4)), 4)
    first = Joint((ClassLabels(3), TEXT, Image((1, 4, 4))))
    last = Joint((Image((1, 4, 4)), ClassLabels(3), TEXT))
    network = built(name, first, concat=True)
    out = network(x, t, first.join(classes, y, image))
    other = built(name, last, concat=True)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x, t, last.join(image, classes, y)), out)
    for changed in ((2 - classes, y, image), (classes, y.flip(0), image), (classes, y, -image)):
        assert (network(x, t, first.join(*changed)) - out).abs().max() > 1e-3
    joined = first.join(classes, y, image)
    assert torch.equal(network(x, t), network(x, t, first.null(joined)))
    kept = Joint((ClassLabels(3), TEXT, Image((1, 4, 4))), fixed=1)
    fixed = built(name, kept, concat=True)  # without an embedding of the null class
    with torch.no_grad():
        for parameter, other in zip(fixed.parameters(), network.parameters(), strict=True):
            parameter.copy_(other[: len(parameter)])
    nothing = torch.zeros_like(classes), TEXT.null(y), torch.zeros_like(image)
    assert torch.equal(fixed(x, t), network(x, t, first.join(*nothing)))
    alone = Joint((TEXT,))
    assert torch.equal(built(name, alone)(x, t, alone.join(y)), built(name)(x, t, y))


@every
@pytest.mark.parametrize("condition", [None, ClassLabels(3), Joint((ClassLabels(3), Image((1, 2, 2))))])
def test_conditions_without_a_text_are_refused(name, condition):
    with pytest.raises(ValueError, match=r"no captions: set data=shapes data\.conditional=true") as refusal:
        NETWORKS[name](SHAPE, SHAPE, condition)
    assert "\n" not in str(refusal.value)


@every
def test_several_texts_and_vectors_are_refused(name):
    with pytest.raises(ValueError, match="one text, and the condition has 2"):
        NETWORKS[name](SHAPE, SHAPE, Joint((TEXT, ClassLabels(2), Tokens(3, 4))))
    with pytest.raises(ValueError, match=r"images \(C, H, W\), not \(2,\)"):
        NETWORKS[name]((2,), (2,), TEXT)


# Precision


@every
def test_half_precision_and_compilation_compute_the_same(name):
    network, y, (x, t) = built(name).float(), captions(), inputs()
    x, t = x.float(), t.float()
    exact = copy.deepcopy(network).double()(x.double(), t.double(), y)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, t, y)
        half.float().square().sum().backward()
    assert float(((half - exact).norm() / exact.norm()).detach()) < 0.05
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())

    compiled = copy.deepcopy(network)
    compiled.compile(backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x, t, y), network(x, t, y), rtol=1e-5, atol=1e-5)


def test_time_and_text_are_one_embedding():
    layer = TimeAndText(6, TEXT, frequencies=8, width=4, layers=1).double()
    t, y = torch.rand(3, dtype=torch.float64), captions(3)
    e, text = layer(t, y)
    pooled = TextEncoder.pooled(*layer.encoder(y))
    torch.testing.assert_close(e, layer.time(t, None) + pooled @ layer.pooled.weight.T + layer.pooled.bias)
    assert torch.equal(text.mask_BL, y != PADDING) and text.h_BLD.shape == (3, L, 4)
