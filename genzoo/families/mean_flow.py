r"""MeanFlow: one-step generation by average velocities.

On the straight path of flow matching, ``x_t = (1 - t) x + t eps``, the marginal velocity field is ``v(x_t, t)``, the mean of
``eps - x`` given x_t. Its average over an interval [r, t] of a trajectory of the probability-flow ODE,

    u(x_t, r, t) = 1/(t - r) int_r^t v(x_s, s) ds,      u(x_t, t, t) = v(x_t, t),

is a flow map, ``x_r = x_t - (t - r) u(x_t, r, t)``: from noise to data in one evaluation, ``x_0 = eps - u(eps, 0, 1)``, or in
several. Its derivative along the trajectory is the MeanFlow identity, which needs no integral,

    u(x_t, r, t) = v(x_t, t) - (t - r) d/dt u(x_t, r, t),      d/dt u = v . grad_x u + du/dt,

a Jacobian-vector product with the tangent ``(v, 0, 1)`` of (x, r, t). Training regresses u on the right-hand side with a
stop-gradient and with the conditional velocity ``eps - x`` for v, of which the identity is linear,

    L = E phi(|u_theta - sg(v - (t - r) d/dt u_theta)|^2),      phi(e) = int (e + c)^{-p} de,

so that the gradient of phi weights each example by ``(e + c)^{-p}``. For r = t, a fraction of the examples, this is flow
matching.

**Guidance in training.** With s the scale of classifier-free guidance, samples in one step are guided if v is replaced by the
guided velocity ``u_0 + s (v_c - u_0)``, u_0 = u(x_t, t, t) without the condition. A mixture k of ``u_c = u(x_t, t, t)`` with it
lowers its variance, at the same fixed point:

    v <- s (1 - k) (eps - x) + k u_c + (1 - s)(1 - k) u_0.

The instantaneous velocity ``u(x, t, t)`` is a velocity field as in flow matching: any ODE sampler applies to it, and latents
and densities are those of its ODE, see ``genzoo.diffusion.probability_flow``. Samples in few steps approximate its
distribution.

For data N(mu, lambda), ``u(eps, 0, 1) = eps - mu - sqrt(lambda) eps``, so that one step is ``mu + sqrt(lambda) eps``.

References:
    Geng, Deng, Bai, Kolter, He, "Mean Flows for One-step Generative Modeling", 2025, https://arxiv.org/abs/2505.13447
    (eq. 3, 6-11, 22; appendix on improved guidance).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from genzoo.conditions import Condition, DropRate, Joint, Vector
from genzoo.diffusion.denoiser import call_network
from genzoo.diffusion.flow_map import AnytimeFlowMap
from genzoo.diffusion.noise_levels import LogitNormalTime, NoiseLevels
from genzoo.diffusion.path import GaussianPath, Prediction, expand
from genzoo.diffusion.probability_flow import ProbabilityFlow
from genzoo.diffusion.samplers import Jump, Sampler
from genzoo.diffusion.schedules import CondOT
from genzoo.event import EventSpec
from genzoo.model import Loss, Samples
from genzoo.nn import defaults
from genzoo.numerics.random import rand, randn

# Networks embed 1000 times their time at frequencies up to 1, whose derivatives in time would drown all others: at a hundredth
# of the time the fastest is 10 radians along the path.
TIME_SCALE = 0.01


class MeanFlow(ProbabilityFlow, AnytimeFlowMap):
    """A MeanFlow model.

    Args:
        network: factory of the network of u, called as ``network(in_shape, out_shape, condition)``, for ``(x_t, t, y)``; its
            condition joins the duration t - r and the condition of the model.
        event, condition: as in ``GenerativeModel``.
        noise_levels: distribution of two times, of which t is the later one; logit-normal by default.
        ratio: probability of r < t; otherwise r = t.
        power: p of the adaptive weight.
        offset: c of the adaptive weight.
        guidance: s of classifier-free guidance in training; 1 for none.
        mixture: k, the fraction of the model's own velocity in the guided one, in [0, 1).
        condition_dropout: probability of replacing a condition by the null value, for guidance; for several conditions also one
            for each.
        sampler: default sampler; ``Jump`` in one step by default.
        tolerance: relative and absolute tolerance of the adaptive solver of latents and densities.

    Raises:
        ValueError: for values outside their domain, and guidance of a model that has no conditions or never drops them.
    """

    eager = ("network",)  # torch.compile does not trace forward-mode derivatives

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.denoiser,
        noise_levels: NoiseLevels | None = None,
        ratio: float = 0.25,
        power: float = 1.0,
        offset: float = 1e-3,
        guidance: float = 1.0,
        mixture: float = 0.0,
        condition_dropout: DropRate = 0.1,
        sampler: Sampler | None = None,
        tolerance: float = 1e-5,
    ):
        super().__init__(event, condition, condition_dropout)
        if not 0 <= ratio <= 1 or not 0 <= mixture < 1:
            raise ValueError(f"ratio must be in [0, 1] and mixture in [0, 1), not {ratio} and {mixture}")
        if power < 0 or offset <= 0 or guidance < 0 or tolerance <= 0:
            raise ValueError(
                f"power and guidance must be at least 0, offset and tolerance positive, not {power}, {guidance}, {offset} "
                f"and {tolerance}"
            )
        if guidance != 1 and not (condition and self.conditioner.learns_null):
            raise ValueError(
                f"guidance={guidance:g} needs a conditional model and dropped conditions: data.conditional=true "
                "model.condition_dropout=0.1"
            )
        self.conditions = Joint((Vector(1), condition) if condition else (Vector(1),), fixed=1)
        self.network = network(self.shape, self.shape, self.conditions)
        self.path = GaussianPath(CondOT())
        self.noise_levels = noise_levels or LogitNormalTime(-0.4, 1.0)
        self.ratio, self.power, self.offset = ratio, power, offset
        self.guidance, self.mixture = guidance, mixture
        self.sampler = sampler or Jump()
        self.rtol = self.atol = tolerance

    @property
    def ends(self) -> tuple[float, float]:
        """The times of data and noise; the velocity is finite at both."""
        return 0.0, 1.0

    def average_velocity(self, x_t: Tensor, r: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return u(x_t, r, t), (B, *shape).

        Args:
            x_t: states, (B, *shape).
            r, t: ends of the intervals, (B,).
            y: conditions, null values included; None for the null value.
        """
        duration = (t - r).to(x_t.dtype)[:, None]
        if self.condition is None:
            return call_network(self.network, x_t, TIME_SCALE * t, duration)
        y = self.condition.missing(len(x_t), x_t.device, x_t.dtype) if y is None else y
        return call_network(self.network, x_t, TIME_SCALE * t, self.conditions.join(duration, y))

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        t = t if t.ndim else t.expand(len(x_t))
        return Prediction("velocity", self.average_velocity(x_t, t, t, y))

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return x_t - expand(t - s, x_t) * self.average_velocity(x_t, s, t, y)

    def to_data(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.jump(x_t, t, torch.zeros_like(t), y)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        y = self.conditioner.drop(y, rng)
        r, t = self._times(len(x), rng, x.device)
        eps = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
        x_t = self.path.sample(x, eps, t)
        v = self._guided(eps - x, x_t, t, y)
        u, du_dt = self._along_trajectory(x_t, r, t, y, v)
        target = (v - expand(t - r, x) * du_dt).detach()
        error = (u - target).square().flatten(1).sum(1)
        return Loss(self._adapted(error).mean(), {"mse": error.detach().mean() / self.dim})

    def _times(self, n: int, rng: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw r <= t, (n,) each."""
        first, second = (self.noise_levels.sample(n, self.path.schedule, rng, device) for _ in range(2))
        t = torch.maximum(first, second)
        apart = rand((n,), rng=rng, device=device, dtype=torch.float64) < self.ratio
        return torch.where(apart, torch.minimum(first, second), t), t

    @torch.no_grad()
    def _guided(self, v: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Return the velocity with guidance, which null conditions do not have, (B, *shape)."""
        if self.guidance == 1 or y is None or self.condition is None:
            return v
        s, k = self.guidance, self.mixture
        guided = s * (1 - k) * v + (1 - s) * (1 - k) * self.average_velocity(x_t, t, t)
        if k:
            guided = guided + k * self.average_velocity(x_t, t, t, y)
        return torch.where(self.condition.is_null(y).view(-1, *[1] * (v.ndim - 1)), v, guided)

    def _along_trajectory(
        self, x_t: Tensor, r: Tensor, t: Tensor, y: Tensor | None, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return u(x_t, r, t) and its derivative in t along the trajectory with the velocity v, (B, *shape) each."""

        def u(x_t: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return self.average_velocity(x_t, r, t, y)

        # Fused attention and autocast have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(x_t.device.type, enabled=False):
            value, derivative, *_ = torch.func.jvp(u, (x_t, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
        return value, derivative

    def _adapted(self, error: Tensor) -> Tensor:
        """Return phi of squared errors, (B,)."""
        shifted = error + self.offset
        return shifted.log() if self.power == 1 else shifted ** (1 - self.power) / (1 - self.power)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return self.sampler(self, n, y, rng)
