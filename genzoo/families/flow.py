r"""Normalising flows: likelihood, loss and sampling, given an invertible map.

An invertible map ``f`` from data to noise, ``z = f(x)``, has the exact density, by the change of variables,

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

References:
    Rezende, Mohamed, "Variational Inference with Normalizing Flows", 2015, https://arxiv.org/abs/1505.05770 (eq. 5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genzoo.model import Bijective, Bound, Density, LogProb, Loss, Samples
from genzoo.nn.coupling import data_dependent_init
from genzoo.numerics import distributed
from genzoo.numerics.random import randn


class Flow(Density, Bijective):
    """A normalising flow with a standard normal prior; subclasses define the map and its inverse.

    Attributes:
        nfe: passes through the networks of the flow for a sample.
    """

    bound = Bound.EXACT
    nfe: int = 1

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        return LogProb(self._change_of_variables(*self._forward_and_log_det(x, y)))

    def _change_of_variables(self, z: Tensor, log_det: Tensor) -> Tensor:
        return log_det - 0.5 * (z.square().sum(1) + self.dim * math.log(2 * math.pi))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        z, log_det = self._forward_and_log_det(x, y)
        nll = -self._change_of_variables(z, log_det).mean()
        low, high = (log_det.detach() / self.dim).aminmax()
        if self.training:
            low, high = distributed.all_reduce_minmax(low, high)
        # In nats per dimension, so that one learning rate suits images of any size.
        total = self._penalized(nll) / self.dim
        return Loss(total, {"nll": nll.detach(), "log_det_min": low, "log_det_max": high})

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        with data_dependent_init(self) as needed:
            if needed:
                self._forward_and_log_det(x, y)

    def _penalized(self, nll: Tensor) -> Tensor:
        """Add weight penalties to the negative log-likelihood."""
        return nll

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        z = randn((n, self.dim), rng=rng, device=self.device, dtype=self.dtype)
        return Samples(self._decode(z, y), nfe=self.nfe)
