"""The ladder against the layer strings of the published network, read and walked as they are written.

"8x2,8d2" up: two blocks at 8x8, then one whose output is halved. "4m1,4x2" down: a rung that
    stretches 1x1 to 4x4, and two more.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genzoo.nn.ladder import Ladder
from genzoo.numerics.random import generator

SMALL = functools.partial(Ladder, width=8, latent_channels=2, up=[3, 2, 2], down=[2, 3, 1], bottleneck=0.5)
UP, DOWN = "8x2,8d2,4x1,4d4,1x2", "1x1,4m1,4x2,8m4,8x1"  # what SMALL is for an image of 8x8 pixels


def parsed(string: str) -> list[tuple[int, int | None]]:
    """List (side, None) for a plain layer and (side, other) for one that halves or stretches."""
    layers: list[tuple[int, int | None]] = []
    for word in string.split(","):
        mark = next(c for c in word if not c.isdigit())
        side, number = (int(part) for part in word.split(mark))
        layers += [(side, None)] * number if mark == "x" else [(side, number)]
    return layers


def moved(network: Ladder) -> Ladder:
    rng = generator("ladder")
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
    return network.requires_grad_(False)


def climbed(network: Ladder, x: Tensor) -> list[Tensor]:
    """The activation of each rung, top first, by the strings."""
    h = network.stem(x)
    activations = {h.shape[2]: h}
    blocks = [block for blocks in network.up for block in blocks]
    for block, (side, rate) in zip(blocks, parsed(UP), strict=True):
        assert h.shape[2] == side
        h = h + block(h)
        h = h if rate is None else F.avg_pool2d(h, rate)
        activations[h.shape[2]] = h
    return [activations[side] for side, _ in parsed(DOWN)]


def test_the_way_up_is_that_of_the_published_string():
    network, x = moved(SMALL((3, 8, 8), (6, 8, 8)).double()), torch.randn(2, 3, 8, 8).double()
    seen = network.bottom_up(x)
    for got, expected in zip(seen, climbed(network, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_way_down_is_that_of_the_published_string():
    """The stream of each size begins as its constant and, by the first rung, the stream that left the size before."""
    network = moved(SMALL((3, 8, 8), (6, 8, 8)).double())
    streams = {side: torch.zeros(2, 8, side, side).double() for side in (1, 4, 8)}
    for rung, (side, _) in zip(network.rungs, parsed(DOWN), strict=True):
        if rung.entry is not None:
            streams[side] = rung.entry.bias.expand(2, -1, -1, -1)
    h = network.top(2)
    noise = [torch.randn(2, *shape, generator=generator(i)).double() for i, shape in enumerate(network.latents)]
    for rung, z, (side, mixin) in zip(network.rungs, noise, parsed(DOWN), strict=True):
        x = streams[side]
        if mixin is not None:
            x = x + F.interpolate(streams[mixin], scale_factor=side // mixin)
        features = rung.of_prior(x)
        moments, gain = rung.prior(rung.enter(h, None))
        torch.testing.assert_close(moments, features[:, :4], rtol=0, atol=1e-12)
        activation = torch.randn(x.shape, generator=generator(9)).double()
        torch.testing.assert_close(
            rung.posterior(rung.enter(h, None), activation), rung.of_posterior(torch.cat([x, activation], 1))
        )
        h = rung.merge(rung.enter(h, None) + gain, z)
        x = x + features[:, 4:] + rung.project(z)
        streams[side] = x + rung.block(x)
        torch.testing.assert_close(h, streams[side], rtol=0, atol=1e-12)
    torch.testing.assert_close(network.output(h), network.head(streams[8]), rtol=0, atol=1e-12)


def test_the_published_network_has_its_39_million_weights():
    """Counted from the strings: four convolutions a block, three blocks and a projection a rung."""
    C, inner, Z = 384, 96, 16
    with torch.device("meta"):
        network = Ladder((3, 32, 32), (100, 32, 32), None, C, Z, up=[12, 7, 7, 4, 3], down=[22, 11, 6, 3, 1])

    def block(inputs: int, outputs: int, side: int) -> int:
        kernel = 9 if side > 2 else 1
        return (inputs + 1) * inner + 2 * (kernel * inner + 1) * inner + (inner + 1) * outputs

    count = (9 * 3 + 1) * C + (C + 1) * 100 + C * sum(side**2 for side in (1, 4, 8, 16, 32))
    for side, _ in parsed("32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3"):
        count += block(C, C, side)
    rungs = parsed("1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21")
    for side, _ in rungs:
        count += block(2 * C, 2 * Z, side) + block(C, 2 * Z + C, side) + block(C, C, side) + (Z + 1) * C
    assert len(rungs) == len(network.rungs) == 43
    assert sum(p.numel() for p in network.parameters()) == count == 39_144_932


@pytest.mark.parametrize(
    ("shape", "patch", "sizes"),
    [
        ((3, 32, 32), 1, [(32, 32), (16, 16), (8, 8), (4, 4), (1, 1)]),
        ((1, 28, 28), 2, [(14, 14), (7, 7), (1, 1)]),
        ((1, 8, 8), 1, [(8, 8), (4, 4), (1, 1)]),
        ((2, 6, 12), 1, [(6, 12), (3, 6), (1, 1)]),
        ((1, 1, 1), 1, [(1, 1)]),
        ((2,), 1, [(1, 1)]),
    ],
)
def test_sizes_halve_down_to_a_single_pixel(shape, patch, sizes):
    network = Ladder(shape, (5, *shape[1:]), width=4, latent_channels=3, up=1, down=2, patch=patch)
    assert network.sizes == sizes
    assert network.latents == [(3, *size) for size in reversed(sizes) for _ in range(2)]
    h = network.top(2)
    for rung, a in zip(network.rungs, network.bottom_up(torch.randn(2, *shape)), strict=True):
        h = rung.enter(h, None)
        assert a.shape == h.shape == (2, 4, *rung.size)
    assert network.output(h).shape == (2, 5, *shape[1:])


def test_a_patch_of_pixels_goes_in_and_comes_out_at_its_own_place():
    network = Ladder((1, 8, 8), (1, 8, 8), width=4, latent_channels=1, up=1, down=1, patch=2)
    h = torch.zeros(1, 4, 4, 4)
    h[..., 1, 2] = 1.0
    there = (network.output(h) - network.output(torch.zeros_like(h)))[0, 0].abs() > 0
    assert bool(there[2:4, 4:6].all()) and int(there.sum()) == 4


def test_many_layers_leave_the_first_stream_at_its_scale():
    """Each branch is scaled down by the root of their number: without it the stream grows with the depth."""
    spread = []
    for down in (2, 50):
        network = Ladder((1, 4, 4), (1, 4, 4), width=32, latent_channels=8, up=1, down=down)
        h = network.top(64)
        for rung, shape in zip(network.rungs, network.latents, strict=True):
            h = rung.enter(h, None)
            moments, features = rung.prior(h)
            assert not moments.any() and not features.any(), "each prior starts as N(0, 1)"
            h = rung.merge(h + features, torch.randn(64, *shape))
        spread.append(float(h.detach().std()))
    assert 0.5 < spread[1] / spread[0] < 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 3}, "patch=3 does not divide the 8x8 image"),
        ({"up": [1, 2]}, "up must be a positive number, or one for each of the sizes 8x8, 4x4, 1x1, not"),
        ({"down": 0}, "down must be a positive number"),
        ({"down": [1, 1, 0]}, "down must be a positive number"),
        ({"width": 0}, "width, latent_channels, patch and bottleneck must be positive"),
        ({"bottleneck": 0.0}, "width, latent_channels, patch and bottleneck must be positive"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Ladder((1, 8, 8), (1, 8, 8), **settings)
