r"""Mixtures of normal distributions, above all as priors over the latents of an autoencoder.

    p(x | y) = sum_k w_k(y) N(x; m_k, S_k),      S_k = L_k L_k'

with full or diagonal covariances. The weights alone depend on a condition, so that classes share their components.

Expectation maximisation alternates, for data x_1, ..., x_N,

    r_nk = w_k N(x_n; m_k, S_k) / sum_j w_j N(x_n; m_j, S_j)                                                     (E)
    w_k = R_k/N,   m_k = sum_n r_nk x_n / R_k,   S_k = sum_n r_nk (x_n - m_k)(x_n - m_k)'/R_k,   R_k = sum_n r_nk  (M)

and never lowers the likelihood. Training starts from a fit of the first batch by EM, and continues by stochastic gradients of
the exact log likelihood, whose stationary points are the fixed points of EM.

References:
    Dempster, Laird, Rubin, "Maximum Likelihood from Incomplete Data via the EM Algorithm", 1977,
    https://doi.org/10.1111/j.2517-6161.1977.tb01600.x (section 4.3).
    Arthur, Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007,
    https://theory.stanford.edu/~sergei/papers/kMeansPP-soda.pdf (section 2.2, the first means).
    Ghosh et al., "From Variational to Deterministic Autoencoders", 2020, https://arxiv.org/abs/1903.12436 (section 4: as a
    prior fitted after an autoencoder).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.likelihoods import draw_index
from genzoo.event import EventSpec
from genzoo.model import Bound, Density, LogProb, Loss, Samples
from genzoo.nn.embeddings import embed
from genzoo.numerics import distributed
from genzoo.numerics.random import rand, randn

RIDGE, EM_STEPS = 1e-3, 20  # of the first fit: added to variances, relative to those of the batch; iterations


class Mixture(NamedTuple):
    """The parameters of a mixture of normal distributions."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    covariances: Tensor  # (K, D, D)


