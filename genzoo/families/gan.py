r"""Generative adversarial networks: non-saturating and hinge GAN, WGAN with weight clipping and with gradient penalty.

A generator maps noise to events, ``x = G(z)``, ``z ~ N(0, I)``, and a critic ``D`` is trained to separate them from data. They
are updated alternately, several critic steps per generator step. There is no density. The families differ in the critic's
objective.

``GAN``: the critic's output is the logit of an event being data, with the losses

    non-saturating    L_critic = E softplus(-D(x)) + E softplus(D(G(z)))           L_generator = E softplus(-D(G(z)))
    hinge             L_critic = E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))        L_generator = -E D(G(z))

The optimal classifier is ``D = log p_data/p_G``, where ``-L_critic = 2 JSD(p_data, p_G) - 2 log 2``. The gradient of the
non-saturating generator loss in a logit, ``-sigmoid(-D)``, does not vanish for confidently rejected samples.

``WGAN``: the critic is a Lipschitz function that estimates the Wasserstein-1 distance by its dual,

    W(p_data, p_G) = sup_{|grad D| <= 1}  E D(x) - E D(G(z))
    L_critic       = E D(G(z)) - E D(x)                                            L_generator = -E D(G(z))

up to the Lipschitz constant of critics with weights clipped to [-c, c].

``WGANGP``: the same losses, with a penalty on the gradient norm of each sample at random interpolates of data and samples,

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
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from genzoo.conditions import Condition
from genzoo.distributions.discretization import to_bin_centers
from genzoo.event import EventSpec
from genzoo.model import Adversarial, Continuous, Decoder, Diagnostic, Loss, Samples
from genzoo.nn import defaults
from genzoo.numerics.random import rand, randn


class GeneratorAndCritic(Decoder, Adversarial):
    """Common base of GANs: a generator and a critic, updated alternately.

    Args:
        generator: factory of the generator, called as ``generator(in_shape, out_shape, condition)``, for ``(z, y)``.
        critic: factory of the critic, called in the same way, for ``(x, y)``.
        event, condition: as in ``GenerativeModel``; a generator of images has a final tanh.
        latent_dim: dimension of z.
        n_critic: critic steps per generator step.
    """

    diagnostics: Mapping[str, Diagnostic] = {
        "critic": Diagnostic("loss of the critic", "", "lower"),
        "generator": Diagnostic("loss of the generator", "", "lower"),
        "accuracy": Diagnostic("accuracy of the critic", "fraction, 0.5 is chance"),
        "distance": Diagnostic("E D(x) - E D(G(z))", "", "lower"),
        "penalty": Diagnostic("gradient penalty", "(|grad D| - 1)^2", "lower"),
        "critic_grad_norm": Diagnostic("gradient of the critic", "norm"),
        "generator_grad_norm": Diagnostic("gradient of the generator", "norm"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None,
        generator: Callable[..., nn.Module],
        critic: Callable[..., nn.Module],
        latent_dim: int,
        n_critic: int,
    ):
        super().__init__(event, condition)
        if latent_dim < 1 or n_critic < 1:
            raise ValueError(f"latent_dim and n_critic must be at least 1, not {latent_dim} and {n_critic}")
        self.latent = Continuous((latent_dim,))
        self.generator = generator((latent_dim,), self.shape, condition)
        self.critic = critic(self.shape, (1,), condition)
        self.n_critic = n_critic

    @abstractmethod
    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Return the critic's loss on data and detached samples, (B, *shape) each, with conditions y."""

    @abstractmethod
    def generator_loss(self, x: Tensor, fake: Tensor, y: Tensor | None) -> Tensor:
        """Return the generator's loss, (), on its samples with conditions y, and data of the same conditions."""

    def networks(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}

    def turn(self, step: int) -> str:
        return "generator" if step % (self.n_critic + 1) == self.n_critic else "critic"

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None, turn: str = "") -> Loss:
        z = randn((len(x), *self.latent.shape), rng=rng, device=x.device, dtype=x.dtype)
        x = x if self.levels is None else to_bin_centers(x, self.levels)
        if turn == "generator":
            loss = self.generator_loss(x, self._generate(z, y), y)
            return Loss(loss, {"generator": loss.detach()})
        with torch.no_grad():
            fake = self._generate(z, y)
        return self.critic_loss(x, fake, y, rng)

    def _generate(self, z: Tensor, y: Tensor | None) -> Tensor:
        x = self.generator(z, y).to(z.dtype)
        return x if self.levels is None else x.tanh()

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._generate(z, y)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        z = randn((n, *self.latent.shape), rng=rng, device=self.device, dtype=self.dtype)
        return Samples(self._generate(z, y), nfe=1)


