r"""Generative adversarial networks in Wasserstein's distance, with a gradient penalty.

A generator turns noise into events, ``x = G(z)``, ``z ~ N(0, I)``, and a critic ``D`` with slope at most one measures how far
these are from the data by the dual form of Wasserstein's distance,

    W(p_data, p_G) = sup_{|grad D| <= 1}  E D(x) - E D(G(z)).

The slope is held near one by a penalty on the norm of the gradient, per sample over all its dimensions, at points between
data and samples:

    L_critic    = E D(G(z)) - E D(x) + lambda E (|grad D(x_hat)|_2 - 1)^2,    x_hat = a x + (1 - a) G(z),  a ~ U[0, 1]
    L_generator = -E D(G(z))

The critic takes several steps for each of the generator's. Neither has a density.

References:
    Arjovsky, Chintala, Bottou, "Wasserstein GAN", 2017, https://arxiv.org/abs/1701.07875.
    Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, https://arxiv.org/abs/1704.00028 (eq. 3, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from genzoo.model import Adversarial, Continuous, Decoder, Loss, Samples
from genzoo.prob.measure import snap
from genzoo.prob.random import rand, randn


def gradient_penalty(
    critic: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, fake: Tensor, y: Tensor | None, a: Tensor
) -> Tensor:
    """Mean squared distance of the critic's slope from one, between data and samples (Gulrajani et al. 2017, eq. 3).

    Computed without autocast: the penalty is a difference of squares, for which bfloat16 is too coarse.

    Args:
        critic: maps (B, *shape) and classes to (B,) or (B, 1).
        x, fake: data and samples, (B, *shape).
        y: classes, (B,).
        a: place between the two, (B,) in [0, 1].
    """
    with torch.autocast(x.device.type, enabled=False):
        a = a.view(-1, *[1] * (x.ndim - 1))
        x_hat = (a * x + (1 - a) * fake).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x_hat, y).sum(), x_hat, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class WGANGP(Decoder, Adversarial):
    """A Wasserstein GAN with gradient penalty.

    Args:
        generator: builds the generator, called as ``generator(in_shape, out_shape, num_classes)``, for ``(z, y)``.
        critic: builds the critic, in the same way, for ``(x, y)``.
        shape, levels, num_classes: of the data, as in ``GenerativeModel``; images leave the generator through a tanh.
        latent_dim: size of z.
        penalty: lambda.
        n_critic: steps of the critic for each of the generator's.
    """

    def __init__(
        self,
        generator: Callable[..., nn.Module],
        critic: Callable[..., nn.Module],
        shape: Sequence[int],
        levels: int | None = None,
        num_classes: int = 0,
        latent_dim: int = 128,
        penalty: float = 10.0,
        n_critic: int = 5,
    ):
        super().__init__(shape, levels, num_classes)
        if latent_dim < 1 or n_critic < 1:
            raise ValueError(f"latent_dim and n_critic must be at least 1, not {latent_dim} and {n_critic}")
        if penalty < 0:
            raise ValueError(f"penalty must not be negative, not {penalty}")
        self.latent = Continuous((latent_dim,))
        self.generator = generator((latent_dim,), self.shape, num_classes)
        self.critic = critic(self.shape, (1,), num_classes)
        self.penalty, self.n_critic = penalty, n_critic

    def players(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}

    def turn(self, step: int) -> str:
        return "generator" if step % (self.n_critic + 1) == self.n_critic else "critic"

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, turn: str | None = None, rng: torch.Generator | None = None
    ) -> Loss:
        self.check_labels(y, len(x))
        z = randn((len(x), *self.latent.shape), rng=rng, device=x.device, dtype=x.dtype)
        if turn == "generator":
            loss = -self.critic(self._generate(z, y), y).to(x.dtype).mean()
            return Loss(loss, {"generator": loss.detach()})
        if turn != "critic":
            raise ValueError(f"turn must be 'critic' or 'generator', not {turn!r}")
        x = x if self.levels is None else snap(x, self.levels)
        with torch.no_grad():
            fake = self._generate(z, y)
        # One pass for both halves: half the launches, and no batch statistics that could tell them apart.
        pair = torch.cat([x, fake]), None if y is None else torch.cat([y, y])
        on_data, on_fake = self.critic(*pair).to(x.dtype).chunk(2)
        distance = on_data.mean() - on_fake.mean()
        penalty = gradient_penalty(self.critic, x, fake, y, rand((len(x),), rng=rng, device=x.device, dtype=x.dtype))
        loss = self.penalty * penalty - distance
        return Loss(loss, {"critic": loss.detach(), "distance": distance.detach(), "penalty": penalty.detach()})

    def _generate(self, z: Tensor, y: Tensor | None) -> Tensor:
        x = self.generator(z, y).to(z.dtype)
        return x if self.levels is None else x.tanh()

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        self.check_labels(y, len(z))
        return self._generate(z, y)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Samples:
        y = self.draw_labels(n, y, rng)
        z = randn((n, *self.latent.shape), rng=rng, device=self.device, dtype=self.dtype)
        return Samples(self._generate(z, y), nfe=1)
