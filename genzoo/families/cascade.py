r"""Cascaded models: a base model of small images, and super-resolution models that each enlarge the result.

With P the average over blocks of pixels, rounded to the levels of the data, ``x_0 = P x_1`` is a small image of ``x_1``, and

    p(x_1) = sum_{x_0} P(x_0) E_{z | x_0} p(x_1 | z, a).

Any generative model is a stage. A super-resolution model is conditioned on a small image with noise,

    z = sqrt(1 - a^2) x_0 + a eps

and on the noise level a, a further channel of the image (conditioning augmentation). It is trained on small images of data,
with a uniform in [0, a_max], and samples from those of the stage below, whose errors the noise hides: a is a parameter of
sampling. At a = 0 it models p(x_1 | x_0), at a = 1 it is unconditional. For the small images of data, samples have the
distribution of the data at any a.

The density has a lower bound, with one draw of z for each image,

    log p(x_1) >= log P(P x_1) + E_z log p(x_1 | z, a).

Stages are trained one after another, each for its fraction of the budget.

References:
    Ho, Saharia, Chan, Fleet, Norouzi, Salimans, "Cascaded Diffusion Models for High Fidelity Image Generation", 2022,
    https://arxiv.org/abs/2106.15282 (section 3; section 4.2: non-truncated conditioning augmentation).
    Saharia et al., "Image Super-Resolution via Iterative Refinement", 2021, https://arxiv.org/abs/2104.07636.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition, Image, Joint
from genzoo.distributions.discretization import bin_center, dequantize, quantize, to_bin_centers
from genzoo.event import EventSpec
from genzoo.model import (
    Adversarial,
    Augmented,
    Bound,
    Density,
    GenerativeModel,
    LogProb,
    Loss,
    Samples,
    Stage,
    Staged,
)
from genzoo.numerics.random import rand, randn


def downsample(x: Tensor, factor: int, levels: int | None) -> Tensor:
    """Average blocks of pixels, (B, C, H, W) -> (B, C, H/factor, W/factor), and round to the levels of the data, if any."""
    if levels is None:
        return F.avg_pool2d(x, factor)
    # In integers, since averages often lie halfway between two levels.
    total = F.avg_pool2d(quantize(x, levels).to(x.dtype), factor, divisor_override=1).long()
    return bin_center((total + factor**2 // 2) // factor**2, levels, x.dtype)


class SuperResolution(nn.Module):
    """A model of images given smaller ones with noise.

    Args:
        event: of the images.
        small: of the smaller images.
        condition: of the cascade; None for an unconditional one.
        model: factory of the model, called as ``model(event, condition)``.
        a_max: largest noise level of training.
    """

    def __init__(
        self,
        event: EventSpec,
        small: EventSpec,
        condition: Condition | None,
        model: Callable[..., GenerativeModel],
        a_max: float,
    ):
        super().__init__()
        channels, height, width = small.shape
        image = Image((channels + 1, height, width))  # a is a further channel
        self.condition = Joint((image,) if condition is None else (image, condition), fixed=1)
        self.model, self.a_max = model(event, self.condition), a_max

    def conditions(self, small: Tensor, a: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Return the conditions of smaller images, (B, ...), at noise levels a, (B,)."""
        eps = randn(small.shape, rng=rng, device=small.device, dtype=small.dtype)
        each = a.view(-1, 1, 1, 1)
        z = torch.sqrt(1 - each**2) * small + each * eps
        image = torch.cat([z, each.expand_as(z[:, :1])], dim=1)
        return self.condition.join(image) if y is None else self.condition.join(image, y)

    def loss(self, x: Tensor, small: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Return the loss of the model at uniform noise levels."""
        return self.model._loss(x, self.training_conditions(small, y, rng), rng)

    def training_conditions(self, small: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Return the conditions of smaller images at uniform noise levels."""
        a = self.a_max * rand((len(small),), rng=rng, device=small.device, dtype=torch.float64)
        return self.conditions(small, a.to(small.dtype), y, rng)


class _Cascade(Augmented, Staged):
    """Common base of cascades with and without a density.

    Args:
        event, condition: as in ``GenerativeModel``.
        prior: the base model.
        upsamplers: the super-resolution models, the one with the smallest images first.
        factors: of enlargement.
        augmentation: noise level a of sampling and of the density.
        base_fraction: fraction of the budget for the base model.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None,
        prior: GenerativeModel,
        upsamplers: Sequence[SuperResolution],
        factors: Sequence[int],
        augmentation: float,
        base_fraction: float,
    ):
        super().__init__(event, condition)
        self.prior, self.upsamplers = prior, nn.ModuleList(upsamplers)
        self.factors, self.max_augmentation = tuple(factors), upsamplers[0].a_max
        self.check_augmentation(augmentation)
        self.augmentation = augmentation
        self.fractions = [base_fraction, *([(1 - base_fraction) / len(factors)] * len(factors))]

    def super_resolution(self, i: int) -> SuperResolution:
        """Return the i-th super-resolution stage, the one with the smallest images first."""
        found = self.upsamplers[i]
        assert isinstance(found, SuperResolution)
        return found

    def parts(self) -> list[GenerativeModel]:
        return [self.prior, *(self.super_resolution(i).model for i in range(len(self.upsamplers)))]

    def stages(self) -> list[Stage]:
        modules = [CascadeStage(self, i) for i in range(len(self.fractions))]
        return [
            Stage("base" if i == 0 else f"{module.shape[-1]} pixels", module, fraction)
            for i, (module, fraction) in enumerate(zip(modules, self.fractions, strict=True))
        ]

    def sizes(self, x: Tensor) -> list[Tensor]:
        """Return an image at all resolutions, the smallest first: values of the data, (B, C, H_i, W_i)."""
        x = x if self.levels is None else to_bin_centers(x, self.levels)
        images = [x]
        for factor in reversed(self.factors):
            images.insert(0, downsample(images[0], factor, self.levels))
        return images

    def spread(self, x: Tensor, rng: torch.Generator | None) -> Tensor:
        """Dequantise a small image, as data sets are."""
        return x if self.levels is None else dequantize(quantize(x, self.levels), self.levels, rng).to(x.dtype)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Return the loss of the last stage."""
        return self.stages()[-1].module._loss(x, y, rng)

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        """Initialise the last stage."""
        self.stages()[-1].module._initialize(x, y, rng)

    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return self.stages()[-1].module.after_step(aux, batch_size, rng=rng)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        event, nfe, _ = self.prior._sample(n, y, rng)
        x, evaluations, _ = self.enlarge(event, y, rng)
        return Samples(x, nfe + evaluations)

    def from_prior(self, event: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        return self.enlarge(event, y, rng).x

    def enlarge(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None, stages: int | None = None) -> Samples:
        """Sample the super-resolution models, (B, C, H_0, W_0) -> (B, *shape).

        Args:
            x: images of the base model.
            y: conditions of a conditional cascade.
            rng: source of randomness.
            stages: number of super-resolution models; None for all.
        """
        nfe = 0
        for i in range(len(self.upsamplers) if stages is None else stages):
            stage = self.super_resolution(i)
            small = x if self.levels is None else to_bin_centers(x.clamp(-1, 1), self.levels)
            a = torch.full((len(x),), self.augmentation, device=x.device, dtype=x.dtype)
            x, evaluations, _ = stage.model._sample(len(x), stage.conditions(small, a, y, rng), rng)
            nfe += evaluations
        return Samples(x, nfe)


class CascadeModel(_Cascade):
    """A cascade without a density, since one of its models lacks one or its data are not quantised."""


class CascadeDensity(_Cascade, Density):
    """A cascade with a lower bound of its density."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.bound = Bound.LOWER
        for part in self._densities():
            self.bound |= part.bound
        self.num_samples = max(part.num_samples for part in self._densities())

    def _densities(self) -> list[Density]:
        return [part for part in self.parts() if isinstance(part, Density)]

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Return the bound with one draw of noise and dequantisation for each small image.

        The standard error is None, since the variance over draws cannot be estimated from one.
        """
        assert self.levels is not None
        base, *upsamplers = self._densities()
        images = self.sizes(x)
        value = base._log_prob(self.spread(images[0], rng), y, num_samples, rng).value
        for i, model in enumerate(upsamplers):
            # The probability of a small image is bounded by its density.
            value = value - images[i][0].numel() * math.log(self.levels / 2)
            a = torch.full((len(x),), self.augmentation, device=x.device, dtype=x.dtype)
            large = x if i == len(upsamplers) - 1 else self.spread(images[i + 1], rng)
            c = self.super_resolution(i).conditions(images[i], a, y, rng)
            value = value + model._log_prob(large, c, num_samples, rng).value
        return LogProb(value)


class CascadeStage(GenerativeModel):
    """A training stage of a cascade: the loss of one of its models. The other models are no submodules.

    Args:
        cascade: the whole.
        index: 0 for the base model.
    """

    def __init__(self, cascade: _Cascade, index: int):
        part = cascade.parts()[index]
        super().__init__(part.event, cascade.condition)
        self.part = part if index == 0 else cascade.upsamplers[index - 1]
        self.diagnostics = part.diagnostics
        self.index = index
        self._hidden = (cascade,)  # a tuple hides it from ``parameters()``

    def _model(self) -> GenerativeModel:
        (cascade,) = self._hidden
        return cascade.parts()[self.index]

    def _inputs(self, x: Tensor, rng: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Return the images of this stage and the smaller ones."""
        (cascade,) = self._hidden
        images = cascade.sizes(x)
        last = self.index == len(images) - 1
        own = x if last else cascade.spread(images[self.index], rng)
        return own, images[self.index - 1] if self.index else None

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        own, small = self._inputs(x, rng)
        if small is None:
            return self._model()._initialize(own, y, rng)
        assert isinstance(self.part, SuperResolution)
        return self._model()._initialize(own, self.part.training_conditions(small, y, rng), rng)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        own, small = self._inputs(x, rng)
        if small is None:
            return self._model()._loss(own, y, rng)
        assert isinstance(self.part, SuperResolution)
        return self.part.loss(own, small, y, rng)

    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return self._model().after_step(aux, batch_size, rng=rng)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Sample the models up to this one."""
        (cascade,) = self._hidden
        event, nfe, _ = cascade.prior._sample(n, y, rng)
        x, evaluations, _ = cascade.enlarge(event, y, rng, self.index)
        return Samples(x, nfe + evaluations)


def small_events(event: EventSpec, factors: Sequence[int]) -> list[EventSpec]:
    """Return the images of all stages, the smallest first.

    Raises:
        ValueError: for vectors, and factors that do not divide the sides.
    """
    if not event.is_image:
        raise ValueError(f"a cascade enlarges images, not vectors of shape {list(event.shape)}; choose another family")
    if not factors or min(factors) < 2:
        raise ValueError(f"factors={list(factors)}: at least one factor of enlargement, each at least 2")
    channels, height, width = event.shape
    events = [event]
    for factor in reversed(factors):
        if height % factor or width % factor:
            raise ValueError(f"factors={list(factors)}: do not divide the {event.shape[1]}x{event.shape[2]} image")
        height, width = height // factor, width // factor
        events.insert(0, EventSpec((channels, height, width), event.levels))
    return events


def cascade(
    event: EventSpec,
    condition: Condition | None = None,
    *,
    base: Callable[..., GenerativeModel],
    upsampler: Callable[..., GenerativeModel],
    factors: Sequence[int] = (2,),
    augmentation: float = 0.1,
    max_augmentation: float = 0.5,
    base_fraction: float = 0.5,
) -> CascadeModel | CascadeDensity:
    """Build a cascade.

    Args:
        event, condition: as in ``GenerativeModel``; images.
        base: factory of the base model, called as ``base(event, condition)`` with the event of the smallest images.
        upsampler: factory of the super-resolution models, called as ``upsampler(event, condition)`` with a joint condition of
            the smaller image with its noise level, which is fixed, and the condition of the cascade.
        factors: of enlargement, the smallest images first.
        augmentation: noise level a of the smaller images in sampling, at most ``max_augmentation``.
        max_augmentation: largest noise level of training, at most 1.
        base_fraction: fraction of the budget for the base model; the others have equal parts of the rest.

    Raises:
        ValueError: for vectors, factors that do not divide the sides, and values outside their range.
    """
    if not 0 < max_augmentation <= 1:
        raise ValueError(f"max_augmentation must be in (0, 1], not {max_augmentation}")
    if not 0 < base_fraction < 1:
        raise ValueError(f"base_fraction must be between 0 and 1, not {base_fraction}")
    events = small_events(event, factors)
    prior = base(events[0], condition)
    upsamplers = [
        SuperResolution(large, small, condition, upsampler, max_augmentation)
        for small, large in itertools.pairwise(events)
    ]
    models = [prior, *(stage.model for stage in upsamplers)]
    for model in models:
        if isinstance(model, Adversarial | Staged):
            raise ValueError(f"{type(model).__name__} has no single training loss; choose another family")
    dense = event.levels is not None and all(isinstance(model, Density) for model in models)
    family = CascadeDensity if dense else CascadeModel
    return family(event, condition, prior, upsamplers, factors, augmentation, base_fraction)
