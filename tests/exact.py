r"""Models whose every output is a closed form, for tests to compare the library with.

Data N(mu, Sigma) on a Gaussian path, ``x_t = alpha x + sigma eps``, stay Gaussian: with

    C = alpha^2 Sigma + sigma^2 I,      z = x_t - alpha mu

the distribution at time t is N(alpha mu, C), and the five quantities that a network may predict are

    E[x | x_t] = mu + alpha Sigma C^-1 z          E[eps | x_t] = sigma C^-1 z          score = -C^-1 z
    velocity = alpha' mu + (alpha' alpha Sigma + sigma' sigma I) C^-1 z
    v = alpha E[eps | x_t] - sigma E[x | x_t]

The probability-flow ODE carries x from t to s, ``alpha_s mu + sqrt(C_s C_t^-1) z``, with log-determinant
``1/2 log det(C_s C_t^-1)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.inverse import repaint
from genzoo.diffusion.path import GaussianPath, Parameterization, Prediction
from genzoo.diffusion.samplers import ancestral, ddim, euler_maruyama, jump, predictor_corrector
from genzoo.diffusion.samplers import sampler as sampler_module
from genzoo.diffusion.schedules import (
    CondOT,
    CosineSchedule,
    EDMSchedule,
    LinearSchedule,
    Schedule,
    SubVPSchedule,
    VESchedule,
    VPSchedule,
)
from genzoo.event import EventSpec
from genzoo.model import Loss, Samples
from genzoo.numerics.random import rand, randint, randn

SCHEDULES: dict[str, Schedule] = {
    "vp": VPSchedule(),
    "sub_vp": SubVPSchedule(),
    "ve": VESchedule(),
    "edm": EDMSchedule(),
    "cond_ot": CondOT(),
    "linear": LinearSchedule(1000),
    "cosine": CosineSchedule(1000),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

# Three correlated dimensions.
MU = [1.0, -2.0, 0.5]
SIGMA = [[1.0, 0.6, -0.2], [0.6, 2.0, 0.3], [-0.2, 0.3, 0.5]]


class ExactDenoiser(Denoiser):
    """What the exact denoisers share."""

    condition = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.event.shape

    @property
    def dim(self) -> int:
        return self.event.dim


class GaussianDenoiser(ExactDenoiser):
    """The exact denoiser of N(mu, Sigma) data, float64.

    Args:
        schedule: of the path.
        mean: mu, (D,).
        covariance: Sigma, (D, D), or its diagonal, (D,).
        kind: which of the five quantities ``predict`` returns.
        hop: where given, ``predict`` also places the exact log variance of the reverse step from t to t - hop, for a
            diagonal Sigma.
        levels: pretended, to see what samplers do to images.
        independent: whether the path says that noise and data are paired independently.
    """

    def __init__(
        self,
        schedule: Schedule,
        mean: Sequence[float],
        covariance: Sequence,
        kind: Parameterization = "eps",
        hop: float | None = None,
        levels: int | None = None,
        independent: bool = True,
    ):
        super().__init__()
        self.event = EventSpec((len(mean),), levels)
        self.path = GaussianPath(schedule, independent)
        self.register_buffer("mu", torch.tensor(mean, dtype=torch.float64))
        sigma = torch.as_tensor(covariance, dtype=torch.float64)
        self.lam, self.axes = (sigma, torch.eye(len(mean)).double()) if sigma.ndim == 1 else torch.linalg.eigh(sigma)
        self.covariance = self.axes @ self.lam.diag() @ self.axes.T
        self.kind, self.hop = kind, hop
        self.calls = 0
        self.double()

    def exact(self, kind: Parameterization, x_t: Tensor, t: Tensor) -> Tensor:
        """The closed form of one of the five quantities, (B, D)."""
        # At the data sigma' may be infinite: sigma' sigma is then its limit.
        alpha, sigma, d_alpha, d_sigma = (c.reshape(-1, 1) for c in self.path.schedule.at(t.clamp(min=1e-12)))
        c = alpha**2 * self.lam + sigma**2
        w = ((x_t - alpha * self.mu) @ self.axes) / c  # C^-1 z along the axes of Sigma
        x0, eps = self.mu + (alpha * self.lam * w) @ self.axes.T, (sigma * w) @ self.axes.T
        if kind == "velocity":
            return d_alpha * self.mu + ((d_alpha * alpha * self.lam + d_sigma * sigma) * w) @ self.axes.T
        return {"x0": x0, "eps": eps, "score": -w @ self.axes.T, "v": alpha * eps - sigma * x0}[kind]

    def spread(self, t: float) -> Tensor:
        """Variances of the distribution at time t along the axes of Sigma, the eigenvalues of C, (D,)."""
        c = self.path.schedule.at(torch.tensor(t, dtype=torch.float64))
        return c.alpha**2 * self.lam + c.sigma**2

    def carry(self, x: Tensor, t: float, s: float) -> Tensor:
        """Follow the probability-flow ODE from t to s, (B, D) -> (B, D)."""
        alpha_t, alpha_s = self.path.schedule.at(torch.tensor([t, s], dtype=torch.float64)).alpha
        gain = (self.spread(s) / self.spread(t)).sqrt()
        return alpha_s * self.mu + (((x - alpha_t * self.mu) @ self.axes) * gain) @ self.axes.T

    def _variance_share(self, t: Tensor, s: Tensor) -> Tensor:
        # Total variance: that of q(x_s | x_t, x), and that of its mean as x ~ p(x | x_t) varies.
        (alpha_t, alpha_s), (sigma_t, sigma_s), _, _ = self.path.schedule.at(torch.stack([t, s]))
        added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        posterior, of_x = added * (sigma_s / sigma_t) ** 2, alpha_s * added / sigma_t**2
        x_given_x_t = self.lam * (sigma_t**2)[:, None] / ((alpha_t**2)[:, None] * self.lam + (sigma_t**2)[:, None])
        exact = posterior[:, None] + (of_x**2)[:, None] * x_given_x_t
        return torch.log(exact / posterior[:, None]) / torch.log(added / posterior)[:, None]

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        self.calls += 1
        share = None if self.hop is None else self._variance_share(t, (t - self.hop).clamp(min=0))
        return Prediction(self.kind, self.exact(self.kind, x_t, t), share)

    def loss(self, x: Tensor, y: Tensor | None = None, *, rng=None) -> Loss:
        t = rand((len(x),), rng=rng, dtype=x.dtype)
        eps = randn(x.shape, rng=rng, dtype=x.dtype)
        gap = self.predict(self.path.sample(x, eps, t), t).mean - self.path.target(self.kind, x, eps, t)
        return Loss(gap.square().mean(), {})

    def sample(self, n: int, y: Tensor | None = None, *, rng=None) -> Samples:
        z = randn((n, *self.shape), rng=rng, dtype=torch.float64)
        return Samples(self.mu + (z * self.lam.sqrt()) @ self.axes.T, nfe=0)


class MixtureDenoiser(ExactDenoiser):
    r"""The exact denoiser of a mixture of isotropic normal distributions, float64: nothing about it is linear.

        E[x | x_t] = sum_k P(k | x_t) (m_k + alpha s_k/c_k (x_t - alpha m_k)),    c_k = alpha^2 s_k + sigma^2

    Args:
        schedule: of the path.
        means: m, (K, D).
        variances: s, (K,).
    """

    def __init__(self, schedule: Schedule, means: Sequence, variances: Sequence[float]):
        super().__init__()
        self.event = EventSpec((len(means[0]),))
        self.path = GaussianPath(schedule)
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.variances = torch.tensor(variances, dtype=torch.float64)
        self.calls = 0
        self.double()

    def log_mixture(self, x: Tensor) -> Tensor:
        """Log density of the data, (B,)."""
        return self._log_joint(x, self.means, self.variances).logsumexp(1)

    def _log_joint(self, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """Log density of each point and component, (B, K); means (..., K, D) and variances (..., K)."""
        distance = (x[:, None] - means).square().sum(2)
        log_normal = -0.5 * (distance / variances + self.dim * torch.log(2 * torch.pi * variances))
        return log_normal - math.log(len(self.means))

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        self.calls += 1
        alpha, sigma, _, _ = (c.view(-1, 1) for c in self.path.schedule.at(t))
        c = alpha**2 * self.variances + sigma**2
        centres = alpha[..., None] * self.means
        share = self._log_joint(x_t, centres, c).softmax(1)
        of_each = self.means + (alpha * self.variances / c)[..., None] * (x_t[:, None] - centres)
        return Prediction("x0", (share[..., None] * of_each).sum(1))

    def loss(self, x: Tensor, y: Tensor | None = None, *, rng=None) -> Loss:
        raise AssertionError("nothing is trained")

    def sample(self, n: int, y: Tensor | None = None, *, rng=None) -> Samples:
        k = randint(len(self.means), (n,), rng=rng)
        z = randn((n, self.dim), rng=rng, dtype=torch.float64)
        return Samples(self.means[k] + self.variances[k].sqrt()[:, None] * z, nfe=0)


class Network(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args) -> Tensor:
        return self.function(*args)


def network(function: Callable[..., Tensor]) -> Callable[..., nn.Module]:
    """Build a network, as families do, that computes ``function`` whatever shapes they ask for."""
    return lambda in_shape, out_shape, condition: Network(function)


def exact_network(denoiser: GaussianDenoiser) -> Callable[..., nn.Module]:
    """Build the network of a perfectly trained diffusion model, called with ``(x_t, t, y)``."""
    return network(lambda x_t, t, y: denoiser.exact(denoiser.kind, x_t, t))


def set_randn(patch: pytest.MonkeyPatch, randn: Callable[..., Tensor]) -> None:
    """Let every sampler draw its noise from a function."""
    for module in (ancestral, ddim, euler_maruyama, jump, predictor_corrector, repaint, sampler_module):
        patch.setattr(module, "randn", randn)


def moments(
    sampler: Callable[..., Samples], denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what a sampler draws, exactly.

    With an exact Gaussian denoiser every sampler is an affine map of its draws of noise. It is run once without noise,
    which gives the mean, and once on a batch whose rows see a unit impulse each, in one draw and one dimension: these
    are the columns of the map.
    """
    draws = 0

    def no_noise(shape, **_) -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros(shape, dtype=torch.float64)

    with monkeypatch.context() as patch:
        set_randn(patch, no_noise)
        mean = sampler(denoiser, 1).x[0]

    draw, D = iter(range(draws)), denoiser.dim

    def impulse(shape, **_) -> Tensor:
        noise = torch.zeros(shape, dtype=torch.float64)
        first = next(draw) * D
        noise[first : first + D] = torch.eye(D, dtype=torch.float64)
        return noise

    with monkeypatch.context() as patch:
        set_randn(patch, impulse)
        columns = sampler(denoiser, draws * D).x - mean
    return mean, columns.T @ columns
