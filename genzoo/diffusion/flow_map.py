r"""Flow maps: solutions of the probability-flow ODE by one evaluation of a network.

The flow map ``X(x_t, t, s)`` carries a state at time t along the ODE ``dx/dt = v(x, t)`` to time s < t. For data N(mu, Sigma)
on a Gaussian path, with the mean ``m_t = alpha_t mu`` and the covariance ``C_t = alpha_t^2 Sigma + sigma_t^2 I``,

    X(x_t, t, s) = m_s + (C_s C_t^{-1})^{1/2} (x_t - m_t).

A **consistency function** maps to the data alone, ``f(x_t, t) = X(x_t, t, end)``; an anytime flow map reaches every s.
``genzoo.diffusion.samplers.Jump`` samples from both in one or few evaluations.

References:
    Song, Dhariwal, Chen, Sutskever, "Consistency Models", 2023, https://arxiv.org/abs/2303.01469 (definition 1).
    Kim et al., "Consistency Trajectory Models", 2024, https://arxiv.org/abs/2310.02279 (eq. 5).
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from genzoo.diffusion.denoiser import PathModel


class FlowMap(PathModel):
    """A map from any state of the probability-flow ODE to its end at the data."""

    @property
    def ends(self) -> tuple[float, float]:
        """The times of data and noise, between which it maps."""
        return self.path.schedule.t_min, self.path.schedule.t_max

    @abstractmethod
    def to_data(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Map states to the data, at ``ends[0]``.

        Args:
            x_t: states, (B, *shape).
            t: their times, (B,).
            y: conditions, (B, *condition.shape), null values included; None for the null value.
        """

    def estimate(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.to_data(x_t, t, y)


class AnytimeFlowMap(FlowMap):
    """A map from any state of the probability-flow ODE to any earlier time."""

    @abstractmethod
    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        """Map states to times s, (B,), at most t; other arguments as in ``to_data``."""
