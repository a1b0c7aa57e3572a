"""The diffusion transformer against the one of diffusers, with the same weights."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.nn.dit import DiT, positions

E, HEADS, LAYERS, CLASSES, FREQUENCIES = 32, 4, 3, 5, 256


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return network.double().eval()


def copied(ours: DiT, theirs: torch.nn.Module) -> None:
    """Write the weights of ours into the model of diffusers, whose blocks each embed time and class anew."""
    p = 2
    weights: dict[str, Tensor] = {name: value.clone() for name, value in theirs.state_dict().items()}
    own = ours.state_dict()
    weights["pos_embed.proj.weight"] = own["stem.weight"].view(E, 3, p, p)
    weights["pos_embed.proj.bias"] = own["stem.bias"]
    time = own["embedding.time.1.weight"]
    half = FREQUENCIES // 2
    for i in range(LAYERS):
        a, b = f"transformer_blocks.{i}.", f"blocks.{i}."
        # Cosines come first in diffusers.
        weights[f"{a}norm1.emb.timestep_embedder.linear_1.weight"] = torch.cat([time[:, half:], time[:, :half]], dim=1)
        weights[f"{a}norm1.emb.timestep_embedder.linear_1.bias"] = own["embedding.time.1.bias"]
        for name in ("weight", "bias"):
            weights[f"{a}norm1.emb.timestep_embedder.linear_2.{name}"] = own[f"embedding.time.3.{name}"]
            weights[f"{a}norm1.linear.{name}"] = own[f"{b}modulation.{name}"]
            for part, rows in zip("qkv", own[f"{b}qkv.{name}"].chunk(3), strict=True):
                weights[f"{a}attn1.to_{part}.{name}"] = rows
            weights[f"{a}attn1.to_out.0.{name}"] = own[f"{b}out.{name}"]
            weights[f"{a}ff.net.0.proj.{name}"] = own[f"{b}mlp.0.{name}"]
            weights[f"{a}ff.net.2.{name}"] = own[f"{b}mlp.2.{name}"]
        weights[f"{a}norm1.emb.class_embedder.embedding_table.weight"] = own["embedding.condition.embed_y.weight"]
    for name in ("weight", "bias"):
        weights[f"proj_out_1.{name}"] = own[f"modulation.{name}"]
        # A patch is (row, column, channel) in diffusers, and (channel, row, column) here.
        head = own[f"head.{name}"].view(6, p, p, *own[f"head.{name}"].shape[1:])
        weights[f"proj_out_2.{name}"] = head.movedim(0, 2).flatten(0, 2)
    theirs.load_state_dict(weights)


def test_the_network_is_that_of_diffusers():
    models = pytest.importorskip("diffusers.models")
    theirs = models.DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=E // HEADS,
        in_channels=3,
        out_channels=6,
        num_layers=LAYERS,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu",
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    ours = DiT((3, 8, 8), (6, 8, 8), ClassLabels(CLASSES), patch=2, width=E, layers=LAYERS, heads=HEADS)
    ours, theirs = randomised(ours), randomised(theirs)
    copied(ours, theirs)
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 4, 2, CLASSES])
    steps = torch.tensor([3, 250, 700, 999])
    expected = theirs(x, timestep=steps, class_labels=y).sample
    # The embedding of time is in float32 in diffusers.
    torch.testing.assert_close(ours(x, steps.double() / 1000, y), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5)])
def test_positions_are_those_of_diffusers(height, width):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    grid = torch.stack(torch.meshgrid(torch.arange(width).float(), torch.arange(height).float(), indexing="xy"))
    expected = embeddings.get_2d_sincos_pos_embed_from_grid(24, grid)
    torch.testing.assert_close(positions(height, width, 24), expected.float(), rtol=1e-5, atol=1e-5)


def test_a_layer_without_modulation_is_that_of_timm():
    vision = pytest.importorskip("timm.models.vision_transformer")
    norm = functools.partial(torch.nn.LayerNorm, elementwise_affine=False, eps=1e-6)
    theirs = randomised(vision.Block(E, HEADS, qkv_bias=True, norm_layer=norm))
    ours = DiT((3, 8, 8), (3, 8, 8), patch=2, width=E, layers=1, heads=HEADS).double().blocks[0]
    weights = theirs.state_dict()
    ours.load_state_dict(
        {
            "qkv.weight": weights["attn.qkv.weight"], "qkv.bias": weights["attn.qkv.bias"],
            "out.weight": weights["attn.proj.weight"], "out.bias": weights["attn.proj.bias"],
            "mlp.0.weight": weights["mlp.fc1.weight"], "mlp.0.bias": weights["mlp.fc1.bias"],
            "mlp.2.weight": weights["mlp.fc2.weight"], "mlp.2.bias": weights["mlp.fc2.bias"],
            "modulation.weight": torch.zeros(6 * E, E), "modulation.bias": torch.zeros(6 * E),
        }
    )  # fmt: skip
    with torch.no_grad():
        ours.modulation.bias.view(6, E)[[2, 5]] = 1.0  # the gates
    h = torch.randn(2, 16, E, dtype=torch.float64)
    torch.testing.assert_close(ours(h, torch.randn(2, E, dtype=torch.float64)), theirs(h), rtol=1e-9, atol=1e-9)
