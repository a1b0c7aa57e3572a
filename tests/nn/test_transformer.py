"""The transformer against torch's own encoder layers with copied weights. Causality and the cache are tested with all
causal networks in test_pixelcnn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genzoo.nn.transformer import KVCache, Transformer


@pytest.mark.parametrize("heads", [1, 4])
def test_it_is_torchs_encoder_with_a_causal_mask(heads):
    width, layers, shape = 16, 3, (2, 4, 5)
    network = Transformer(shape, (7, 4, 5), width=width, layers=layers, heads=heads).double().eval()
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    encoder = nn.TransformerEncoder(
        layer, layers, norm=nn.LayerNorm(width, dtype=torch.float64), enable_nested_tensor=False
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for ours, theirs in zip(network.blocks, encoder.layers, strict=True):
            for mine, other in (
                (ours.qkv.weight, theirs.self_attn.in_proj_weight), (ours.qkv.bias, theirs.self_attn.in_proj_bias),
                (ours.out.weight, theirs.self_attn.out_proj.weight), (ours.out.bias, theirs.self_attn.out_proj.bias),
            ):  # fmt: skip
                other.copy_(mine)
            theirs.linear1.load_state_dict(ours.mlp[0].state_dict())
            theirs.linear2.load_state_dict(ours.mlp[2].state_dict())
            theirs.norm1.load_state_dict(ours.norm1.state_dict())
            theirs.norm2.load_state_dict(ours.norm2.state_dict())
        encoder.norm.load_state_dict(network.norm.state_dict())

    x = torch.randn(3, *shape, dtype=torch.float64)
    tokens = [network.start.expand(3, -1)]
    tokens += [network.stem(x[:, :, i // 5, i % 5]) for i in range(19)]  # raster order
    embedded = torch.stack(tokens, dim=1) + network.positions
    mask = nn.Transformer.generate_square_subsequent_mask(20, dtype=torch.float64)
    expected = network.head(encoder(embedded, mask=mask, is_causal=True))
    got = network(x)
    for i in range(20):
        torch.testing.assert_close(got[:, :, i // 5, i % 5], expected[:, i], rtol=1e-10, atol=1e-10)


def test_a_memory_returns_all_it_has_seen_and_seldom_moves():
    cache, parts = KVCache(), torch.randn(2 * KVCache.GROWTH + 1, 2, 3, 2, 1, 5)
    places = []
    for i, part in enumerate(parts):
        seen = cache.extend(part)
        assert torch.equal(seen, torch.cat(list(parts[: i + 1]), dim=3))
        places.append(cache.buffer)
    assert len({id(place) for place in places}) == 3


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(ValueError, match=f"heads={heads} does not divide the width 8"):
        Transformer((1, 2, 2), (1, 2, 2), width=8, heads=heads)


def test_dropout_works_in_training_alone():
    network = Transformer((1, 4, 4), (1, 4, 4), width=8, layers=1, heads=2, dropout=0.5)
    x = torch.randn(2, 1, 4, 4)
    assert not torch.equal(network.train()(x), network(x))
    assert torch.equal(network.eval()(x), network(x))