def log_components(x: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """Return log N(x; m_k, L_k L_k') of each point and component, (B, D), (K, D), (K, D, D) -> (B, K)."""
    z = torch.linalg.solve_triangular(factors, (x[None] - means[:, None]).mT, upper=False)  # (K, D, B)
    log_det = factors.diagonal(dim1=1, dim2=2).log().sum(1)
    return (-0.5 * z.square().sum(1) - (log_det + 0.5 * x.shape[1] * math.log(2 * math.pi))[:, None]).T


def em_step(x: Tensor, mixture: Mixture, ridge: float) -> tuple[Mixture, Tensor]:
    """One iteration of EM.

    Args:
        x: data, (N, D).
        mixture: the current one.
        ridge: added to the variances.

    Returns:
        The next mixture, and the mean log likelihood of the current one, ().
    """
    log_joint = mixture.weights.log() + log_components(x, mixture.means, torch.linalg.cholesky(mixture.covariances))
    log_p = log_joint.logsumexp(1)
    r = torch.exp(log_joint - log_p[:, None])
    total = r.sum(0) + 10 * torch.finfo(x.dtype).eps  # an empty component stays finite
    means = (r.T @ x) / total[:, None]
    gap = x[None] - means[:, None]  # (K, N, D)
    covariances = (r.T[..., None] * gap).mT @ gap / total[:, None, None]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return Mixture(total / total.sum(), means, covariances + ridge * eye), log_p.mean()


def first_means(x: Tensor, components: int, u: Tensor) -> Tensor:
    """Choose data far from each other (k-means++), (N, D) -> (K, D), by uniform numbers u, (K,)."""
    chosen = x[(u[:1] * len(x)).long().clamp(max=len(x) - 1)]
    for k in range(1, components):
        distance = (x[:, None] - chosen[None]).square().sum(2).amin(1).double()
        cdf = (distance + 1e-12).cumsum(0)
        chosen = torch.cat([chosen, x[torch.searchsorted(cdf, u[k : k + 1].double() * cdf[-1]).clamp(max=len(x) - 1)]])
    return chosen


def fit(x: Tensor, components: int, u: Tensor, *, steps: int = EM_STEPS) -> Mixture:
    """Fit a mixture to data by EM from k-means++, regularised by a fraction of the variance of the data.

    Args:
        x: data, (N, D), float64.
        components: K.
        u: uniform numbers, (K,), for the first means.
        steps: iterations.
    """
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    variance = x.var(0, correction=0).mean().clamp(min=1e-8)
    weights = torch.full((components,), 1 / components, dtype=x.dtype, device=x.device)
    # A component takes several points at first; few points leave their directions to the ridge.
    mixture = Mixture(weights, first_means(x, components, u), (variance * eye).expand(components, -1, -1))
    ridge = variance * max(RIDGE, x.shape[1] * components / (10 * len(x)))
    for _ in range(steps):
        mixture, _ = em_step(x, mixture, ridge)  # type: ignore[arg-type]
    return mixture


class GMM(Density):
    """A mixture of normal distributions.

    Args:
        event, condition: as in ``GenerativeModel``; real vectors, or arrays of them.
        components: K.
        covariance: "full" or "diagonal".

    Raises:
        ValueError: for data with levels, less than one component, and another kind of covariance.
    """

    bound = Bound.EXACT

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        components: int = 10,
        covariance: Literal["full", "diagonal"] = "full",
    ):
        super().__init__(event, condition)
        if event.levels is not None:
            raise ValueError("a mixture of normal distributions is for real vectors, not data with levels")
        if components < 1:
            raise ValueError(f"components must be at least 1, not {components}")
        if covariance not in ("full", "diagonal"):
            raise ValueError(f"covariance must be full or diagonal, not {covariance!r}")
        self.components, D = components, self.dim
        self.embed_y = embed(condition, components, constant=0.0)
        self.logits = None if condition else nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, D))
        self.log_scales = nn.Parameter(torch.zeros(components, D))
        # The factor L has the unit lower triangle of this matrix, in units of its diagonal.
        self.lower = nn.Parameter(torch.zeros(components, D, D)) if covariance == "full" and D > 1 else None

    def factors(self) -> Tensor:
        """Return the Cholesky factors L of the covariances, (K, D, D)."""
        scales = self.log_scales.exp()
        if self.lower is None:
            return torch.diag_embed(scales)
        return scales[:, :, None] * self.lower.tril(-1) + torch.diag_embed(scales)

    def log_weights(self, y: Tensor | None) -> Tensor:
        """Return log w(y), (B, K), or (1, K) without a condition."""
        logits = self.embed_y(y) if self.embed_y is not None else self.logits[None]  # type: ignore[index]
        return logits.log_softmax(1)

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        x = x.flatten(1)
        if self.lower is None:
            z = (x[:, None] - self.means) * torch.exp(-self.log_scales)
            each = (-0.5 * z.square() - self.log_scales - 0.5 * math.log(2 * math.pi)).sum(2)
        else:
            each = log_components(x, self.means, self.factors())
        return LogProb((self.log_weights(y) + each).logsumexp(1))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        nll = -self._log_prob(x, y, 1, rng).value.mean()
        return Loss(nll / self.dim, {"nll": nll.detach()})

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        """Fit the means, covariances and, without a condition, the weights to the global batch by EM."""
        rows = distributed.all_gather(x.flatten(1)).flatten(0, 1).double()
        source = self.device if rng is None else rng.device
        u = torch.rand(self.components, generator=rng, device=source).to(self.device)  # equal on all ranks
        self.set(fit(rows, self.components, u))

    @torch.no_grad()
    def set(self, mixture: Mixture) -> None:
        """Set the parameters; without off-diagonal covariances for a diagonal model, without weights for a conditional one."""
        covariances = mixture.covariances
        if self.lower is None:
            covariances = torch.diag_embed(covariances.diagonal(dim1=1, dim2=2))
        L = torch.linalg.cholesky(covariances)
        scales = L.diagonal(dim1=1, dim2=2)
        self.means.copy_(mixture.means)
        self.log_scales.copy_(scales.log())
        if self.lower is not None:
            self.lower.copy_(L / scales[:, :, None])
        if self.logits is not None:
            self.logits.copy_(mixture.weights.log())

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        u = rand((n, 1), rng=rng, device=self.device)
        k = draw_index(self.log_weights(y).expand(n, -1), u)[:, 0]
        eps = randn((n, self.dim), rng=rng, device=self.device, dtype=self.dtype)
        scaled = self.lower is None
        noise = eps * self.log_scales.exp()[k] if scaled else (self.factors()[k] @ eps[:, :, None])[:, :, 0]
        return Samples((self.means[k] + noise).view(n, *self.shape), nfe=1)
