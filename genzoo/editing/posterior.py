"""Draws of the posterior p(x | value) with a trained model, by the ability of its family.

A ``Denoiser`` has the samplers of ``genzoo.diffusion.inverse``; a ``Causal`` model draws the end of an event given its
beginning, exactly; a ``Decoder`` with latents z ~ N(0, I) has Langevin sampling in latent space. A composite model, whose
latents have a learned prior, has none of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.guidance import Guidance, GuidedSampler
from genzoo.diffusion.inverse import Inpainting, InverseSampler, LinearOperator, MomentMatching, Observation
from genzoo.diffusion.samplers import Ancestral, Sampler
from genzoo.diffusion.schedules import DiscreteSchedule
from genzoo.editing.langevin import Langevin
from genzoo.errors import BUILD_ERRORS, UsageError, one_line
from genzoo.model import Causal, Composite, Continuous, Decoder, GenerativeModel, Samples
from genzoo.numerics.precision import full_float32
from genzoo.numerics.random import SampleStreams, randn, seed_of

Method = Callable[..., Any]  # of an observation, and for a denoiser of the sampler of its prior
# Its law has the smallest bias of all chains of 100 steps on Gaussian data: experiments/gallery_edit/laws.md.
STEPS = 100


class Posterior(NamedTuple):
    """Draws for each of B observations, and their cost."""

    draws: Tensor  # (B, n, *shape)
    nfe: int  # evaluations of a network per draw, vector-Jacobian products included

    @property
    def mean(self) -> Tensor:
        """Mean of the draws, (B, *shape)."""
        return self.draws.mean(1)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the draws, (B, *shape); 0 for a single draw."""
        return self.draws.std(1, correction=0)


class Continuation:
    """The conditional distribution of a causal model: unknown coordinates that follow all known ones.

    Args:
        observation: of an ``Inpainting`` with sigma = 0.

    Raises:
        ValueError: for another operator or noisy values.
    """

    def __init__(self, observation: Observation):
        if not isinstance(observation.operator, Inpainting) or observation.sigma > 0:
            raise ValueError("this model continues known pixels without noise: task=inpaint with sigma=0")
        self.observation, self.operator = observation, observation.operator

    def __call__(self, model: Causal, n: int, y: Tensor | None = None, rng: torch.Generator | None = None) -> Samples:
        """Draw a sample for each value.

        Raises:
            ValueError: for an unknown coordinate that precedes a known one.
        """
        x = self.operator.adjoint(self.observation.value.to(model.device, model.dtype))
        samples = model.complete(x, self.known(model), y, rng=rng)
        return samples._replace(x=self.observation.finish(samples.x))

    def known(self, model: Causal) -> int:
        """Return the number of known places in the order of the model."""
        order, unknown = model.order(), self.operator.unknown
        first = int(order[unknown].min())
        if not torch.equal(order >= first, unknown):
            raise ValueError(
                "this model draws pixels in raster order: the unknown ones must be all pixels after some point, such as "
                "mask=bottom"
            )
        return first


