r"""R3GAN: a relativistic GAN with gradient penalties on data and on samples.

The critic ranks pairs of an event of the data and a sample instead of classifying either (RpGAN),

    L_critic    = E softplus(-(D(x) - D(G(z)))) + gamma/2 (R1 + R2)
    L_generator = E softplus(-(D(G(z)) - D(x)))
    R1          = E |grad D(x)|^2,    R2 = E |grad D(G(z))|^2

A sample is compared with data of its own, so that a generator that drops a mode is penalised at the data of that mode; the
landscape has no bad local minima of collapsed modes (Sun et al. 2020). Without penalties training need not converge:
zero-centred penalties on both sides make it locally convergent (Huang et al. 2024, proposition 2).

The smallest case is the Dirac-GAN: data at 0, a generator ``delta(x - theta)`` and a critic ``D(x) = psi x``. Gradient flow of
both losses has at the equilibrium the Jacobian

    d/dt (psi, theta) = [[-2 gamma, -1/2], [1/2, 0]] (psi, theta),     eigenvalues -gamma +- sqrt(gamma^2 - 1/4)

Without penalties the eigenvalues are +-i/2, and the solution circles the equilibrium forever. The penalty of one side alone has
half of gamma's effect here, and none on a critic which is flat at that side only.

``gamma`` may be annealed by a cosine, as the paper's recipes do.

References:
    Huang, Gokaslan, Kuleshov, Tompkin, "The GAN is dead; long live the GAN! A Modern GAN Baseline", 2024,
    https://arxiv.org/abs/2501.05441 (section 2: eq. 2, propositions 1 and 2; section 4, the networks).
    Jolicoeur-Martineau, "The relativistic discriminator", 2018, https://arxiv.org/abs/1807.00734 (RpGAN).
    Sun, Fang, Schwing, "Towards a Better Global Loss Landscape of GANs", 2020, https://arxiv.org/abs/2011.04926.
    Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?", 2018,
    https://arxiv.org/abs/1801.04406 (Dirac-GAN; R1 and R2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from genzoo.conditions import Condition
from genzoo.event import EventSpec
from genzoo.families.gan import GeneratorAndCritic, value_and_gradient
from genzoo.model import Diagnostic, Loss
from genzoo.nn import defaults
from genzoo.numerics.annealing import CosineAnnealing


class R3GAN(GeneratorAndCritic):
    """A relativistic GAN with zero-centred gradient penalties on data and samples.

    Args:
        gamma: weight of the penalties, at the beginning.
        final_gamma: weight at the end of the annealing; None for ``gamma``.
        annealing: training images until ``final_gamma`` is reached, by a cosine.
        event, condition, generator, critic, latent_dim, n_critic: as in ``GeneratorAndCritic``; the critic must not have batch
            norm, which couples the gradients of the samples.

    Raises:
        ValueError: for a negative weight, a final weight without an annealing, and a critic with batch norm.
    """

    eager = ("critic",)  # needs double backward

    diagnostics: Mapping[str, Diagnostic] = {
        **GeneratorAndCritic.diagnostics,
        "accuracy": Diagnostic("pairs ranked correctly", "fraction, 0.5 is chance"),
        "penalty": Diagnostic("gradient penalties R1 + R2", "|grad D|^2", "lower"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        generator: Callable[..., nn.Module] = defaults.modern_generator,
        critic: Callable[..., nn.Module] = defaults.modern_critic,
        latent_dim: int = 64,
        gamma: float = 0.05,
        final_gamma: float | None = None,
        annealing: int = 0,
        n_critic: int = 1,
    ):
        super().__init__(event, condition, generator, critic, latent_dim, n_critic)
        for name, value in {"gamma": gamma, "final_gamma": final_gamma, "annealing": annealing}.items():
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        if final_gamma is not None and not annealing:
            raise ValueError(f"final_gamma={final_gamma} needs annealing, the images until it is reached")
        if any(isinstance(module, _BatchNorm) for module in self.critic.modules()):
            raise ValueError("the gradient penalties are per sample: the critic must not have batch norm")
        self.gamma = CosineAnnealing(gamma, gamma if final_gamma is None else final_gamma, annealing)

    def critic_loss(self, x: Tensor, fake: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        pair = torch.cat([x, fake]), None if y is None else torch.cat([y, y])
        value, gradient = value_and_gradient(self.critic, *pair)
        on_data, on_fake = value.to(x.dtype).chunk(2)
        margin = on_data - on_fake
        penalty = gradient.flatten(1).square().sum(1).mean() * 2  # R1 + R2: the mean is over both halves
        loss = F.softplus(-margin).mean() + 0.5 * self.gamma().to(x.dtype) * penalty
        terms = {
            "critic": loss,
            "distance": margin.mean(),
            "penalty": penalty,
            "accuracy": (margin > 0).to(x.dtype).mean(),
        }
        return Loss(loss, {name: term.detach() for name, term in terms.items()})

    def generator_loss(self, x: Tensor, fake: Tensor, y: Tensor | None) -> Tensor:
        with torch.no_grad():
            on_data = self.critic(x, y).to(fake.dtype)
        return F.softplus(on_data - self.critic(fake, y).to(fake.dtype)).mean()

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self.gamma.count(batch_size)
        return {}
