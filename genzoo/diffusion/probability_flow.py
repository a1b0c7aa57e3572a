r"""The probability-flow ODE: a deterministic, invertible map between data and noise.

The marginals of ``x_t = alpha(t) x + sigma(t) eps`` satisfy the continuity equation with the velocity
``v(x, t) = E[dx_t/dt | x_t]``. The flow of ``dx/dt = v(x, t)`` from data to noise is invertible, and the instantaneous change
of variables gives the density:

    log p(x_0) = log p_1(x_1) + int_0^1 div v(x_t, t) dt.

**Coordinates.** If ``v`` is finite at both ends (the straight path of flow matching) the ODE is integrated in time. Otherwise
it is integrated in the ratio ``r = sigma/alpha`` for ``z = x/alpha``, in which every schedule gives the same smooth equation,

    dz/dr = E[eps | x_t],

whose Euler steps are those of DDIM. It runs from ``r(t_min)``, close to data, to ``r(t_max)``. The ratio spans five orders of
magnitude, and the length scale of z is proportional to r: for Gaussian data of variance lambda ``z ~ sqrt(lambda + r^2)``, with
branch points at ``r = +- i sqrt(lambda)``. The adaptive solver therefore integrates in log r, where they are at distance pi/2
from the real axis for every lambda, with steps of at most one. In r it would try steps of length r: most are rejected, and
those accepted by coincidence have errors of several hundred tolerances.

**Divergence.** Hutchinson's estimator is ``e^T (dv/dx) e`` with Rademacher noise ``e``, fixed along a solve; with at least as
many probes as dimensions the exact trace is computed instead.

References:
    Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456 (eq. 13, appendix D).
    Chen et al., "Neural Ordinary Differential Equations", 2018, https://arxiv.org/abs/1806.07366 (theorem 1).
    Grathwohl et al., "FFJORD", 2019, https://arxiv.org/abs/1810.01367 (eq. 7-8: the estimator and its fixed noise).
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364 (eq. 81: one equation for all schedules).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.ode_solvers import Drift, dopri5, rms
from genzoo.diffusion.path import Parameterization, batch_times, cast_like, expand
from genzoo.model import Bijective, Bound, Continuous, Density, LogProb
from genzoo.numerics.random import rand

TIME_STEP, LOG_RATIO_STEP = 0.2, 1.0  # longest steps of the adaptive solver


class ProbabilityFlowODE:
    """The ODE of a denoiser in its natural coordinates: ``u``, the time or the ratio, and the state ``z``.

    Args:
        denoiser: predicts the drift.
        y: conditions of the batch, (B, *condition.shape), or None.

    Attributes:
        nfe: network evaluations so far, per sample.
    """

    def __init__(self, denoiser: Denoiser, y: Tensor | None = None):
        self.denoiser, self.y = denoiser, y
        self.schedule = denoiser.path.schedule
        self.in_time = self.schedule.coordinates == "time"
        self.parameterization: Parameterization = "velocity" if self.in_time else "eps"  # dz/du
        self.nfe = 0
        self._points: dict[float, tuple[Tensor, float]] = {}  # cached times and scales by u

    def variable_at(self, t: float) -> float:
        """Return u at time t."""
        return t if self.in_time else float(self.schedule.ratio(torch.tensor(t, dtype=torch.float64)))

    def time(self, u: Tensor) -> Tensor:
        """Return the time at u, float64."""
        return u if self.in_time else self.schedule.time_of(u)

    def time_at(self, u: float) -> float:
        """Return the time at u, a float."""
        return u if self.in_time else float(self.time(torch.tensor(u, dtype=torch.float64)))

    @property
    def ends(self) -> tuple[float, float]:
        """The values of u at data and at noise."""
        s = self.schedule
        return (0.0, 1.0) if self.in_time else (self.variable_at(s.t_min), self.variable_at(s.t_max))

    def scales(self, grid: Sequence[float]) -> list[float]:
        """Return x/z at each value of u: alpha in the ratio, one in time."""
        return self._scales(self.time(torch.tensor(grid, dtype=torch.float64)))

    def _scales(self, t: Tensor) -> list[float]:
        return [1.0] * len(t) if self.in_time else self.schedule.at(t).alpha.tolist()

    def cache_grid(self, grid: Sequence[float], z: Tensor) -> list[float]:
        """Return the scales of a grid, and cache them with its times for drifts of states like ``z``, (B, *shape)."""
        t = self.time(torch.tensor(grid, dtype=torch.float64))
        scales = self._scales(t)
        self._points.update(zip(grid, zip(batch_times(t, z), scales, strict=True), strict=True))
        return scales

    def drift(self, u: Tensor | float, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return dz/du, for u a float or (B,), and z, (B, *shape), the batch or a subset of its rows."""
        y = self.y if self.y is None or rows is None else self.y[rows]
        scale: Tensor | float
        if isinstance(u, float):
            if u not in self._points:
                self.cache_grid([u], z)
            t, scale = self._points[u]
        else:
            t = self.time(u)
            scale = 1.0 if self.in_time else expand(self.schedule.at(t).alpha, z)
        drift, evaluations = self.denoiser.predict_as(self.parameterization, z if self.in_time else scale * z, t, y)
        self.nfe += evaluations
        return cast_like(drift, z)

    def solve(self, z: Tensor, start: float, stop: float, rtol: float, atol: float) -> Tensor:
        """Integrate from one value of u to another, with an adaptive step size per sample; a ratio must be positive."""
        return self._integrate(self.drift, z, start, stop, rtol, atol)

    def _integrate(
        self,
        drift: Drift,
        z: Tensor,
        start: float,
        stop: float,
        rtol: float,
        atol: float,
        norm: Callable[[Tensor], Tensor] = rms,
    ) -> Tensor:
        """Integrate dz/du in time or in the log ratio."""
        if self.in_time:
            return dopri5(drift, start, stop, z, rtol=rtol, atol=atol, norm=norm, max_step=TIME_STEP)[0]

        def of_logarithm(log_u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
            u = log_u.exp()
            return expand(u, z) * drift(u, z, rows)

        ends = math.log(start), math.log(stop)
        return dopri5(of_logarithm, *ends, z, rtol=rtol, atol=atol, norm=norm, max_step=LOG_RATIO_STEP)[0]

    def solve_with_divergence(
        self, z: Tensor, start: float, stop: float, probes: Tensor | None, rtol: float, atol: float
    ) -> tuple[Tensor, Tensor]:
        """Integrate the ODE together with its divergence.

        Args:
            z: initial states, (B, *shape).
            start, stop: limits of u.
            probes: Rademacher noise, (k, B, *shape), of k Hutchinson estimates; None for the exact trace.
            rtol, atol: of the solver.

        Returns:
            The final states, and the integrated divergences, (B, k), or (B, 1) for the exact trace.
        """
        shape, D = self.denoiser.event.shape, self.denoiser.event.dim

        def drift(u: Tensor, augmented: Tensor, rows: Tensor) -> Tensor:
            with torch.enable_grad():
                point = augmented[:, :D].reshape(-1, *shape).detach().requires_grad_()
                slope = self.drift(u, point, rows).flatten(1)
                along = self._jacobian_products(slope, point, None if probes is None else probes[:, rows].flatten(2))
            return torch.cat([slope, along], dim=1).detach()

        def norm(error: Tensor) -> Tensor:
            return torch.maximum(rms(error[:, :D]), rms(error[:, D:]))

        k = 1 if probes is None else len(probes)
        augmented = torch.cat([z.flatten(1), z.new_zeros(len(z), k)], dim=1)
        result = self._integrate(drift, augmented, start, stop, rtol, atol, norm)
        return result[:, :D].reshape(z.shape), result[:, D:]

    @staticmethod
    def _jacobian_products(slope: Tensor, point: Tensor, probes: Tensor | None) -> Tensor:
        """Return ``e^T J e`` of each probe, (n, k), or the trace of J, (n, 1)."""
        if probes is not None:
            products = [
                torch.autograd.grad(slope, point, probe, retain_graph=True)[0].flatten(1).mul(probe).sum(1)
                for probe in probes
            ]
            return torch.stack(products, dim=1)
        columns = [
            torch.autograd.grad(slope[:, i].sum(), point, retain_graph=True)[0].flatten(1)[:, i]
            for i in range(slope.shape[1])
        ]
        return torch.stack(columns, dim=1).sum(1, keepdim=True)


def _end_scales(ode: ProbabilityFlowODE) -> tuple[float, float]:
    """Return the ratios x/z at data and latent/z at noise."""
    at_data, at_noise = ode.scales(ode.ends)
    return at_data, at_noise / ode.schedule.prior_std


@torch.no_grad()
def ode_encode(
    denoiser: Denoiser, x: Tensor, y: Tensor | None = None, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """Map data to noise along the probability-flow ODE of any denoiser, (B, *shape) -> (B, *shape).

    The noise is divided by the standard deviation of the prior and is standard normal for data of the model. A step size per
    event makes the result independent of the batch, up to rounding.

    Args:
        denoiser: any denoiser.
        x: data, taken as the state at the first regular time of the schedule, ``t_min``.
        y: conditions, (B, *condition.shape), or None.
        rtol, atol: tolerances of the adaptive solver.
    """
    ode = ProbabilityFlowODE(denoiser, y)
    at_data, at_noise = _end_scales(ode)
    return at_noise * ode.solve(x / at_data, *ode.ends, rtol, atol)


@torch.no_grad()
def ode_decode(
    denoiser: Denoiser, z: Tensor, y: Tensor | None = None, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """Map standard normal noise to data, the inverse of ``ode_encode`` with the same arguments."""
    ode = ProbabilityFlowODE(denoiser, y)
    at_data, at_noise = _end_scales(ode)
    stop, start = ode.ends
    return at_data * ode.solve(z / at_noise, start, stop, rtol, atol)


class ProbabilityFlow(Density, Bijective, Denoiser):
    """A denoiser with the density and latents of its probability-flow ODE.

    The latent is the noise at the end of the path, divided by the standard deviation of the prior. ``rtol`` and ``atol`` are
    the tolerances of the adaptive solver.
    """

    bound = Bound.ESTIMATE
    rtol: float = 1e-5
    atol: float = 1e-5

    @property
    def latent(self) -> Continuous:  # type: ignore[override]
        """Standard normal noise of the data's shape."""
        return Continuous(self.shape)

    def _forward_and_log_det(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the latent and the log-determinant, by the exact trace: D vector-Jacobian products per evaluation."""
        z, log_det = self._forward(x, y, None)
        return z, log_det[:, 0]

    def _forward(self, x: Tensor, y: Tensor | None, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        ode = ProbabilityFlowODE(self, y)
        scale_start, scale_stop = _end_scales(ode)
        state, divergence = ode.solve_with_divergence(x / scale_start, *ode.ends, probes, self.rtol, self.atol)
        return state * scale_stop, divergence + self.dim * math.log(scale_stop / scale_start)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        return ode_encode(self, x, y, self.rtol, self.atol)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        return ode_decode(self, z, y, self.rtol, self.atol)

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Estimate the log density by one solve with ``num_samples`` Hutchinson probes.

        The standard error is that of the mean over probes, None for a single probe. With at least as many probes as
        dimensions the exact trace is cheaper, with a standard error of 0.
        """
        if num_samples >= self.dim:
            z, log_dets = self._forward(x, y, None)
            stderr: Tensor | None = torch.zeros_like(log_dets[:, 0])
        else:
            draws = [rand(x.shape, rng=rng, device=x.device, dtype=x.dtype) for _ in range(num_samples)]
            signs = torch.stack(draws).lt(0.5).to(x.dtype).mul(2).sub(1)
            z, log_dets = self._forward(x, y, signs)
            stderr = log_dets.std(1) / math.sqrt(num_samples) if num_samples > 1 else None
        log_prior = -0.5 * (z.flatten(1).square().sum(1) + self.dim * math.log(2 * math.pi))
        return LogProb(log_prior + log_dets.mean(1), stderr)
