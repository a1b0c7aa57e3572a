r"""Variational lower bounds of a log density, and the KL weighting of training losses.

With an approximate posterior q(z | x) the ELBO is the negative sum of distortion and rate,

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || p(z)) = -distortion - rate,

and K samples with weights ``w_k = p(x, z_k) / q(z_k | x)`` give the tighter importance-weighted bound, E log 1/K sum_k w_k.

Training losses may reweight the rate, against posterior collapse: by a linear warm-up, by free bits per group of latents, or by
a constant ``beta``. Reported bounds are not reweighted.

References:
    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, https://arxiv.org/abs/1509.00519 (eq. 8).
    Sonderby et al., "Ladder Variational Autoencoders", 2016, https://arxiv.org/abs/1602.02282 (warm-up).
    Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow", 2016,
    https://arxiv.org/abs/1606.04934 (appendix, free bits).
    Higgins et al., "beta-VAE", 2017, https://openreview.net/forum?id=Sy2fzU9gl.
    Rezende, Viola, "Taming VAEs", 2018, https://arxiv.org/abs/1810.00597 (a constraint in place of a weight).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genzoo.numerics import distributed


def importance_weighted(log_weights: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""Importance-weighted bound ``log 1/K sum_k w_k`` and its standard error, (K, B) -> (B,), (B,) or None for K = 1.

    The standard error is the jackknife estimate: with ``v_k`` the bound of all weights but w_k,

        stderr^2 = (K - 1)/K sum_k (v_k - mean of v)^2

    For similar weights it agrees with the delta method, ``std(w)/(sqrt(K) mean(w))``. That is at most 1 nat, even where
    one weight dominates, as in high dimensions; there the root mean square of the jackknife estimate over repetitions is within
    15 % of the standard deviation of the bound (for K = 2 too small).

    References:
        Efron, Stein, "The Jackknife Estimate of Variance", 1981, https://doi.org/10.1214/aos/1176345462.
    """
    K = len(log_weights)
    value = log_weights.logsumexp(0) - math.log(K)
    if K == 1:
        return value, None
    ratios = (log_weights - value).double()
    none = torch.full_like(ratios[:1], -torch.inf)
    before = torch.cat([none, ratios[:-1].logcumsumexp(0)])
    after = torch.cat([ratios[1:].flip(0).logcumsumexp(0).flip(0), none])
    without = torch.logaddexp(before, after)
    return value, (math.sqrt(K - 1) * without.std(0, correction=0)).to(value.dtype)


class RateCost(nn.Module):
    r"""The weighted KL term of a training loss, in nats.

        beta min(1, seen / warmup) sum_j max(free_bits, mean over the batch of KL_j)

    with ``KL_j`` the divergence of group j of the latents: a latent, or a channel of a feature map summed over positions
    (Kingma et al. 2016). ``seen`` is the number of training images, saved with the weights.

    Args:
        beta: weight of the KL term.
        warmup: images over which the weight increases linearly from 0; 0 for no warm-up.
        free_bits: nats per group below which the KL is not minimised.
    """

    seen: Tensor

    def __init__(self, beta: float = 1.0, warmup: int = 0, free_bits: float = 0.0):
        super().__init__()
        for name, value in {"beta": beta, "warmup": warmup, "free_bits": free_bits}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        self.beta, self.warmup, self.free_bits = beta, warmup, free_bits
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, *divergences: Tensor, estimated: bool = False) -> Tensor:
        """Return the weighted KL of a batch, ().

        Args:
            divergences: KL of each latent, (B, groups, ...), from one or several layers.
            estimated: whether they are estimates from samples, which may be negative; without free bits, they stay so, since a
                bound at 0 would bias their mean.
        """
        groups = [kl.reshape(*kl.shape[:2], -1).sum(2).mean(0) for kl in divergences]
        rates = torch.cat(groups)
        if self.training and self.free_bits:  # nonlinear in the mean over the batch
            rates = distributed.all_reduce_mean(rates)
        if not estimated or self.free_bits:
            rates = rates.clamp(min=self.free_bits)
        rate = rates.sum()
        return self.weight() * rate

    def weight(self) -> Tensor | float:
        """Return the current weight of the KL term."""
        return self.beta * ((self.seen / self.warmup).clamp(max=1) if self.warmup else 1.0)

    def count(self, images: int) -> None:
        """Count the images of a training step, for the warm-up."""
        self.seen += images


class Constraint(nn.Module):
    r"""A distortion that is held at a target by a Lagrange multiplier (GECO).

    The loss is ``rate + lambda (distortion - target)``. After each step

        c <- decay c + (1 - decay) (distortion - target)/D,      lambda <- lambda exp(speed c)

    so that the multiplier rises while the distortion exceeds the target, and otherwise falls. The optimum is that of a VAE with
    ``beta = 1/lambda``: the target replaces the choice of beta.

    Args:
        target: of the distortion, in nats.
        dim: D, the number of dimensions of an event.
        speed: of the multiplier, per step and nat per dimension.
        decay: of the moving average of the excess.

    References:
        Rezende, Viola, "Taming VAEs", 2018, https://arxiv.org/abs/1810.00597 (eq. 3, algorithm 1).
    """

    LARGEST = 1e4  # multiplier, and its inverse the smallest one

    log_multiplier: Tensor
    excess: Tensor

    def __init__(self, target: float, dim: int, speed: float = 0.02, decay: float = 0.9):
        super().__init__()
        self.target, self.dim, self.speed, self.decay = target, dim, speed, decay
        self.register_buffer("log_multiplier", torch.zeros(()))
        self.register_buffer("excess", torch.zeros(()))

    def forward(self, distortion: Tensor) -> Tensor:
        """Return the weighted excess of a distortion, ()."""
        return self.log_multiplier.exp() * (distortion - self.target)

    def update(self, distortion: Tensor) -> None:
        """Update the multiplier by the distortion of a step, the mean over the global batch."""
        self.excess.lerp_(((distortion - self.target) / self.dim).to(self.excess), 1 - self.decay)
        bound = math.log(self.LARGEST)
        self.log_multiplier.add_(self.speed * self.excess).clamp_(-bound, bound)
