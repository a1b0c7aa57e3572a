"""A step of a vector quantiser in training: 2,048 vectors of 64 numbers and 512 codes that follow them by moving averages.

Every side takes the feature map of an encoder, finds the nearest codes, moves them, and hands back the codes with the
gradient of the vectors and the commitment. None revives dead codes: the peers do not unless they are told to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from run import Go, Pair

from genzoo.nn.quantize import VectorQuantizer, straight_through

K, D, SHAPE = 512, 64, (32, 64, 8, 8)
Step = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def vectors() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()


def codebook() -> torch.Tensor:
    return torch.randn(K, D, generator=torch.Generator().manual_seed(1))


def by_genzoo() -> Step:
    quantizer = VectorQuantizer(K, D, revival=0)
    quantizer.codes.copy_(codebook())

    def step(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k = quantizer.nearest(z)
        e = quantizer.lookup(k)
        quantizer.update(z.detach(), k)
        return straight_through(z, e), k, (z - e).square().mean()

    return step


def by_lucidrains() -> Step:
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(D, K, accept_image_fmap=True, rotation_trick=False).train()
    quantizer.codebook = codebook()
    return quantizer


def by_pythae() -> Step:
    from pythae.models import VQVAEConfig
    from pythae.models.vq_vae.vq_vae_utils import QuantizerEMA

    config = VQVAEConfig(num_embeddings=K, use_ema=True)
    config.embedding_dim = D  # its model's way
    quantizer = QuantizerEMA(config).train()
    quantizer.embeddings.copy_(codebook())

    def step(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = quantizer(z.permute(0, 2, 3, 1))
        return out.quantized_vector, out.quantized_indices[:, 0], out.loss

    return step


def training(way: Callable[[], Step]) -> Callable[[], Go]:
    """Set up a quantiser, which must choose the nearest of the codes that all begin with."""

    def build() -> Go:
        step, z = way(), vectors()
        out, k, _ = step(z)
        nearest = torch.cdist(z.detach().movedim(1, -1).flatten(0, -2).double(), codebook().double()).argmin(1)
        assert torch.equal(k.flatten(), nearest), way
        torch.testing.assert_close(out.detach(), codebook()[k].movedim(-1, 1))
        return lambda: step(z)

    return build


def pairs() -> Iterator[Pair]:
    """Two peers, with their own ways to keep the averages."""
    name = "vector quantiser, 2,048 tokens x 512 codes"
    yield Pair(name, "vector-quantize-pytorch", training(by_genzoo), training(by_lucidrains), 5.0)
    yield Pair(name, "pythae", training(by_genzoo), training(by_pythae), 3.0)
