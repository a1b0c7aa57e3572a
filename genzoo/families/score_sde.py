r"""Score-based models through stochastic differential equations.

A linear SDE ``dx = f(t) x dt + g(t) dw`` diffuses data into noise, with ``x_t = alpha_t x + sigma_t eps``. The schedule defines
the SDE: variance preserving (VP), sub-VP, or variance exploding (VE). Its time reversal is the SDE

    dx = (f x - g^2 grad log p_t(x)) dt + g dw,

which depends on the data through the score ``grad log p_t``, learned by denoising score matching,

    L = E_t lambda(t) E |s_theta(x_t, t) - grad log p(x_t | x)|^2 = E_t E |eps_theta(x_t, t) - eps|^2,

with ``s = -eps/sigma`` and the weight ``lambda = sigma^2``. The probability-flow ODE has the same marginals and gives latents
and a density, see ``genzoo.diffusion.probability_flow``.

With the **preconditioning** of Karras et al., ``D(x_t, t) = c_skip x_t + c_out F(c_in x_t, t)`` estimates the data, see
``genzoo.diffusion.preconditioning``. ``L = E |F - (x - c_skip x_t)/c_out|^2`` is its squared error with weight ``1/c_out^2``.

References:
    Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456 (eq. 5-7, 13).
    Vincent, "A Connection Between Score Matching and Denoising Autoencoders", 2011, https://doi.org/10.1162/NECO_a_00142.
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364 (eq. 7-8, table 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition, DropRate
from genzoo.diffusion.denoiser import call_network
from genzoo.diffusion.noise_levels import NoiseLevels, UniformTime
from genzoo.diffusion.path import GaussianPath, Prediction
from genzoo.diffusion.preconditioning import precondition
from genzoo.diffusion.probability_flow import ProbabilityFlow
from genzoo.diffusion.samplers import EulerMaruyama, Sampler
from genzoo.diffusion.schedules import Schedule, VPSchedule
from genzoo.event import EventSpec
from genzoo.model import Loss, Samples
from genzoo.nn import defaults
from genzoo.numerics.random import randn


class ScoreSDE(ProbabilityFlow):
    """A score-based model.

    Args:
        network: factory of the network, called as ``network(in_shape, out_shape, condition)``, for ``(x_t, t, y)``.
        event, condition: as in ``GenerativeModel``.
        schedule: of the SDE; VP by default.
        sigma_data: standard deviation of the data, for the preconditioning of Karras et al.; None for an eps-prediction
            network without preconditioning.
        noise_levels: distribution of training times; uniform by default.
        condition_dropout: probability of replacing a condition by the null value, for classifier-free guidance; for several
            conditions also one for each.
        sampler: default sampler; Euler-Maruyama with 500 steps by default.
        tolerance: relative and absolute tolerance of the adaptive solver of latents and densities.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.denoiser,
        schedule: Schedule | None = None,
        sigma_data: float | None = 0.5,
        noise_levels: NoiseLevels | None = None,
        condition_dropout: DropRate = 0.1,
        sampler: Sampler | None = None,
        tolerance: float = 1e-5,
    ):
        super().__init__(event, condition, condition_dropout)
        if sigma_data is not None and sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, or null for no preconditioning, not {sigma_data}")
        if tolerance <= 0:
            raise ValueError(f"tolerance must be positive, not {tolerance}")
        self.network = network(self.shape, self.shape, condition)
        self.path = GaussianPath(schedule or VPSchedule())
        self.sigma_data = sigma_data
        self.noise_levels = noise_levels or UniformTime()
        self.sampler = sampler or EulerMaruyama()
        self.rtol = self.atol = tolerance

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        if self.sigma_data is None:
            return Prediction("eps", call_network(self.network, x_t, t, y))
        c_skip, c_out, c_in = precondition(self.path.schedule, x_t, t, self.sigma_data)
        return Prediction("x0", c_skip * x_t + c_out * call_network(self.network, c_in * x_t, t, y))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        y = self.conditioner.drop(y, rng)
        t = self.noise_levels.sample(len(x), self.path.schedule, rng, x.device)
        eps = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
        x_t = self.path.sample(x, eps, t)
        if self.sigma_data is None:
            output, target = self.network(x_t, t, y), eps
        else:
            c_skip, c_out, c_in = precondition(self.path.schedule, x_t, t, self.sigma_data)
            output, target = self.network(c_in * x_t, t, y), (x - c_skip * x_t) / c_out
        mse = (output.to(x.dtype) - target).square().mean()
        return Loss(mse, {"mse": mse.detach()})

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return self.sampler(self, n, y, rng)
