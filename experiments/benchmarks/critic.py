"""A turn of WGAN-GP's critic: genzoo's against the same in two passes, with the generator's graph built for nothing.

The other way is how it is usually written: fakes that are not detached, the critic asked about data and about fakes one
after the other, its penalty, and a backward pass into every weight of both players, of which only the critic's are moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from run import Go, Pair
from torch import Tensor

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.families.gan import WGANGP
from genzoo.nn.dcgan import DCGANCritic, DCGANGenerator
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule

SHAPE, BATCH, LATENT, WEIGHT = (3, 32, 32), 64, 128, 10.0
Adam = functools.partial(torch.optim.Adam, lr=1e-4, betas=(0.0, 0.9))


def images() -> Tensor:
    return torch.randint(256, (2_048, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def players() -> WGANGP:
    torch.manual_seed(0)
    critic = functools.partial(DCGANCritic, norm=False)  # the penalty is per sample
    return WGANGP(SHAPE, generator=DCGANGenerator, critic=critic, levels=256, latent_dim=LATENT, penalty=WEIGHT)


def by_genzoo(bf16: bool) -> Callable[[], Go]:
    def build() -> Go:
        model = players()
        model.turn = lambda step: "critic"  # type: ignore[method-assign]
        optimizer = functools.partial(Adam, fused=True)
        module = GenerativeModule(model, optimizer, Batches(Split(images(), None), BATCH, seed=0), Budget(images=10**9))
        module.plan.planned_steps = 10**9
        agree(model)

        def turn() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                module.step()

        return turn

    return build


def usual_loss(model: WGANGP, x: Tensor, z: Tensor, a: Tensor) -> Tensor:
    """The critic's loss as it is usually written."""
    fake = model.generator(z).tanh()
    on_data, on_fake = model.critic(x), model.critic(fake)
    x_hat = (a * x + (1 - a) * fake).requires_grad_()
    out = model.critic(x_hat)
    (slope,) = torch.autograd.grad(out, x_hat, torch.ones_like(out), create_graph=True, retain_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return on_fake.mean() - on_data.mean() + WEIGHT * penalty


def agree(model: WGANGP) -> None:
    """Both ways must give the critic the same gradients."""
    gradients = []
    x, z = images()[:8] / 127.5 - 1, torch.randn(8, LATENT)
    for usual in (True, False):
        a = torch.rand(8, generator=torch.Generator().manual_seed(1)).view(-1, 1, 1, 1)
        if usual:
            loss = usual_loss(model, x, z, a)
        else:
            rng = torch.Generator().manual_seed(1)
            loss = model.critic_loss(x, model.generator(z).tanh().detach(), None, rng).total
        gradients.append(torch.autograd.grad(loss, list(model.critic.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def by_two_passes() -> Go:
    model = players()
    optimizer = Adam(model.critic.parameters())
    data = images() / 127.5 - 1
    agree(model)

    def turn() -> None:
        x = data[torch.randint(len(data), (BATCH,))]
        loss = usual_loss(model, x, torch.randn(BATCH, LATENT), torch.rand(BATCH, 1, 1, 1))
        model.zero_grad()
        loss.backward()
        optimizer.step()

    return turn


def pairs() -> Iterator[Pair]:
    """In single precision, and genzoo in bfloat16 where that is exact enough."""
    name, other = "WGAN-GP critic step", "two passes, fakes not detached"
    yield Pair(name, other, by_genzoo(False), by_two_passes, 1.5)
    yield Pair(name, other, by_genzoo(True), by_two_passes, 2.5, "best")
