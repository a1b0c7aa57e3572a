"""The transformer of texts and images against torch's own encoder layers with copied weights, and with a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Tokens
from genzoo.nn.text_image_transformer import TextImageTransformer, after_end

L, V, K, H, W = 5, 9, 7, 2, 3
TEXTS = torch.tensor([[2, 3, 1, 0, 0], [4, 5, 6, 7, 1], [8, 1, 0, 0, 0], [V] * L, [1, 0, 0, 0, 0], [2, 2, 2, 2, 2]])


def built(**settings) -> TextImageTransformer:
    """Build a network in float64 with weights far from where they start."""
    torch.manual_seed(0)
    settings = {"width": 16, "layers": 2, "heads": 2, **settings}
    network = TextImageTransformer((1, H, W), (K, H, W), Tokens(L, V), **settings).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return network


def codes(n: int = len(TEXTS)) -> Tensor:
    return torch.randint(K, (n, H, W), generator=torch.Generator().manual_seed(1))


def test_the_places_after_an_end_are_found():
    text = torch.tensor([[2, 3, 1, 0, 0], [2, 3, 1, 4, 1], [1, 1, 1, 1, 1], [2, 0, 3, 1, 4], [2, 3, 4, 5, 6], [V] * L])
    expected = ["00011", "00011", "01111", "01111", "00000", "00000"]
    assert ["".join(str(int(place)) for place in row) for row in after_end(text)] == expected


@pytest.mark.parametrize("heads", [1, 4])
def test_it_is_torchs_encoder_with_a_causal_mask(heads):
    width, layers = 16, 3
    network = built(layers=layers, heads=heads)
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    encoder = nn.TransformerEncoder(
        layer, layers, norm=nn.LayerNorm(width, dtype=torch.float64), enable_nested_tensor=False
    )
    with torch.no_grad():
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
        image = codes()
        rows = []
        for text, x in zip(TEXTS.tolist(), image.tolist(), strict=True):
            length = text.index(1) + 1 if 1 in text else L
            row = [network.start]
            row += [
                network.tokens.weight[text[i]] + network.places[i] if i < length else network.padding[i]
                for i in range(L)
            ]
            row += [
                network.codes[x[i][j]] + network.rows[i, 0] + network.columns[j]
                for i in range(H) for j in range(W)
            ]  # fmt: skip
            rows.append(torch.stack(row))
        mask = nn.Transformer.generate_square_subsequent_mask(1 + L + H * W, dtype=torch.float64)
        h = encoder(torch.stack(rows), mask=mask, is_causal=True)
        texts, images = network(TEXTS, image)
        for i in range(L):
            torch.testing.assert_close(texts[:, i], network.text_head(h[:, i]), rtol=1e-10, atol=1e-10)
        for j in range(H * W):
            torch.testing.assert_close(images[:, :, j // W, j % W], network.head(h[:, L + j]), rtol=1e-10, atol=1e-10)


def test_what_is_predicted_depends_on_what_comes_before_alone():
    network, image = built(), codes()
    texts, images = network(TEXTS, image)
    for i in range(L):
        other = TEXTS.clone()
        other[:, i] = torch.where(TEXTS[:, i] == 5, 6, 5)
        moved, changed = network(other, image)
        assert torch.equal(moved[:, : i + 1], texts[:, : i + 1])
        within = ~after_end(TEXTS)[:, i] & ~(TEXTS == 1).any(1)  # an end that moves changes what is padding
        assert not (changed[within] == images[within]).flatten(1).all(1).any()
    for j in range(H * W):
        other = image.clone().flatten(1)
        other[:, j] = (other[:, j] + 1) % K
        moved, changed = network(TEXTS, other.view_as(image))
        assert torch.equal(moved, texts), "no text depends on an image"
        assert torch.equal(changed.flatten(2)[..., : j + 1], images.flatten(2)[..., : j + 1])
        assert j == H * W - 1 or not torch.equal(changed.flatten(2)[..., j + 1], images.flatten(2)[..., j + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_with_a_cache_are_those_without(dtype):
    network, image = built(layers=3).to(dtype), codes()
    _, expected = network(TEXTS, image)
    state, flat = network.incremental(TEXTS), image.flatten(1)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for j in range(H * W):
        logits = state.step(flat[:, j - 1 : j] if j else None)
        torch.testing.assert_close(logits, expected[:, :, j // W, j % W], **tolerance)


def test_a_text_is_evaluated_once_in_parallel_and_then_one_code_at_a_time():
    network, lengths = built(), []
    network.blocks[0].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    state = network.incremental(TEXTS)
    state.step(None)
    for j in range(3):
        state.step(codes().flatten(1)[:, j : j + 1])
    assert lengths == [1 + L, 1, 1, 1]


def test_attention_in_bfloat16_is_causal_too():
    network, image = built().float(), codes()
    with torch.autocast("cpu", torch.bfloat16):
        texts, images = network(TEXTS, image)
        other = image.clone()
        other[:, -1, -1] = (other[:, -1, -1] + 1) % K
        moved, changed = network(TEXTS, other)
        assert torch.equal(moved, texts) and torch.equal(changed, images), "the last code is predicted, not seen"
        other[:, 0, 1] = (other[:, 0, 1] + 1) % K
        changed = network(TEXTS, other)[1]
    assert torch.equal(changed[:, :, 0, :2], images[:, :, 0, :2]) and not torch.equal(changed, images)
    exact = network(TEXTS, image)[1]
    torch.testing.assert_close(images.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("condition", [None, ClassLabels(3)])
def test_a_network_without_a_text_is_refused(condition):
    with pytest.raises(ValueError, match="needs a text as its condition"):
        TextImageTransformer((1, 2, 2), (3, 2, 2), condition)


@pytest.mark.parametrize(("settings", "message"), [({"heads": 3}, "heads=3 does not divide the width 16"),
                                                   ({"layers": 0}, "layers must be at least 1")])  # fmt: skip
def test_impossible_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        built(**settings)
