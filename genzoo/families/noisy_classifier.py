r"""A classifier of noisy data, whose gradient guides unconditional diffusion and flow models.

A network models p(y | x_t) at every noise level. Any Gaussian path is at each of its times a multiple of the path
``cos(pi u / 2) x + sin(pi u / 2) eps`` (``genzoo.diffusion.noisy``), so that one classifier, trained with u uniform in [0, 1],
guides every denoiser. Noisy data say less of their class the weaker the signal is,
``log p(y | x_u) = log p(y) + O(cos(pi u / 2))``, which the logits contain as a factor,

    logits = b + cos(pi u / 2) f(x_u, u)

with a learned bias b and a network f. Without it the error of the gradient would not vanish with the signal, and be amplified
without bound in the velocity, whose factor of the score is -sigma/alpha. Training minimises the cross-entropy

    L = E_{u, x, eps} -log p(y | x_u).

Bayes' rule for the noisy data gives the conditional score, ``grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t)``.

References:
    Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, https://arxiv.org/abs/2105.05233 (section 4).
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456 (eq. 14).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Condition
from genzoo.diffusion.guidance import NoisyClassifier
from genzoo.diffusion.noisy import at_angle, with_noise
from genzoo.distributions.discretization import to_bin_centers
from genzoo.event import EventSpec
from genzoo.model import Loss, TrainableModel
from genzoo.nn import defaults


class NoiseConditionalClassifier(TrainableModel, NoisyClassifier):
    """A classifier of noisy data at every noise level.

    Args:
        network: factory of the network, called as ``network(in_shape, (n,), None)``, for ``(x_u, u, None)``.
        event: as in ``GenerativeModel``.
        condition: the classes.

    Raises:
        ValueError: for a condition other than classes.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.noisy_classifier,
    ):
        super().__init__(event, condition)
        if not isinstance(condition, ClassLabels):
            raise ValueError(f"a classifier needs data with classes, not {condition}; set data.conditional=true")
        self.network = network(self.shape, (condition.n,), None)
        self.bias = nn.Parameter(torch.zeros(condition.n))

    def log_probs(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        x_u, u, signal = at_angle(x_t, alpha, sigma)
        logits = self.network(x_u, u, None).to(x_t.dtype)
        return (self.bias + signal[:, None] * logits).log_softmax(1)

    def noisy(self, x: Tensor, rng: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Draw noise levels and noise; return x_t, alpha and sigma, (B, *shape), (B,) and (B,)."""
        return with_noise(x if self.levels is None else to_bin_centers(x, self.levels), rng)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        assert y is not None
        log_probs = self.log_probs(*self.noisy(x, rng))
        cross_entropy = F.nll_loss(log_probs, y)
        accuracy = (log_probs.detach().argmax(1) == y).to(x.dtype).mean()
        return Loss(cross_entropy, {"cross_entropy": cross_entropy.detach(), "accuracy": accuracy})
