r"""Denoisers: what samplers, guidance and likelihoods of diffusion and flow models need of a model.

A denoiser predicts, from ``x_t = alpha(t) x + sigma(t) eps``, one of the quantities of ``genzoo.diffusion.path``; every
other one follows by a linear map. It need not be trainable: a guided, a restarted or a distilled denoiser wraps another one
and implements ``predict`` alone.

    class Scaled(DenoiserWrapper):  # an example: the estimates of the data shrunk by a factor
        def predict(self, x_t, t, y=None):
            x0 = self.denoiser.denoise(x_t, t, y)
            return Prediction("x0", 0.9 * x0)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.diffusion.path import GaussianPath, Parameterization, Prediction, cast_like
from genzoo.event import EventSpec
from genzoo.model import Composite, GenerativeModel


class Denoiser(nn.Module, ABC):
    """The ability to denoise along a Gaussian path.

    Attributes:
        event: of the data.
        condition: of the data, None for an unconditional denoiser.
        path: from data to noise.
        evaluations: of a network in one ``predict``; classifier-free guidance takes two.
    """

    event: EventSpec
    condition: Condition | None
    path: GaussianPath
    evaluations: int = 1

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Predict one of the parameterizations of ``genzoo.diffusion.path``.

        Args:
            x_t: noisy data, (B, *shape).
            t: times, (B,) in [0, 1], 0 = data, 1 = noise.
            y: conditions, (B, *condition.shape), null values included; None for the null value.
        """

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU without any."""
        return next((value.device for value in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights; torch's default without any."""
        types = (value.dtype for value in chain(self.parameters(), self.buffers()) if value.is_floating_point())
        return next(types, torch.get_default_dtype())

    def predict_as(self, kind: Parameterization, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, int]:
        """Predict a given quantity, (B, *shape), and return it with the number of network evaluations.

        At an end point of the path where the conversion divides zero by zero, the network is called again beside it.
        """
        prediction, evaluations = self.predict(x_t, t, y), self.evaluations
        if prediction.kind != kind:
            inside = self.path.conditioned(prediction.kind, kind, t)
            if bool((inside != t).any()):
                prediction, evaluations = self.predict(x_t, inside, y), 2 * evaluations
            t = inside
        return self.path.combine(prediction, x_t, t, kind), evaluations

    def denoise(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[x | x_t]."""
        return self.predict_as("x0", x_t, t, y)[0]

    def eps(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[eps | x_t]."""
        return self.predict_as("eps", x_t, t, y)[0]

    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[dx_t/dt | x_t], the velocity of the probability-flow ODE."""
        return self.predict_as("velocity", x_t, t, y)[0]

    def score(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate grad log p_t(x_t).

        Raises:
            ValueError: where the path pairs its noise with its data.
        """
        return self.predict_as("score", x_t, t, y)[0]


class DenoiserWrapper(Denoiser):
    """A denoiser made of another one, whose event, condition and path it has.

    Args:
        denoiser: the other one.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.event, self.condition, self.path = denoiser.event, denoiser.condition, denoiser.path

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Of a network in one ``predict``."""
        return self.denoiser.evaluations


def call_network(network: nn.Module, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """Call the network on x_t, (B, ...), at times t, (B,) or (); cast the output to x_t.dtype."""
    return cast_like(network(x_t, t if t.ndim else t.expand(len(x_t)), y), x_t)


def sampling_denoiser(model: GenerativeModel) -> Denoiser | None:
    """Return the denoiser that a model is sampled with, of a composite its prior; None of a model without a sampler."""
    while isinstance(model, Composite):
        model = model.prior
    return model if isinstance(model, Denoiser) else None
