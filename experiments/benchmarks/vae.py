"""Epochs of a variational autoencoder by each one's own trainer, with equal data, optimisers and batches.

The networks compute the same. genzoo's doubles images inside the convolution that follows; pythae's is given torch's own
``Upsample`` and ``Conv2d``, as one writes it.

pythae keeps a copy of its best model after each epoch and saves it at the end, its default. genzoo draws one picture and
saves one checkpoint, at the end as well, where it would otherwise do both four times; it also averages its weights, clips
its gradients and dequantises its data.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
from collections.abc import Callable, Iterator

import torch
from run import Go, Pair
from torch import nn

from genzoo.nn.layers import UpsampleConv2d
from genzoo.nn.resnet import ConvDecoder, ConvEncoder

N, SHAPE, LATENT, BATCH, EPOCHS, RATE = 4_096, (1, 28, 28), 16, 64, 4, 1e-3
encoder, decoder = (functools.partial(part, width=16) for part in (ConvEncoder, ConvDecoder))


def images() -> torch.Tensor:
    return torch.randint(256, (N, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def by_genzoo(precision: str) -> Callable[[], Go]:
    def build() -> Go:
        from genzoo.data.dataset import DataSet, Split
        from genzoo.data.loader import Batches
        from genzoo.distributions.likelihoods import Gaussian
        from genzoo.families.vae import VAE
        from genzoo.jobs.resources import quiet
        from genzoo.jobs.train import draw_grid
        from genzoo.runs import Run
        from genzoo.training.budget import Budget
        from genzoo.training.fit import fit
        from genzoo.training.module import GenerativeModule

        quiet()
        split = Split(images(), None)
        data = DataSet(split, split, levels=256)
        optimizer = functools.partial(torch.optim.Adam, lr=RATE, fused=True)

        def train() -> None:
            model = VAE(SHAPE, encoder=encoder, decoder=decoder, likelihood=Gaussian(), levels=256, latent_dim=LATENT)
            assert weights(model) == weights(its_model()) + 1, "genzoo learns the variance of a pixel"
            batches, budget = Batches(split, BATCH, seed=0), Budget(images=EPOCHS * N)
            module = GenerativeModule(model, optimizer, batches, budget, clip=1.0)
            draw = lambda model, path: draw_grid(model, data, path)  # noqa: E731
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                run = Run.create(folder, "vae", {})
                fit(module, run, draw, grids=1, saves=1, loggers=[], accelerator="cpu", precision=precision)
            assert module.steps == EPOCHS * N // BATCH

        return train

    return build


def plain(network: ConvDecoder) -> ConvDecoder:
    """Let a decoder double its images by torch's own layers, as one writes it without genzoo."""
    for i, layer in enumerate(network.body):
        if isinstance(layer, UpsampleConv2d):
            network.body[i - 1] = nn.Upsample(scale_factor=2)
            network.body[i] = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
    return network


@functools.cache
def its_parts() -> tuple[type[nn.Module], type[nn.Module]]:
    """genzoo's networks, of torch's own layers, as pythae takes them."""
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = encoder(SHAPE, (2 * LATENT,))

        def forward(self, x: torch.Tensor) -> ModelOutput:
            mean, log_var = self.network(x).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = plain(decoder((LATENT,), SHAPE))

        def forward(self, z: torch.Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.network(z))

    return Encoder, Decoder


def its_model() -> nn.Module:
    from pythae.models import VAE, VAEConfig

    return VAE(VAEConfig(input_dim=SHAPE, latent_dim=LATENT), *(part() for part in its_parts()))


def by_pythae() -> Go:
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig

    logging.disable()
    x = images().float() / 255

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            config = BaseTrainerConfig(
                folder, per_device_train_batch_size=BATCH, num_epochs=EPOCHS, learning_rate=RATE, no_cuda=True
            )
            TrainingPipeline(its_model(), config)(x)

    return train


def pairs() -> Iterator[Pair]:
    """In single precision, and genzoo in bfloat16 where that is exact enough."""
    name = "VAE, whole epochs through each one's own trainer"
    yield Pair(name, "pythae", by_genzoo("32-true"), by_pythae, 1.05)
    yield Pair(name, "pythae", by_genzoo("bf16-mixed"), by_pythae, 1.9, "best")