def choose(
    model: GenerativeModel,
    operator: LinearOperator,
    sigma: float,
    method: Method | None,
    sampler: Sampler | None,
    guidance: Callable[[Denoiser], Guidance] | None = None,
) -> Callable[[Observation], Callable[..., Samples]]:
    """Return the sampler of posteriors, as a function of an observation.

    With guidance the method takes the guided denoiser for E[x | x_t]. Its draws are no posterior samples, since no distribution
    has the guided score: they trade diversity for the likelihood of the condition, as guided samples do.

    Args:
        model: any family.
        operator, sigma: of the observations.
        method: a subclass of ``InverseSampler`` or ``Langevin``, or a partial one; None for the family's default.
        sampler: of a denoiser's prior; None for a default.
        guidance: of a denoiser's prior, which fits the model.

    Raises:
        UsageError: for a family without the ability, and a method, sampler or guidance that does not fit it or the task.
    """
    family = type(model).__name__
    kind: Any = method.func if isinstance(method, functools.partial) else method
    build: Method
    if isinstance(model, Composite):
        raise UsageError(f"edit: {family} has a learned prior over latents, for which no method is implemented")
    if isinstance(model, Denoiser):
        chosen = method or MomentMatching
        if not issubclass(kind or MomentMatching, InverseSampler):
            raise UsageError(
                f"method={_name(kind)}: {family} is a denoiser: choose moment_matching, pigdm, dps or repaint"
            )
        prior = default_sampler(model) if sampler is None else sampler
        if guidance is None:
            build = lambda observation: chosen(observation, prior)  # noqa: E731
        else:
            build = lambda observation: GuidedSampler(chosen(observation, prior), guidance)  # noqa: E731
    elif guidance is not None:
        raise UsageError(f"guidance: {family} is no denoiser, and its posterior is not guided; omit it")
    elif isinstance(model, Causal):
        if method is not None:
            raise UsageError(f"method={_name(kind)}: {family} continues pixels in raster order, exactly; omit it")
        build = Continuation
    elif isinstance(model, Decoder) and isinstance(model.latent, Continuous):
        build = method or Langevin
        if (kind or Langevin) is not Langevin:
            raise UsageError(f"method={_name(kind)}: {family} is no denoiser: choose langevin, or omit it")
    else:
        raise UsageError(f"edit: {family} has neither a denoiser, a causal order nor continuous latents")
    try:
        trial = build(Observation(operator, torch.zeros(1, *operator.shape), sigma))
        if isinstance(trial, Continuation) and isinstance(model, Causal):
            trial.known(model)
        if isinstance(model, Denoiser) and not model.path.independent:
            raise ValueError(
                "needs a path with independent noise and data, and this model was trained on coupled pairs"
            )
    except BUILD_ERRORS as error:
        raise UsageError(f"method: {one_line(error)}") from error
    return build


def default_sampler(denoiser: Denoiser) -> Sampler:
    """Return the ancestral chain of ``STEPS`` steps, or of as many as the denoiser has."""
    schedule = denoiser.path.schedule
    return Ancestral(steps=min(STEPS, schedule.num_steps) if isinstance(schedule, DiscreteSchedule) else STEPS)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def degrade(x: Tensor, operator: LinearOperator, sigma: float, seed: int) -> Tensor:
    """Observe events, (B, *shape) -> (B, *operator.shape); the noise of event i is a function of the seed and i."""
    value = operator(x)
    streams = SampleStreams(seed_of("observation", seed), range(len(x)), device=x.device)
    return value + sigma * randn(value.shape, rng=streams, device=x.device, dtype=x.dtype) if sigma else value


def draw_posterior(
    model: GenerativeModel,
    build: Callable[[Observation], Callable[..., Samples]],
    operator: LinearOperator,
    value: Tensor,
    sigma: float,
    n: int,
    *,
    y: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Posterior:
    """Draw ``n`` samples for each observation; draw k of observation b is a function of the seed and b n + k.

    Args:
        model: in evaluation mode.
        build: of ``choose``.
        operator, value, sigma: the observations, (B, *operator.shape).
        n: draws of each.
        y: conditions of the observations, (B, *condition.shape).
        seed: of all noise.
        batch_size: samples drawn at once; does not change the samples.

    Returns:
        The draws, on the CPU.

    Raises:
        UsageError: for an observation that the method refuses.
    """
    parts, nfe = [], 0
    total = len(value) * n
    for start in range(0, total, batch_size):
        rows = range(start, min(start + batch_size, total))
        of_row = torch.tensor([row // n for row in rows])
        own = value[of_row].to(model.device)
        streams = SampleStreams(seed, rows, device=model.device)
        conditions = None if y is None else y[of_row].to(model.device)
        try:
            with full_float32(), torch.no_grad():
                sampler = build(Observation(operator, own, sigma))
                x, evaluations, _ = sampler(model, len(rows), conditions, streams)
        except ValueError as error:
            raise UsageError(f"method: {one_line(error)}") from error
        parts.append(x.cpu())
        nfe = max(nfe, evaluations)
    return Posterior(torch.cat(parts).unflatten(0, (len(value), n)), nfe)