class GAN(GeneratorAndCritic):
    """A GAN with the non-saturating or the hinge loss.

    Args:
        loss: "non_saturating" or "hinge".
        event, condition, generator, critic, latent_dim, n_critic: as in ``GeneratorAndCritic``.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        generator: Callable[..., nn.Module] = defaults.generator,
        critic: Callable[..., nn.Module] = defaults.critic,
        latent_dim: int = 128,
        loss: Literal["non_saturating", "hinge"] = "non_saturating",
        n_critic: int = 1,
    ):
        super().__init__(event, condition, generator, critic, latent_dim, n_critic)
        if loss not in ("non_saturating", "hinge"):
            raise ValueError(f"loss must be 'non_saturating' or 'hinge', not {loss!r}")
        self.hinge = loss == "hinge"

    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        # Two passes, so that batch norm does not mix the statistics of data and samples.
        on_data, on_fake = self.critic(x, y).to(x.dtype), self.critic(fake, y).to(x.dtype)
        if self.hinge:
            loss = F.relu(1 - on_data).mean() + F.relu(1 + on_fake).mean()
        else:
            loss = F.softplus(-on_data).mean() + F.softplus(on_fake).mean()
        right = 0.5 * ((on_data > 0).to(x.dtype).mean() + (on_fake < 0).to(x.dtype).mean())
        return Loss(loss, {"critic": loss.detach(), "accuracy": right})

    def generator_loss(self, x: Tensor, fake: Tensor, y: Tensor | None) -> Tensor:
        logits = self.critic(fake, y).to(fake.dtype)
        return -logits.mean() if self.hinge else F.softplus(-logits).mean()


class WGAN(GeneratorAndCritic):
    """A Wasserstein GAN with weight clipping.

    Weights are clipped to [-c, c] before the first step and after each step (Arjovsky et al. 2017, algorithm 1).

    Args:
        clip: c, for all parameters of the critic, including those of batch norm, as in the authors' code.
        event, condition, generator, critic, latent_dim, n_critic: as in ``GeneratorAndCritic``.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        generator: Callable[..., nn.Module] = defaults.generator,
        critic: Callable[..., nn.Module] = defaults.critic,
        latent_dim: int = 128,
        clip: float = 0.01,
        n_critic: int = 5,
    ):
        super().__init__(event, condition, generator, critic, latent_dim, n_critic)
        if clip <= 0:
            raise ValueError(f"clip must be positive, not {clip}")
        self.clip = clip

    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        distance = (self.critic(x, y).to(x.dtype) - self.critic(fake, y).to(x.dtype)).mean()
        return Loss(-distance, {"critic": -distance.detach(), "distance": distance.detach()})

    def generator_loss(self, x: Tensor, fake: Tensor, y: Tensor | None) -> Tensor:
        return -self.critic(fake, y).to(fake.dtype).mean()

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        self._clip()

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self._clip()
        return {}

    def _clip(self) -> None:
        for parameter in self.critic.parameters():
            parameter.clamp_(-self.clip, self.clip)


def value_and_gradient(
    critic: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the critic's output for each event, (B, ...), and its gradient in the event, (B, *shape).

    Computed without autocast, since the cancellation in penalties is too severe for bfloat16, and with gradients even in a
    validation. Events must not interact in the critic, as they do in batch norm.

    Args:
        critic: maps (B, *shape) and conditions to (B,) or (B, 1).
        x: events, (B, *shape).
        y: conditions, (B, *condition.shape).
    """
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # A graph may hold no tensor of an inference mode.
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        y = y.clone() if y is not None and y.is_inference() else y
        value = critic(x, y)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=differentiable)
    return value, gradient


def gradient_penalty(
    critic: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, fake: Tensor, y: Tensor | None, a: Tensor
) -> Tensor:
    """Mean squared deviation of the critic's gradient norm from 1 at interpolates (Gulrajani et al. 2017, eq. 3).

    Args:
        critic: as in ``value_and_gradient``.
        x, fake: data and samples, (B, *shape).
        y: conditions, (B, *condition.shape).
        a: interpolation weight of the data, (B,) in [0, 1].
    """
    a = a.view(-1, *[1] * (x.ndim - 1))
    _, gradient = value_and_gradient(critic, a * x + (1 - a) * fake, y)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class WGANGP(GeneratorAndCritic):
    """A Wasserstein GAN with gradient penalty.

    Args:
        penalty: lambda.
        event, condition, generator, critic, latent_dim, n_critic: as in ``GeneratorAndCritic``; the critic must not have batch
            norm, which couples the gradients of the samples.

    Raises:
        ValueError: for a critic with batch norm.
    """

    eager = ("critic",)  # needs double backward

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        generator: Callable[..., nn.Module] = defaults.generator,
        critic: Callable[..., nn.Module] = defaults.critic_without_norm,
        latent_dim: int = 128,
        penalty: float = 10.0,
        n_critic: int = 5,
    ):
        super().__init__(event, condition, generator, critic, latent_dim, n_critic)
        if penalty < 0:
            raise ValueError(f"penalty must not be negative, not {penalty}")
        if any(isinstance(module, _BatchNorm) for module in self.critic.modules()):
            raise ValueError("the gradient penalty is per sample: the critic must not have batch norm")
        self.penalty = penalty

    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        # One pass for both: without batch statistics the result is the same, with half the kernel launches.
        pair = torch.cat([x, fake]), None if y is None else torch.cat([y, y])
        on_data, on_fake = self.critic(*pair).to(x.dtype).chunk(2)
        distance = on_data.mean() - on_fake.mean()
        penalty = gradient_penalty(self.critic, x, fake, y, rand((len(x),), rng=rng, device=x.device, dtype=x.dtype))
        loss = self.penalty * penalty - distance
        return Loss(loss, {"critic": loss.detach(), "distance": distance.detach(), "penalty": penalty.detach()})

    def generator_loss(self, x: Tensor, fake: Tensor, y: Tensor | None) -> Tensor:
        return -self.critic(fake, y).to(fake.dtype).mean()
