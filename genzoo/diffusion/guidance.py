r"""Guidance: denoisers that move the estimate of one denoiser away from that of another.

With c the conditional prediction and u the one to move away from, every kind of guidance here predicts

    u + s (c - u)

with the **scale** s: 1 is the plain conditional model at the cost of one evaluation, 0 is u, and larger values trade
diversity for the likelihood of the condition. Others write 1 + w for s (Ho, Salimans 2022). All predictions of
``genzoo.diffusion.path`` are linear in each other with coefficients of the path: any of them may be guided.

With classifier guidance c is the unconditional prediction u shifted by the gradient of a classifier of noisy data, by Bayes'
rule ``score_c = score_u + grad log p(y | x_t)``, so that s multiplies the gradient.

Every sampler takes a guided denoiser, which is one; ``guide`` makes a model whose samples are guided. No distribution along
the path has the guided score, so that stochastic samplers and ODEs draw from different distributions. On a variance-exploding
path, for data N(0, u) of which one class is N(0, c), the ODE draws from N(0, c^s u^(1-s)).

References:
    Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, https://arxiv.org/abs/2207.12598 (eq. 6, with w = s - 1).
    Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models", 2024, https://arxiv.org/abs/2404.07724 (eq. 3).
    Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", 2024, https://arxiv.org/abs/2406.02507 (eq. 4).
    Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, https://arxiv.org/abs/2105.05233 (eq. 14).
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition, Conditioner
from genzoo.diffusion.denoiser import Denoiser, DenoiserWrapper, replaced, sampling_denoiser, with_part
from genzoo.diffusion.path import Prediction, conversion_coefficients, expand
from genzoo.diffusion.samplers import Sampler
from genzoo.diffusion.samplers.sampler import Trajectory
from genzoo.event import EventSpec
from genzoo.model import Composite, GenerativeModel, LogitGuided, Loss, Samples, SharedEmbedding, TrainableModel


class Guidance(DenoiserWrapper):
    """A denoiser that is guided away from another prediction.

    Args:
        denoiser: that is guided.
        scale: s, at least 0.
        interval: noise levels sigma/alpha, (lowest, highest), between which it is guided; elsewhere s is 1.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None):
        super().__init__(denoiser)
        if not scale >= 0:
            raise ValueError(f"scale must be at least 0, not {scale}")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(f"interval must be two noise levels, the lower one first, not {interval}")
        self.scale, self.interval = scale, interval
        self._evaluations = denoiser.evaluations

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Of a network in the latest ``predict``."""
        return self._evaluations

    def scale_at(self, t: Tensor, x_t: Tensor) -> float | Tensor | None:
        """Return the scale at times t, broadcast to x_t; None where it is 1 for the whole batch."""
        if self.interval is None:
            return None if self.scale == 1.0 else self.scale
        alpha, sigma, *_ = self.path.schedule.at(t)
        low, high = self.interval
        guided = (sigma >= low * alpha) & (sigma <= high * alpha)
        return expand(torch.where(guided, self.scale, 1.0), x_t) if bool(guided.any()) else None

    @abstractmethod
    def reference(self, prediction: Prediction, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, int]:
        """Return u, the quantity that ``prediction`` is of, (B, *shape), and its evaluations of a network."""

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Predict with guidance, see ``Denoiser.predict``; a learned variance is that of the guided denoiser."""
        prediction, self._evaluations = self.denoiser.predict(x_t, t, y), self.denoiser.evaluations
        scale = self.scale_at(t, x_t)
        if scale is None:
            return prediction
        u, evaluations = self.reference(prediction, x_t, t, y)
        self._evaluations += evaluations
        return prediction._replace(mean=u + scale * (prediction.mean - u))


