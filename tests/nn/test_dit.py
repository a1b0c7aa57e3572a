"""The diffusion transformer against its formulas: patches, positions, and layers that start as the identity."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Tokens
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import FlowMatching
from genzoo.families.score_sde import ScoreSDE
from genzoo.nn.cross_attention import Text
from genzoo.nn.dit import DiT, DiTBlock, patchify, positions, unpatchify
from genzoo.numerics.random import generator


@pytest.mark.parametrize(("p", "height", "width"), [(1, 3, 5), (2, 6, 4), (4, 8, 4)])
def test_patches_are_cut_in_raster_order_and_put_together_again(p, height, width):
    x = torch.randn(2, 3, height, width)
    h = patchify(x, p)
    assert h.shape == (2, height * width // p**2, 3 * p**2)
    assert torch.equal(unpatchify(h, p, height, width), x)
    for n in range(h.shape[1]):
        row, column = divmod(n, width // p)
        patch = x[:, :, p * row : p * (row + 1), p * column : p * (column + 1)]
        assert torch.equal(h[:, n], patch.flatten(1))


def test_positions_are_sines_and_cosines_of_column_and_row():
    height, width, E = 3, 5, 12
    found = positions(height, width, E).double()
    for row in range(height):
        for column in range(width):
            expected = []
            for place in (column, row):
                angles = [place * 10_000 ** (-i / (E // 4)) for i in range(E // 4)]
                expected += [*map(math.sin, angles), *map(math.cos, angles)]
            assert found[row * width + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_are_added_to_their_own_patches():
    """A network of one layer without attention to others: equal patches differ by their positions alone."""
    network = DiT((1, 4, 6), (1, 4, 6), patch=2, width=8, layers=1, heads=1)
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.zeros(1, 1, 4, 6)
    x[..., 2:, 4:] = 1.0  # the last patch
    network(x, torch.rand(1))
    other = network.stem(torch.tensor([[[0.0] * 4]] * 5 + [[[1.0] * 4]]).view(6, 4))
    torch.testing.assert_close(seen[0][0], other + positions(2, 3, 8))


@pytest.mark.parametrize("condition", [None, ClassLabels(3), Tokens(4, 7)])
def test_the_output_is_zero_and_layers_are_the_identity_at_initialisation(condition):
    network = DiT((3, 8, 8), (6, 8, 8), condition, width=16, cross_attention=isinstance(condition, Tokens))
    x, t = torch.randn(5, 3, 8, 8), torch.rand(5)
    y = {None: None, ClassLabels(3): torch.arange(5) % 3}.get(condition, torch.randint(7, (5, 4)))
    out = network(x, t, y)
    assert out.shape == (5, 6, 8, 8) and not out.any()
    h, e = torch.randn(5, 16, 16), torch.randn(5, 16)
    text = Text(torch.randn(5, 4, 128), torch.ones(5, 4, dtype=torch.bool)) if isinstance(condition, Tokens) else None
    for block in network.blocks:
        assert torch.equal(block(h, e, text), h)


@pytest.mark.parametrize("grid", [None, (2, 3)])
@pytest.mark.parametrize("text_width", [None, 6])
def test_a_layer_is_its_formula(text_width, grid):
    E, heads, B, N = 8, 2, 3, 6
    block = DiTBlock(E, heads, 2.0, 0.0, text_width, grid).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    h, e = 2 + 3 * torch.randn(B, N, E, dtype=torch.float64), torch.randn(B, E, dtype=torch.float64)
    text = Text(torch.randn(B, 4, 6, dtype=torch.float64), torch.arange(4) < torch.tensor([4, 2, 1])[:, None])
    b1, a1, g1, b2, a2, g2 = F.linear(e, block.modulation.weight, block.modulation.bias)[:, None].chunk(6, dim=2)

    def norm(h):
        return (h - h.mean(2, keepdim=True)) / (h.var(2, correction=0, keepdim=True) + 1e-6).sqrt()

    q, k, v = (
        tokens.view(B, N, heads, E // heads)
        for tokens in F.linear((1 + a1) * norm(h) + b1, block.qkv.weight, block.qkv.bias).chunk(3, dim=2)
    )
    weights = (torch.einsum("bnhc,bmhc->bhnm", q, k) / math.sqrt(E // heads)).softmax(-1)
    attended = torch.einsum("bhnm,bmhc->bnhc", weights, v).reshape(B, N, E)
    expected = h + g1 * F.linear(attended, block.out.weight, block.out.bias)
    if block.text is not None:
        weight, bias = block.text_norm.weight, block.text_norm.bias
        expected = expected + block.text(F.layer_norm(expected, (E,), weight, bias), text)
    hidden = F.linear((1 + a2) * norm(expected) + b2, block.mlp[0].weight, block.mlp[0].bias)
    if grid is not None:
        hidden = hidden + neighbours(hidden, grid, block.mlp[1].convolution)
    expected = expected + g2 * F.linear(F.gelu(hidden), block.mlp[-1].weight, block.mlp[-1].bias)
    torch.testing.assert_close(block(h, e, text), expected, rtol=1e-10, atol=1e-10)


def neighbours(h: Tensor, grid: tuple[int, int], layer: nn.Conv2d) -> Tensor:
    """Weighted sums of the 3x3 patches around each, channel by channel."""
    rows, columns = grid
    out = layer.bias.expand_as(h).clone()
    for i in range(rows):
        for j in range(columns):
            for k, m in itertools.product((-1, 0, 1), repeat=2):
                if 0 <= i + k < rows and 0 <= j + m < columns:
                    out[:, i * columns + j] += layer.weight[:, 0, k + 1, m + 1] * h[:, (i + k) * columns + j + m]
    return out


def test_variances_are_channels_after_the_means():
    network = DiT((2, 4, 4), (4, 4, 4), patch=2, width=8, layers=1, heads=1)
    nn.init.zeros_(network.head.weight)
    with torch.no_grad():
        network.head.bias.copy_(torch.arange(16.0))
    mean, variance = network(torch.randn(1, 2, 4, 4), torch.rand(1)).chunk(2, dim=1)
    for row in range(4):
        for column in range(4):
            inside = 2 * (row % 2) + column % 2
            assert mean[0, :, row, column].tolist() == [inside, 4 + inside]
            assert variance[0, :, row, column].tolist() == [8 + inside, 12 + inside]


@pytest.mark.parametrize("family", [DDPM, ScoreSDE, FlowMatching])
def test_it_is_the_network_of_any_denoiser(family):
    network = functools.partial(DiT, width=8, layers=1, heads=2)
    learned = {"variance": "learned", "objective": "hybrid"} if family is DDPM else {}
    model = family((3, 4, 4), levels=4, condition=ClassLabels(2), network=network, **learned)
    x, y = 2 * torch.rand(8, 3, 4, 4) - 1, torch.arange(8) % 2
    adam, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for step in range(30):
        adam.zero_grad()
        loss = model.loss(x, y, rng=generator(step % 3)).total
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 3}, "patch=3 does not divide the 8x8 image"),
        ({"patch": 0}, "patch=0 does not divide"),
        ({"heads": 3}, "heads=3 does not divide the width 16"),
        ({"width": 18, "heads": 2}, "width must be a multiple of 4, .* not 18"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
    ],
)
def test_impossible_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiT((3, 8, 8), (3, 8, 8), **{"width": 16, **settings})
