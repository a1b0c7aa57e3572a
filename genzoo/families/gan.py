r"""Generative adversarial networks: non-saturating and hinge GANs, Wasserstein GANs with clipping and with a penalty.

A generator turns noise into events, ``x = G(z)``, ``z ~ N(0, I)``, and a critic ``D`` learns to tell them from data. The two
take turns, several of the critic's for one of the generator's; neither has a density. What the critic is asked for makes
the family.

``GAN``: the log odds that an event comes from the data, as a classifier or by a margin,

    non-saturating    L_critic = E softplus(-D(x)) + E softplus(D(G(z)))           L_generator = E softplus(-D(G(z)))
    hinge             L_critic = E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))        L_generator = -E D(G(z))

The best classifier is ``D = log p_data/p_G``, where ``-L_critic = 2 JSD(p_data, p_G) - 2 log 2``. The generator's slope,
``-sigmoid(-D)`` in each of its logits, is steepest where the critic is surest that it sees a fake.

``WGAN``: a function of bounded slope, which measures Wasserstein's distance in its dual form,

    W(p_data, p_G) = sup_{|grad D| <= 1}  E D(x) - E D(G(z))
    L_critic       = E D(G(z)) - E D(x)                                            L_generator = -E D(G(z))

up to the factor that bounds the slope of all critics whose weights lie in [-c, c].

``WGANGP``: the same losses, and the slope held near one by a penalty on the norm of the gradient, per sample over all its
dimensions, at points between data and samples,

    L_critic = E D(G(z)) - E D(x) + lambda E (|grad D(x_hat)|_2 - 1)^2,    x_hat = a x + (1 - a) G(z),  a ~ U[0, 1]

References:
    Goodfellow et al., "Generative Adversarial Nets", 2014, https://arxiv.org/abs/1406.2661 (section 3; theorem 1).
    Lim, Ye, "Geometric GAN", 2017, https://arxiv.org/abs/1705.02894 (the hinge loss).
    Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018, https://arxiv.org/abs/1802.05957.
    Arjovsky, Chintala, Bottou, "Wasserstein GAN", 2017, https://arxiv.org/abs/1701.07875 (algorithm 1).
    Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, https://arxiv.org/abs/1704.00028 (eq. 3, algorithm 1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from genzoo.distributions.discretization import to_bin_centers
from genzoo.model import Adversarial, Continuous, Decoder, Diagnostic, Loss, Samples
from genzoo.numerics.random import rand, randn


class _TwoPlayers(Decoder, Adversarial):
    """What every GAN shares: a generator, a critic and their turns.

    Args:
        generator: builds the generator, called as ``generator(in_shape, out_shape, num_classes)``, for ``(z, y)``.
        critic: builds the critic, in the same way, for ``(x, y)``.
        shape, levels, num_classes: of the data, as in ``GenerativeModel``; images leave the generator through a tanh.
        latent_dim: size of z.
        n_critic: steps of the critic for each of the generator's.
    """

    diagnostics: Mapping[str, Diagnostic] = {
        "critic": Diagnostic("loss of the critic", "", "lower"),
        "generator": Diagnostic("loss of the generator", "", "lower"),
        "accuracy": Diagnostic("decisions of the critic that are right", "share, 0.5 is a draw"),
        "distance": Diagnostic("critic on data less critic on samples", "", "lower"),
        "penalty": Diagnostic("gradient penalty", "mean of (slope - 1) squared", "lower"),
        "critic_grad_norm": Diagnostic("gradient of the critic", "norm"),
        "generator_grad_norm": Diagnostic("gradient of the generator", "norm"),
    }

    def __init__(
        self,
        generator: Callable[..., nn.Module],
        critic: Callable[..., nn.Module],
        shape: Sequence[int],
        levels: int | None,
        num_classes: int,
        latent_dim: int,
        n_critic: int,
    ):
        super().__init__(shape, levels, num_classes)
        if latent_dim < 1 or n_critic < 1:
            raise ValueError(f"latent_dim and n_critic must be at least 1, not {latent_dim} and {n_critic}")
        self.latent = Continuous((latent_dim,))
        self.generator = generator((latent_dim,), self.shape, num_classes)
        self.critic = critic(self.shape, (1,), num_classes)
        self.n_critic = n_critic

    @abstractmethod
    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Return the critic's loss on data and on samples that have no gradient, (B, *shape) each, of classes y."""

    @abstractmethod
    def generator_loss(self, fake: Tensor, y: Tensor | None) -> Tensor:
        """Return the generator's loss, (), on its samples of classes y."""

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
            loss = self.generator_loss(self._generate(z, y), y)
            return Loss(loss, {"generator": loss.detach()})
        if turn != "critic":
            raise ValueError(f"turn must be 'critic' or 'generator', not {turn!r}")
        x = x if self.levels is None else to_bin_centers(x, self.levels)
        with torch.no_grad():
            fake = self._generate(z, y)
        return self.critic_loss(x, fake, y, rng)

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