class ClassifierFreeGuidance(Guidance):
    """Guidance away from the unconditional prediction of the same denoiser (Ho, Salimans 2022).

    Raises:
        ValueError: for a denoiser without conditions, and for a model that was trained without dropped conditions.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: tuple[float, float] | None = None):
        super().__init__(denoiser, scale, interval)
        if denoiser.condition is None:
            raise ValueError("guidance: the model is unconditional")
        if isinstance(denoiser, GenerativeModel):
            _check_unconditional(denoiser)

    def reference(self, prediction: Prediction, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, int]:
        return self.denoiser.predict(x_t, t, None).mean, self.denoiser.evaluations


class AutoGuidance(Guidance):
    """Guidance away from a worse denoiser of the same data, an earlier or a smaller one (Karras et al. 2024).

    Args:
        denoiser, scale, interval: as in ``Guidance``.
        worse: the other denoiser, with the same condition; of a latent model its prior is used.

    Raises:
        ValueError: where the two differ in their events or conditions.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        worse: Denoiser | GenerativeModel,
        scale: float,
        interval: tuple[float, float] | None = None,
    ):
        super().__init__(denoiser, scale, interval)
        self.of_worse = {name: weight for name, weight in worse.state_dict().items() if not name.startswith("prior.")}
        if not isinstance(worse, Denoiser):
            prior = sampling_denoiser(worse)
            if prior is None:
                raise ValueError(f"guidance: {type(worse).__name__} is no denoiser")
            worse = prior
        worse = worse.to(denoiser.device)
        if (denoiser.event, denoiser.condition) != (worse.event, worse.condition):
            raise ValueError(
                f"guidance: models of {denoiser.event}, {denoiser.condition} and of {worse.event}, {worse.condition} differ"
            )
        self.worse = worse

    def reference(self, prediction: Prediction, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, int]:
        return self.worse.predict_as(prediction.kind, x_t, t, y)


