r"""Variational autoencoders.

The decoder defines ``p(x) = int p(x | z) N(z; 0, I) dz``, and the encoder an approximate posterior
``q(z | x) = N(mu(x), diag s(x)^2)``. Training maximises the evidence lower bound

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || N(0, I))                                        (ELBO)

with the reparameterisation ``z = mu + s eps``. K samples give a tighter bound,

    log p(x) >= E log 1/K sum_k p(x | z_k) N(z_k; 0, I) / q(z_k | x)                              (IWAE)

which is the ELBO at K = 1 and converges to log p(x) from below. Each of the three parts has alternatives.

Posterior. A flow f of ``z_0 = mu + s eps``, given features h(x) of the encoder, correlates the latents:

    z = f(z_0; h(x)),    log q(z | x) = log N(z_0; mu, s^2) - log |det dz/dz_0|.

An inverse autoregressive flow (IAF) is a masked autoregressive one (``genzoo.families.maf``) in its fast direction.

Prior. Any density p(z) that is exact replaces N(0, I), trained together with the rest: a mixture, a flow, an autoregressive
model, or the mixture of the posteriors at K learned pseudo-inputs u_k,

    p(z) = 1/K sum_k q(z | u_k).                                                                  (VampPrior)

With all N data as pseudo-inputs the mean KL is the mutual information of index and latent, at most log N.

Objective, with weight beta of the KL, which importance weights do not allow; reported bounds are those above:

    elbo    distortion + beta KL,                distortion = E_q[-log p(x | z)]
    iwae    -log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x)
    info    distortion + beta KL + mmd MMD^2(q(z), p(z)), q(z) the mixture of a batch's posteriors; beta = 1 - alpha and
            mmd = alpha + lambda - 1 in the paper's notation
    geco    beta KL + lambda (distortion - target), with lambda adapted until the distortion is at its target

References:
    Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114 (eq. 3, 10).
    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, https://arxiv.org/abs/1509.00519 (eq. 8).
    Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow", 2016,
    https://arxiv.org/abs/1606.04934 (eq. 9-11, algorithm 1).
    Tomczak, Welling, "VAE with a VampPrior", 2018, https://arxiv.org/abs/1705.07120 (eq. 9).
    Zhao, Song, Ermon, "InfoVAE", 2019, https://arxiv.org/abs/1706.02262 (eq. 6, section 3.3 for the MMD).
    Rezende, Viola, "Taming VAEs", 2018, https://arxiv.org/abs/1810.00597 (eq. 3).
    Lucas, Tucker, Grosse, Norouzi, "Don't Blame the ELBO!", 2019, https://arxiv.org/abs/1911.02469 (section 4: the optimum
    of a linear VAE, reverse water-filling for any beta).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Condition, Vector
from genzoo.distributions.bounds import Constraint, RateCost, importance_weighted
from genzoo.distributions.divergences import kl_normal, squared_mmd
from genzoo.distributions.likelihoods import Likelihood, default_likelihood
from genzoo.event import EventSpec
from genzoo.model import (
    Bijective,
    Bound,
    Composite,
    Continuous,
    Density,
    Diagnostic,
    GaussianPosterior,
    GenerativeModel,
    Hierarchical,
    LatentVariable,
    LogProb,
    Loss,
    PosteriorSample,
    Samples,
)
from genzoo.nn import defaults
from genzoo.numerics import distributed
from genzoo.numerics.clamping import projected_clamp
from genzoo.numerics.random import randint, randn

Objective = Literal["elbo", "iwae", "info", "geco"]


class Draw(NamedTuple):
    """A sample of the posterior and what its density is made of."""

    z: Tensor  # (B, *latent.shape)
    eps: Tensor
    mean: Tensor  # of the normal distribution before a flow
    log_var: Tensor
    log_det: Tensor | None  # of the flow, (B,)


class _VAE(Density, LatentVariable):
    """What all variational autoencoders share; ``vae`` chooses the class by the prior and the posterior.
    Args:
        encoder: factory of the encoder, called as ``encoder(in_shape, out_shape, condition)``, for ``(x, y)``.
        decoder: factory of the decoder, called in the same way, for ``(z, y)``.
        likelihood: p(x | z), parameterised by the decoder's output; by default a discretised logistic, or a Gaussian for
            real vectors.
        event, condition: as in ``GenerativeModel``.
        prior: factory of a learned prior, called as ``prior(event, condition)`` with the event of the latents, a density that
            is exact; None for N(0, I).
        posterior: factory of the flow of the posterior, called as ``posterior(event, condition)`` with the event of the latents
            and features of the encoder, one for each latent, as its condition; None for a Gaussian.
        latent_dim: dimension of z, or its shape, (C, h, w), for networks with a latent grid.
        beta, warmup, free_bits: weighting of the KL term in the loss, see ``RateCost``; not used by ``log_prob``.
        objective: "elbo", "iwae", "info" or "geco".
        samples: K of "iwae".
        mmd: weight of the MMD in "info", in nats.
        target: distortion at which "geco" holds the model, in nats.
        sample_likelihood: whether samples are draws of p(x | z), or its mean.

    Raises:
        ValueError: for a likelihood with another number of levels than the data, an objective without its settings, a prior
            without an exact density, and a posterior that is no flow.
    """

    bound = Bound.LOWER
    diagnostics: Mapping[str, Diagnostic] = {
        "distortion": Diagnostic("distortion", "nats", "lower"),
        "rate": Diagnostic("rate: KL of posterior and prior", "nats"),
        "mmd": Diagnostic("squared MMD of aggregate posterior and prior", "squared MMD", "lower"),
        "multiplier": Diagnostic("multiplier of the distortion", "weight"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        encoder: Callable[..., nn.Module] = defaults.encoder,
        decoder: Callable[..., nn.Module] = defaults.decoder,
        likelihood: Likelihood | None = None,
        prior: Callable[..., GenerativeModel] | None = None,
        posterior: Callable[..., GenerativeModel] | None = None,
        latent_dim: int | Sequence[int] = 16,
        beta: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
        objective: Objective = "elbo",
        samples: int = 5,
        mmd: float = 10.0,
        target: float | None = None,
        sample_likelihood: bool = False,
    ):
        super().__init__(event, condition)
        if not isinstance(self, _kind(prior, posterior)):
            raise ValueError(f"a {type(self).__name__} has no such prior or posterior: build it by genzoo.vae(...)")
        latent = (latent_dim,) if isinstance(latent_dim, int) else tuple(latent_dim)
        if not latent or min(latent) < 1:
            raise ValueError(f"latent_dim must be at least 1, not {latent_dim}")
        if objective not in ("elbo", "iwae", "info", "geco"):
            raise ValueError(f"objective must be elbo, iwae, info or geco, not {objective!r}")
        if objective == "iwae" and (beta != 1 or free_bits):
            raise ValueError(
                f"objective=iwae has no weight of the rate: set model.beta=1 model.free_bits=0, not {beta} and {free_bits}"
            )
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        if objective == "info" and mmd <= 0:
            raise ValueError(f"objective=info needs a positive mmd, not {mmd}")
        if objective == "geco" and target is None:
            raise ValueError(
                "objective=geco needs a target, the distortion in nats that it holds: set model.target=..."
            )
        likelihood = default_likelihood(event.levels) if likelihood is None else likelihood
        likelihood.check(event.levels)
        channels, *sides = self.shape
        self.latent = Continuous(latent)
        self.likelihood = likelihood
        self.outputs = (
            2 if posterior is None else 3
        )  # of the encoder for a latent: mean, log variance, feature of a flow
        self.encoder = encoder(self.shape, (self.outputs * latent[0], *latent[1:]), condition)
        self.decoder = decoder(latent, (likelihood.num_params(channels), *sides), condition)
        self.cost = RateCost(beta, warmup, free_bits)
        self.objective, self.samples, self.mmd = objective, samples, mmd
        self.constraint = Constraint(target, self.dim) if objective == "geco" and target is not None else None
        self.sample_likelihood = sample_likelihood
        self.flow = None if posterior is None else _flow(posterior, self.latent)
        if prior is not None:
            self.prior = _prior(prior, self)

    # Posterior

    def _encoder_output(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """Return mean, log variance and features of already encoded events, each (B, *latent.shape)."""
        mean, log_var, *features = self.encoder(x, y).to(x.dtype).chunk(self.outputs, dim=1)
        return mean, projected_clamp(log_var, -20, 10), *features

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), before a flow, each (B, *latent.shape)."""
        mean, log_var, *_ = self._encoder_output(self.likelihood.encoder_input(x), y)
        return mean, log_var

    def _transformed(self, z: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Apply the flow of the posterior, if there is one; return the latent and the log-determinant."""
        if self.flow is None:
            return z, None
        moved, log_det = self.flow._forward_and_log_det(z, features[0].flatten(1))
        return moved.view_as(z), log_det

    def _draws(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None, count: int) -> Iterator[Draw]:
        """Draw samples of the posterior one after the other; the encoder is evaluated once."""
        mean, log_var, *features = self._encoder_output(self.likelihood.encoder_input(x), y)
        for _ in range(count):
            eps = randn(mean.shape, rng=rng, device=x.device, dtype=x.dtype)
            z, log_det = self._transformed(mean + torch.exp(0.5 * log_var) * eps, features)
            yield Draw(z, eps, mean, log_var, log_det)

    @staticmethod
    def _log_q(draw: Draw) -> Tensor:
        log_q = -0.5 * (draw.eps**2 + draw.log_var + math.log(2 * math.pi)).flatten(1).sum(1)
        return log_q if draw.log_det is None else log_q - draw.log_det

    # Prior

    def _prior_condition(self, y: Tensor | None, rng: torch.Generator | None) -> Tensor | None:
        """Return the conditions of the prior in training."""
        return y

    def _log_ratio(self, draw: Draw, y: Tensor | None) -> Tensor:
        """Return log p(z) - log q(z | x), (B,)."""
        log_ratio = 0.5 * (draw.eps**2 + draw.log_var - draw.z**2).flatten(1).sum(1)
        return log_ratio if draw.log_det is None else log_ratio + draw.log_det

    def _divergence(self, draw: Draw, y: Tensor | None) -> Tensor:
        """Return the KL of groups of latents, (B, groups, ...), or of all an estimate by one sample, (B, 1)."""
        return -self._log_ratio(draw, y)[:, None]

    def _prior_samples(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Draw latents from the prior."""
        z = randn((n, *self.latent.shape), rng=rng, device=self.device, dtype=self.dtype)
        return Samples(z, nfe=0)

    # Objective

    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return self.likelihood.log_prob(self.decoder(z, y).to(z.dtype), x)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        if self.objective == "iwae":
            return self._iwae_loss(x, y, rng)
        (draw,) = self._draws(x, y, rng, 1)
        distortion = -self._log_likelihood(x, draw.z, y).mean()
        divergence = self._divergence(draw, self._prior_condition(y, rng))
        terms = {"distortion": distortion.detach(), "rate": divergence.detach().flatten(1).sum(1).mean()}
        aux, rate = {}, self.cost(divergence, estimated=not isinstance(self, GaussianPosterior))
        if self.constraint is not None:
            total = self.constraint(distortion) + rate
            held = distributed.all_reduce_mean(distortion.detach()) if self.training else distortion.detach()
            aux["distortion"], terms["multiplier"] = held, self.constraint.log_multiplier.exp()
        else:
            total = distortion + rate
        if self.objective == "info":
            discrepancy = self._discrepancy(draw.z, y, rng)
            total, terms["mmd"] = total + self.mmd * discrepancy, discrepancy.detach()
        # In nats per dimension, so that one learning rate suits images of any size.
        return Loss(total / self.dim, terms, aux)

    def _iwae_loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        draws, own = list(self._draws(x, y, rng, self.samples)), self._prior_condition(y, rng)
        log_likelihood = torch.stack([self._log_likelihood(x, draw.z, y) for draw in draws])
        log_ratio = torch.stack([self._log_ratio(draw, own) for draw in draws])
        log_weights = log_likelihood + self.cost.weight() * log_ratio
        total = math.log(self.samples) - log_weights.logsumexp(0).mean()
        terms = {"distortion": -log_likelihood.detach().mean(), "rate": -log_ratio.detach().mean()}
        return Loss(total / self.dim, terms)

    def _discrepancy(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Return the squared MMD of the global batch's latents and as many draws of the prior, ()."""
        with torch.no_grad():
            other = self._prior_samples(len(z), y, rng).x.clone()
        a, b = z.flatten(1), other.flatten(1)
        if self.training:  # nonlinear in the samples of the batch
            a, b = (distributed.all_gather(part).flatten(0, 1) for part in (a, b))
        return squared_mmd(a, b, bandwidth=math.sqrt(a.shape[1]))

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self.cost.count(batch_size)
        if self.constraint is not None:
            self.constraint.update(aux["distortion"])
        return {}

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Return the ELBO, or with ``num_samples > 1`` the importance-weighted bound and its standard error."""
        log_weights = []
        for draw in self._draws(x, y, rng, num_samples):
            log_likelihood = self._log_likelihood(x, draw.z, y)
            if num_samples == 1:
                return LogProb(log_likelihood - self._divergence(draw, y).flatten(1).sum(1))
            log_weights.append(log_likelihood + self._log_ratio(draw, y))
        return LogProb(*importance_weighted(torch.stack(log_weights)))

    # Latents

    def _infer(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> PosteriorSample:
        (draw,) = self._draws(x, y, rng, 1)
        return PosteriorSample(draw.z, self._log_q(draw))

    def _generate(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        params = self.decoder(z, y).to(z.dtype)
        return self.likelihood.sample(params, rng) if self.sample_likelihood else self.likelihood.mean(params)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of q(z | x), or the flow of the mean, (B, *latent.shape)."""
        mean, _, *features = self._encoder_output(self.likelihood.encoder_input(x), y)
        return self._transformed(mean, features)[0]

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of p(x | z)."""
        return self.likelihood.mean(self.decoder(z, y).to(z.dtype))

    def _decode_smooth(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of p(x | z), not rounded to a level."""
        return self.likelihood.location(self.decoder(z, y).to(z.dtype))

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        z, nfe, _ = self._prior_samples(n, y, rng)
        return Samples(self._generate(z, y, rng), nfe + 1)


class VAE(_VAE, Hierarchical, GaussianPosterior):
    """A variational autoencoder with a diagonal Gaussian posterior and the prior N(0, I); see ``vae``."""

    def _divergence(self, draw: Draw, y: Tensor | None) -> Tensor:
        return kl_normal(draw.mean, draw.log_var)

    def _divergences(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        return kl_normal(*self.posterior(x, y))

    def check_compressible(self) -> None:
        self.likelihood.check_discrete()

    def _descend(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], x: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        if x is None:
            mean = log_var = torch.zeros(n, *self.latent.shape, device=self.device, dtype=self.dtype)
        else:
            mean, log_var = self.posterior(x, y)
        params = self.decoder(draw(mean, 0.5 * log_var), y).to(self.dtype)
        return functools.partial(self.likelihood.next_log_probs, params)


class FlowPosteriorVAE(_VAE):
    """A variational autoencoder whose posterior is a flow of a Gaussian, such as IAF, with the prior N(0, I); see ``vae``."""


class LearnedPriorVAE(_VAE, Composite):
    """A variational autoencoder with a learned prior, and any posterior; see ``vae``."""

    prior: Density

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        if isinstance(self.prior, VampPrior):
            self.prior.set_inputs(x)
        else:
            self.prior._initialize(self._infer(x, y, rng).z, y, rng)

    def _prior_condition(self, y: Tensor | None, rng: torch.Generator | None) -> Tensor | None:
        """Return y, dropped at random where the prior learns the null value."""
        return self.prior.conditioner.drop(y, rng) if self.prior.conditioner.learns_null else y

    def _log_ratio(self, draw: Draw, y: Tensor | None) -> Tensor:
        return self.prior._log_prob(draw.z, y, 1, None).value - self._log_q(draw)

    def _prior_samples(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return self.prior._sample(n, y, rng)

    def from_prior(self, event: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        return self._generate(event, y, rng)


class VampPrior(Density):
    """The mixture of the posteriors at learned pseudo-inputs, p(z | y) = 1/K sum_k q(z | u_k, y).

    Args:
        event: of the latents.
        condition: of the model.
        components: K. With classes all pairs of inputs and classes are encoded, with other conditions K inputs for each event.

    Raises:
        ValueError: for less than one component.
    """

    bound = Bound.EXACT

    def __init__(self, event: EventSpec, condition: Condition | None = None, *, components: int = 100):
        super().__init__(event, condition)
        if components < 1:
            raise ValueError(f"components must be at least 1, not {components}")
        self.components = components
        self._model: tuple[_VAE, ...] = ()  # a tuple hides it from ``parameters()``

    def attach(self, model: _VAE) -> None:
        """Set the model whose posterior is used.

        Raises:
            ValueError: for a posterior with a flow, whose density at a given latent needs the inverse of the flow.
        """
        if model.flow is not None:
            raise ValueError("prior=vamp is a mixture of Gaussian posteriors: omit posterior, or choose another prior")
        self._model = (model,)
        self.inputs = nn.Parameter(0.05 * torch.randn(self.components, *model.shape))

    def set_inputs(self, x: Tensor) -> None:
        """Set the pseudo-inputs to the first events of the global batch, with some noise."""
        rows = distributed.all_gather(x).flatten(0, 1)
        self.inputs.add_(rows[torch.arange(self.components, device=x.device) % len(rows)])

    def moments(self, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the components, each (B, K, *latent.shape), or (1, K, ...) without a condition."""
        if not self._model:
            raise ValueError("prior=vamp is the prior of model=vae, whose encoder it uses")
        (model,) = self._model
        u = self.inputs if model.levels is None else projected_clamp(self.inputs, -1, 1)
        if y is None:
            mean, log_var = model._encoder_output(u, None)
            return mean[None], log_var[None]
        classes = isinstance(self.condition, ClassLabels)
        each = torch.arange(self.condition.n, device=y.device) if isinstance(self.condition, ClassLabels) else y
        repeated = u.repeat(len(each), *[1] * (u.ndim - 1))
        found = model._encoder_output(repeated, each.repeat_interleave(self.components, dim=0))
        mean, log_var = (part.unflatten(0, (len(each), self.components)) for part in found)
        return (mean[y], log_var[y]) if classes else (mean, log_var)

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        mean, log_var = self.moments(y)
        gap = (x[:, None] - mean).square() * torch.exp(-log_var)
        each = -0.5 * (gap + log_var + math.log(2 * math.pi)).flatten(2).sum(2)
        return LogProb(each.logsumexp(1) - math.log(self.components))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        nll = -self._log_prob(x, y, 1, rng).value.mean()
        return Loss(nll / self.dim, {"nll": nll.detach()})

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        k = randint(self.components, (n,), rng=rng, device=self.device)
        mean, log_var = (
            part.expand(n, *part.shape[1:])[torch.arange(n, device=k.device), k] for part in self.moments(y)
        )
        eps = randn(mean.shape, rng=rng, device=self.device, dtype=self.dtype)
        return Samples(mean + torch.exp(0.5 * log_var) * eps, nfe=1)


def _kind(prior: Any, posterior: Any) -> type[_VAE]:
    """Return the class of a prior and a posterior."""
    return LearnedPriorVAE if prior is not None else FlowPosteriorVAE if posterior is not None else VAE


def _prior(prior: Callable[..., GenerativeModel], model: _VAE) -> Density:
    """Build the prior of a model."""
    built = prior(EventSpec(model.latent.shape), model.condition)
    if not isinstance(built, Density) or built.bound is not Bound.EXACT:
        raise ValueError(
            f"prior: {type(built).__name__} has no exact density: choose vamp, gmm, realnvp, glow, nsf, maf or "
            "autoregressive, or model=latent, which trains the prior afterwards"
        )
    if model.objective == "info" and not model.cost.beta:
        raise ValueError("objective=info with beta=0 does not train a learned prior: set model.beta above 0")
    if isinstance(built, VampPrior):
        built.attach(model)
    return built


def _flow(posterior: Callable[..., GenerativeModel], latent: Continuous) -> Bijective:
    """Build the flow of a posterior, with as many features as latents as its condition."""
    flow = posterior(EventSpec(latent.shape), Vector(math.prod(latent.shape)))
    if not isinstance(flow, Bijective) or (isinstance(flow, Density) and flow.bound is not Bound.EXACT):
        raise ValueError(f"posterior: {type(flow).__name__} is no normalising flow: choose iaf")
    return flow


def vae(event: EventSpec, condition: Condition | None = None, **settings: Any) -> _VAE:
    """Build a variational autoencoder: a ``VAE``, or with a prior or a posterior one of the other classes.

    Args:
        event, condition: as in ``GenerativeModel``.
        settings: those of ``VAE``.

    Raises:
        ValueError: as the class does.
    """
    return _kind(settings.get("prior"), settings.get("posterior"))(event, condition, **settings)


# Configurations are checked against these.
vae.__signature__ = inspect.signature(VAE)  # type: ignore[attr-defined]
vae.__annotations__ = VAE.__init__.__annotations__
