"""Autoregressive sampling: networks that remember what earlier pixels left behind, against evaluating them again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from run import Pair
from torch import Tensor

from genzoo.distributions.likelihoods import Categorical
from genzoo.families.autoregressive import Autoregressive
from genzoo.nn.pixelcnn import PixelCNN
from genzoo.nn.transformer import Transformer
from genzoo.numerics.random import generator

SIDE, LEVELS = 8, 17  # as of the digits

Parameters = Callable[[Autoregressive, Tensor, int], Tensor]


def of_last_token(model: Autoregressive, pixels: Tensor, i: int) -> Tensor:
    """Run the transformer on the prefix that ends before pixel ``i``, and its head on the last token."""
    network = model.network
    assert isinstance(network, Transformer)
    tokens = network.stem(pixels[:, :, :i].transpose(1, 2))
    h = torch.cat([network.start.expand(len(pixels), 1, -1), tokens], dim=1) + network.positions[: i + 1]
    for block in network.blocks:
        h = block(h)
    return network.head(network.norm(h[:, -1]))


def of_grid(model: Autoregressive, pixels: Tensor, i: int) -> Tensor:
    """Run the network on the whole image."""
    return model.network(pixels.unflatten(2, (SIDE, SIDE))).flatten(2)[:, :, i]


@torch.no_grad()
def again(model: Autoregressive, n: int, parameters: Parameters, rng: torch.Generator) -> Tensor:
    """Sample with a whole evaluation for each pixel."""
    pixels = torch.zeros(n, 1, SIDE**2)
    for i in range(SIDE**2):
        pixels[:, :, i] = model.likelihood.sample(parameters(model, pixels, i), rng)
    return pixels.unflatten(2, (SIDE, SIDE))


def side(network: type[Transformer | PixelCNN], n: int, ours: bool) -> Callable[[], Callable[[], Tensor]]:
    """Set up one side; from equal noise it must make the same images as the other."""

    def build() -> Callable[[], Tensor]:
        torch.manual_seed(0)
        model = Autoregressive((1, SIDE, SIDE), network=network, likelihood=Categorical, levels=LEVELS).eval()
        parameters = of_last_token if network is Transformer else of_grid
        ways = [
            lambda rng: model.sample(n, rng=rng).x,
            functools.partial(again, model, n, parameters),
        ]
        cached, anew = (way(generator("noise")) for way in ways)
        assert torch.equal(cached, anew)
        way, rng = ways[0 if ours else 1], generator("bench")
        return lambda: way(rng)

    return build


def pairs() -> Iterator[Pair]:
    """A transformer with its keys and values, two batches, and a PixelCNN with its activations."""
    for name, network, n, target in (
        ("64 tokens, batch 16", Transformer, 16, 8.0),
        ("64 tokens, batch 64", Transformer, 64, 14.0),
        ("PixelCNN 8x8, batch 16", PixelCNN, 16, 10.0),
    ):
        ours, theirs = (side(network, n, which) for which in (True, False))
        yield Pair(f"autoregressive sampling, {name}", "evaluating anew", ours, theirs, target)