class NoisyCritic(nn.Module, ABC):
    """An estimate of log p(y | x_t) for noisy data, up to a function of y, at any ratio of noise and signal.

    Attributes:
        event: shape and levels of the data.
        condition: of y.
    """

    event: EventSpec
    condition: Condition | None

    @abstractmethod
    def log_likelihood(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | x_t) up to a function of y, (B,), for ``x_t = alpha x + sigma eps``.

        Args:
            x_t: (B, *shape).
            alpha, sigma: (B,).
            y: conditions, (B, *condition.shape).
        """


class NoisyClassifier(NoisyCritic):
    """A classifier of noisy data, p(y | x_t) of classes y."""

    @abstractmethod
    def log_probs(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return log p(y | x_t) of every class, (B, n), for ``x_t = alpha x + sigma eps``, (B, *shape), (B,) and (B,)."""

    def log_likelihood(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        return self.log_probs(x_t, alpha, sigma).gather(1, y[:, None])[:, 0]


class NoisyEmbedding(SharedEmbedding, NoisyCritic):
    """A contrastive network of noisy events and their conditions, whose logits are log p(y | x_t)/p(y) up to a constant."""

    def embed_noisy(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Embed noisy events, ``x_t = alpha x + sigma eps``: a unit vector times the signal, (B, d).

        Args:
            x_t: (B, *shape).
            alpha, sigma: (B,).
        """
        return self._embed_noisy(x_t, alpha, sigma)

    @abstractmethod
    def _embed_noisy(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Embed noisy events, see ``embed_noisy``."""

    def log_likelihood(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        return self.scale * (self.embed_noisy(x_t, alpha, sigma) * self.embed_text(y)).sum(1)


class ClassifierGuidance(Guidance):
    """Guidance by the gradient of a classifier of noisy data (Dhariwal, Nichol 2021); the denoiser needs no classes.

    One evaluation counts for the denoiser and one for the classifier with its gradient. Scale 0 is the unconditional model.

    Args:
        denoiser, scale, interval: as in ``Guidance``; of a conditional denoiser the unconditional part is used.
        classifier: of noisy data, or another estimate of log p(y | x_t).

    Raises:
        ValueError: where the events differ, and for a conditional model that was trained without dropped conditions.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: NoisyCritic,
        scale: float,
        interval: tuple[float, float] | None = None,
    ):
        super().__init__(denoiser, scale, interval)
        if denoiser.event != classifier.event:
            raise ValueError(f"guidance: the model has {denoiser.event}, the classifier {classifier.event}")
        if not denoiser.path.independent:
            raise ValueError("guidance: a path with coupled noise and data has no score for a classifier to change")
        if denoiser.condition is not None and isinstance(denoiser, GenerativeModel):
            _check_unconditional(denoiser)
        self.classifier = classifier.to(denoiser.device)
        self.condition = classifier.condition

    def reference(self, prediction: Prediction, x_t: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, int]:
        """Return the unconditional prediction, that of the denoiser."""
        return prediction.mean, 0

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Predict with guidance, see ``Denoiser.predict``; null values are not guided."""
        u = self.denoiser.predict(x_t, t, None)
        self._evaluations = self.denoiser.evaluations
        scale: float | Tensor | None = self.scale_at(t, x_t)
        scale = 1.0 if scale is None else scale
        if y is None or (self.scale == 0 and self.interval is None):
            return u
        self._evaluations += 1
        inside = self.path.well_conditioned_time("score", u.kind, t)
        coefficients = self.path.schedule.at(inside)
        _, of_score = conversion_coefficients("score", u.kind, *coefficients)
        gradient = self._gradient(x_t, coefficients[0], coefficients[1], y)
        return u._replace(mean=u.mean + scale * expand(of_score, x_t).to(x_t.dtype) * gradient)

    def _gradient(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """Return grad log p(y | x_t), (B, *shape), zero for null values."""
        assert self.condition is not None
        known = ~self.condition.is_null(y)
        some = torch.where(known.view(-1, *[1] * (y.ndim - 1)), y, 0)
        with torch.enable_grad():
            x = x_t if x_t.requires_grad else x_t.detach().requires_grad_()
            chosen = self.classifier.log_likelihood(x, alpha, sigma, some)
            (gradient,) = torch.autograd.grad(torch.where(known, chosen, 0.0).sum(), x, create_graph=x_t.requires_grad)
        return gradient


def _check_unconditional(model: GenerativeModel) -> None:
    """Check that a conditional model has learned the null value.

    Raises:
        ValueError: for a model that was trained without dropped conditions.
    """
    if not model.conditioner.learns_null:
        raise ValueError("guidance: the model was trained with model.condition_dropout=0 and has no unconditional part")


class GuidedSampler(Sampler):
    """A sampler that draws from a guided denoiser.

    Args:
        sampler: any sampler.
        guidance: wraps the denoiser.
    """

    def __init__(self, sampler: Sampler, guidance: Callable[[Denoiser], Guidance]):
        self.sampler, self.guidance = sampler, guidance

    @property
    def steps(self) -> int | None:
        """Number of steps of the sampler."""
        return self.sampler.steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self.sampler = copy.copy(self.sampler)
        self.sampler.steps = steps

    @property
    def trajectory(self) -> bool:
        """Whether all states are returned."""
        return self.sampler.trajectory

    @trajectory.setter
    def trajectory(self, trajectory: bool) -> None:
        self.sampler = copy.copy(self.sampler)
        self.sampler.trajectory = trajectory

    def state_times(self, denoiser: Denoiser) -> list[float] | None:
        return self.sampler.state_times(denoiser)

    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        return self.sampler.iterate(self.guidance(denoiser), noise, y, rng)

    def __call__(
        self, denoiser: Denoiser, n: int, y: Tensor | None = None, rng: torch.Generator | None = None
    ) -> Samples:
        return self.sampler(self.guidance(denoiser), n, y, rng)


class GuidedModel(Composite):
    """A model whose samples are guided. It has no density, since no model density is that of guided samples.

    Args:
        model: with a guided sampler.
        conditioner: of the samples; that of the model, or of a classifier.
    """

    def __init__(self, model: GenerativeModel, conditioner: Conditioner):
        super().__init__(model.event, conditioner.condition)
        self.prior, self.conditioner = model, conditioner
        self.to(model.device, model.dtype)

    def from_prior(self, event: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        return event

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Return the loss of the model; guidance acts on samples alone."""
        return self.prior._loss(x, y if self.prior.condition else None, rng)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return self.prior._sample(n, y, rng)


def guide(model: GenerativeModel, guidance: Callable[[Denoiser], Guidance]) -> GenerativeModel:
    """Return a model that draws guided samples; the given one is unchanged, and shares its weights.

    Args:
        model: a denoiser, a latent model with a denoiser as its prior, or a model with guided logits.
        guidance: wraps a denoiser, such as ``functools.partial(ClassifierFreeGuidance, scale=2.0)``.

    Returns:
        The guided model, or the model itself where the guidance has no effect, s = 1.

    Raises:
        ValueError: for a model that cannot be guided, or not in this way.
    """
    part = model
    while isinstance(part, Composite):
        part = part.prior
    conditioner = model.conditioner
    if isinstance(part, Denoiser):
        wrapped = guidance(part)  # raises
        if wrapped.scale == 1 and not isinstance(wrapped, ClassifierGuidance):
            return model
        if isinstance(model, Composite):
            _check_latents(model, wrapped)
        if isinstance(wrapped, ClassifierGuidance) and isinstance(wrapped.classifier, TrainableModel):
            conditioner = wrapped.classifier.conditioner
        elif wrapped.condition != part.condition:
            conditioner = Conditioner(wrapped.condition)
        sampler: Any = part.sampler
        _check_guided(sampler, wrapped)
        part = replaced(part, sampler=GuidedSampler(sampler, guidance))
    elif isinstance(part, LogitGuided):
        scale = _logit_scale(guidance)
        part.check_guidance()
        if scale == 1:
            return model
        part = replaced(part, guidance_scale=scale)
    else:
        raise ValueError(f"guidance: {type(part).__name__} samples in one pass and takes no guidance; omit it")
    return GuidedModel(with_part(model, part), conditioner)


def _check_guided(sampler: Sampler, guidance: Guidance) -> None:
    """Check that a sampler applies to a guided denoiser.

    Raises:
        ValueError: for a sampler of flow maps, of which guidance makes none.
    """
    if not isinstance(guidance, sampler.evaluates):
        raise ValueError(
            f"guidance: changes velocities, which {type(sampler).__name__} does not follow: choose sampler=heun, "
            "or train with model.guidance="
        )


def _check_latents(model: Composite, guidance: Guidance) -> None:
    """Check that guidance by another model is on the latents of this one.

    Raises:
        ValueError: for a classifier, and for a model with another codec.
    """
    if isinstance(guidance, ClassifierGuidance):
        raise ValueError("guidance: a classifier of noisy data does not apply to noisy latents")
    if isinstance(guidance, AutoGuidance):
        own = {name: weight for name, weight in model.state_dict().items() if not name.startswith("prior.")}
        same = own.keys() == guidance.of_worse.keys()
        if not same or any(not torch.equal(own[name].cpu(), guidance.of_worse[name].cpu()) for name in own):
            raise ValueError("guidance: the other model has another codec, whose latents differ")


def _logit_scale(guidance: Any) -> float:
    """Return the scale of classifier-free guidance, the only kind for logits."""
    keywords = guidance.keywords if isinstance(guidance, functools.partial) else {}
    if not isinstance(guidance, functools.partial) or guidance.func is not ClassifierFreeGuidance:
        raise ValueError("guidance: models of integers are guided away from their own unconditional logits alone")
    if keywords.get("interval") is not None:
        raise ValueError("guidance.interval: guidance of logits has no noise levels; omit it")
    if not keywords["scale"] >= 0:
        raise ValueError(f"scale must be at least 0, not {keywords['scale']}")
    return float(keywords["scale"])
