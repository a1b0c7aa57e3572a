r"""Denoisers: the interface between a model and its samplers, guidance and likelihoods.

From ``x_t = alpha(t) x + sigma(t) eps`` a denoiser predicts one of the parameterizations of ``genzoo.diffusion.path``; the
others follow by a linear map. Guidance or distillation wraps another denoiser and implements ``predict`` alone:

    class Scaled(DenoiserWrapper):  # for example, shrunk x0-predictions
        def predict(self, x_t, t, y=None):
            x0 = self.denoiser.denoise(x_t, t, y)
            return Prediction("x0", 0.9 * x0)
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.diffusion.path import GaussianPath, Parameterization, Prediction, cast_like
from genzoo.event import EventSpec
from genzoo.model import Composite, GenerativeModel


class PathModel(nn.Module, ABC):
    """A model of a Gaussian path that samplers evaluate: a denoiser, or a flow map.

    Attributes:
        event: shape and levels of the data.
        condition: the conditioning variable, None for an unconditional model.
        path: the Gaussian path from data to noise.
        evaluations: network evaluations per call; two with classifier-free guidance.
    """

    event: EventSpec
    condition: Condition | None
    path: GaussianPath
    evaluations: int = 1

    @abstractmethod
    def estimate(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate the data, (B, *shape), from noisy data; arguments as in ``Denoiser.predict``."""

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU without any."""
        return next((value.device for value in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights; torch's default without any."""
        types = (value.dtype for value in chain(self.parameters(), self.buffers()) if value.is_floating_point())
        return next(types, torch.get_default_dtype())


class Denoiser(PathModel):
    """A predictor of E[x | x_t], or an equivalent parameterization, on a Gaussian path."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Predict one of the parameterizations of ``genzoo.diffusion.path``.

        Args:
            x_t: noisy data, (B, *shape).
            t: times, (B,) in [0, 1]; 0 is data, 1 is noise.
            y: conditions, (B, *condition.shape), null values included; None for the null value.
        """

    def predict_as(self, kind: Parameterization, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, int]:
        """Predict in a given parameterization, (B, *shape); also return the number of network evaluations.

        At an end of the path where the conversion is singular, the network is called again at the nearest regular time.
        """
        prediction, evaluations = self.predict(x_t, t, y), self.evaluations
        if prediction.kind != kind:
            inside = self.path.well_conditioned_time(prediction.kind, kind, t)
            if bool((inside != t).any()):
                prediction, evaluations = self.predict(x_t, inside, y), 2 * evaluations
            t = inside
        return self.path.combine(prediction, x_t, t, kind), evaluations

    def denoise(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[x | x_t]."""
        return self.predict_as("x0", x_t, t, y)[0]

    def estimate(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.denoise(x_t, t, y)

    def eps(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[eps | x_t]."""
        return self.predict_as("eps", x_t, t, y)[0]

    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[dx_t/dt | x_t], the velocity of the probability-flow ODE."""
        return self.predict_as("velocity", x_t, t, y)[0]

    def score(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate grad log p_t(x_t).

        Raises:
            ValueError: for a path with coupled noise and data.
        """
        return self.predict_as("score", x_t, t, y)[0]


class DenoiserWrapper(Denoiser):
    """A denoiser that wraps another one, with the same event, condition and path.

    Args:
        denoiser: the wrapped denoiser.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.event, self.condition, self.path = denoiser.event, denoiser.condition, denoiser.path

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Network evaluations per ``predict``."""
        return self.denoiser.evaluations


def call_network(network: nn.Module, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """Call the network on x_t, (B, ...), at times t, (B,) or (); cast the output to x_t.dtype."""
    return cast_like(network(x_t, t if t.ndim else t.expand(len(x_t)), y), x_t)


def sampling_denoiser(model: GenerativeModel) -> Denoiser | None:
    """Return the denoiser that a model's sampler calls, that of the prior for a composite model; None for other models."""
    while isinstance(model, Composite):
        model = model.prior
    return model if isinstance(model, Denoiser) else None


def sampling_denoisers(model: GenerativeModel) -> list[Denoiser]:
    """Return all denoisers that the samplers of a model call, in this order; that of ``sampling_denoiser`` is the first."""
    if isinstance(model, Composite):
        return [denoiser for part in model.parts() for denoiser in sampling_denoisers(part)]
    return [model] if isinstance(model, Denoiser) else []


def path_model(model: GenerativeModel) -> PathModel | None:
    """Return the denoiser or flow map that a model's sampler calls, that of the prior for a composite model."""
    while isinstance(model, Composite):
        model = model.prior
    return model if isinstance(model, PathModel) else None


def path_models(model: GenerativeModel) -> list[PathModel]:
    """Return all denoisers and flow maps that the samplers of a model call; that of ``path_model`` is the first."""
    if isinstance(model, Composite):
        return [found for part in model.parts() for found in path_models(part)]
    return [model] if isinstance(model, PathModel) else []


def replaced(module: Any, **attributes: Any) -> Any:
    """Return a shallow copy of a module with other attributes; it shares parameters and submodules."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    for name, value in attributes.items():
        setattr(copied, name, value)
    return copied


def with_part(model: GenerativeModel, part: Any) -> GenerativeModel:
    """Return a shallow copy of a model whose innermost prior, or which itself, is ``part``."""
    return replaced(model, prior=with_part(model.prior, part)) if isinstance(model, Composite) else part