class GAN(_TwoPlayers):
    """A GAN whose critic classifies: Goodfellow's, or the hinge GAN.

    Args:
        loss: "non_saturating" or "hinge".
        generator, critic, shape, levels, num_classes, latent_dim, n_critic: as in every GAN, see ``_TwoPlayers``.
    """

    def __init__(
        self,
        generator: Callable[..., nn.Module],
        critic: Callable[..., nn.Module],
        shape: Sequence[int],
        levels: int | None = None,
        num_classes: int = 0,
        latent_dim: int = 128,
        loss: Literal["non_saturating", "hinge"] = "non_saturating",
        n_critic: int = 1,
    ):
        super().__init__(generator, critic, shape, levels, num_classes, latent_dim, n_critic)
        if loss not in ("non_saturating", "hinge"):
            raise ValueError(f"loss must be 'non_saturating' or 'hinge', not {loss!r}")
        self.hinge = loss == "hinge"

    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        # Two passes: in one, batch norm would mix the statistics of both halves and give each away to the other.
        on_data, on_fake = self.critic(x, y).to(x.dtype), self.critic(fake, y).to(x.dtype)
        if self.hinge:
            loss = F.relu(1 - on_data).mean() + F.relu(1 + on_fake).mean()
        else:
            loss = F.softplus(-on_data).mean() + F.softplus(on_fake).mean()
        right = 0.5 * ((on_data > 0).to(x.dtype).mean() + (on_fake < 0).to(x.dtype).mean())
        return Loss(loss, {"critic": loss.detach(), "accuracy": right})

    def generator_loss(self, fake: Tensor, y: Tensor | None) -> Tensor:
        logits = self.critic(fake, y).to(fake.dtype)
        return -logits.mean() if self.hinge else F.softplus(-logits).mean()


class WGAN(_TwoPlayers):
    """A Wasserstein GAN whose critic has weights in [-c, c].

    A critic's turn begins by clipping its weights in place, and a generator's turn, which may move no weight of the
    critic, asks a clipped copy. Both players therefore only ever meet a clipped critic, as if each of its steps had ended
    with the clipping (Arjovsky et al. 2017, algorithm 1); the weights that are stored may lie one step outside.

    Args:
        clip: c, for all of the critic's parameters, those of batch norm included, as in the authors' code.
        generator, critic, shape, levels, num_classes, latent_dim, n_critic: as in every GAN, see ``_TwoPlayers``.
    """

    eager = ("critic",)  # which the generator asks with other weights

    def __init__(
        self,
        generator: Callable[..., nn.Module],
        critic: Callable[..., nn.Module],
        shape: Sequence[int],
        levels: int | None = None,
        num_classes: int = 0,
        latent_dim: int = 128,
        clip: float = 0.01,
        n_critic: int = 5,
    ):
        super().__init__(generator, critic, shape, levels, num_classes, latent_dim, n_critic)
        if clip <= 0:
            raise ValueError(f"clip must be positive, not {clip}")
        self.clip = clip

    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        with torch.no_grad():
            for parameter in self.critic.parameters():
                parameter.clamp_(-self.clip, self.clip)
        distance = (self.critic(x, y).to(x.dtype) - self.critic(fake, y).to(x.dtype)).mean()
        return Loss(-distance, {"critic": -distance.detach(), "distance": distance.detach()})

    def generator_loss(self, fake: Tensor, y: Tensor | None) -> Tensor:
        # The value is clipped, the gradient is the weight's own: clamp has none at its edges, where most weights end up.
        clipped = {
            name: p + (p.clamp(-self.clip, self.clip) - p).detach() for name, p in self.critic.named_parameters()
        }
        return -functional_call(self.critic, clipped, (fake, y)).to(fake.dtype).mean()


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


class WGANGP(_TwoPlayers):
    """A Wasserstein GAN with gradient penalty.

    Args:
        penalty: lambda.
        generator, critic, shape, levels, num_classes, latent_dim, n_critic: as in every GAN, see ``_TwoPlayers``; batch
            norm is refused in the critic, since it would make one sample's slope depend on the others.
    """

    eager = ("critic",)  # of whose slope the slope is wanted

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
        super().__init__(generator, critic, shape, levels, num_classes, latent_dim, n_critic)
        if penalty < 0:
            raise ValueError(f"penalty must not be negative, not {penalty}")
        if any(isinstance(module, _BatchNorm) for module in self.critic.modules()):
            raise ValueError("the gradient penalty is per sample: the critic must have no batch norm")
        self.penalty = penalty

    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        # One pass for both halves: half the launches, and no batch statistics that could tell them apart.
        pair = torch.cat([x, fake]), None if y is None else torch.cat([y, y])
        on_data, on_fake = self.critic(*pair).to(x.dtype).chunk(2)
        distance = on_data.mean() - on_fake.mean()
        penalty = gradient_penalty(self.critic, x, fake, y, rand((len(x),), rng=rng, device=x.device, dtype=x.dtype))
        loss = self.penalty * penalty - distance
        return Loss(loss, {"critic": loss.detach(), "distance": distance.detach(), "penalty": penalty.detach()})

    def generator_loss(self, fake: Tensor, y: Tensor | None) -> Tensor:
        return -self.critic(fake, y).to(fake.dtype).mean()
