r"""Lower bounds of a log density by latents: what is reported, and what is minimised in its place.

With an approximate posterior q(z | x) the log density of an event splits into what its description by z loses and costs,

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || p(z)) = -distortion - rate,

and K draws of z with weights ``w_k = p(x, z_k) / q(z_k | x)`` give a tighter bound, E log 1/K sum_k w_k.

Training may charge for the rate otherwise than the bound does: less at first, so that latents are learned before they are
priced (warm-up); nothing for the first nats of each group of latents, so that none is given up early (free bits); or
``beta`` times as much throughout. None of it belongs in a bound that is reported.

References:
    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, https://arxiv.org/abs/1509.00519 (eq. 8).
    Sonderby et al., "Ladder Variational Autoencoders", 2016, https://arxiv.org/abs/1602.02282 (warm-up).
    Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow", 2016,
    https://arxiv.org/abs/1606.04934 (appendix, free bits).
    Higgins et al., "beta-VAE", 2017, https://openreview.net/forum?id=Sy2fzU9gl.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genzoo.numerics import distributed


def importance_weighted(log_weights: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""Return the bound that K weights give, ``log 1/K sum_k w_k``, and its standard error, (K, B) -> (B,), (B,) or None.

    The error is the jackknife's: with ``v_k`` the bound of all weights but w_k,

        stderr^2 = (K - 1)/K sum_k (v_k - mean of v)^2

    Where weights are alike it is that of the delta method, ``std(w)/(sqrt(K) mean(w))``, which never exceeds 1 nat. Where one
    weight outweighs the others, as those of high-dimensional events do, it goes on growing: over repetitions its root mean
    square is the spread of the bound within 15 %, with two draws (too small) as with many. Of a single event it is as rough as
    K draws allow, and of one draw unknown: None.

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
    r"""What the loss charges for the rate, in nats.

        beta min(1, seen / warmup) sum_j max(free_bits, mean over the batch of KL_j)

    with ``KL_j`` the divergence of group j of the latents: one latent, or one channel of a feature map over all of its
    places (Kingma et al. 2016). ``seen`` counts the images of training and is saved with the weights.

    Args:
        beta: weight of the rate.
        warmup: images over which the weight rises linearly from zero; 0 for none.
        free_bits: nats of each group that cost nothing more.
    """

    seen: Tensor

    def __init__(self, beta: float = 1.0, warmup: int = 0, free_bits: float = 0.0):
        super().__init__()
        for name, value in {"beta": beta, "warmup": warmup, "free_bits": free_bits}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        self.beta, self.warmup, self.free_bits = beta, warmup, free_bits
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, *divergences: Tensor) -> Tensor:
        """Return the cost of one batch, ().

        Args:
            divergences: KL of each latent, (B, groups, ...), from one or several layers.
        """
        groups = [kl.reshape(*kl.shape[:2], -1).sum(2).mean(0) for kl in divergences]
        rates = torch.cat(groups)
        if self.training and self.free_bits:  # without free bits the cost is a mean over examples
            rates = distributed.all_reduce_mean(rates)
        rate = rates.clamp(min=self.free_bits).sum()
        weight = (self.seen / self.warmup).clamp(max=1) if self.warmup else 1.0
        return self.beta * weight * rate

    def count(self, images: int) -> None:
        """Advance the warm-up by the images of a training step."""
        self.seen += images
