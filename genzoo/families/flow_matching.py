r"""Flow matching.

A velocity field moves noise to data. Along the straight path between a data point and a noise point (on this project's
clock: t = 0 is data, t = 1 is noise)

    x_t = (1 - t) x + t eps,      dx_t/dt = eps - x,

the field that transports the whole law is the mean velocity of all pairs that pass through a point,
``v(x_t, t) = E[dx_t/dt | x_t]``, and regression finds it:

    L = E_{t, x, eps} |v_theta(x_t, t) - (alpha' x + sigma' eps)|^2.

Sampling integrates ``dx/dt = v_theta`` from t = 1 to t = 0; latents and densities come from the same ODE, see
``genzoo.probability_flow``. Any Gaussian path will do: ``CondOT`` is the straight one, ``VPSchedule`` that of diffusion.

**Pairing.** Noise and data may be drawn independently, or paired so that paths cross less and the field is straighter: within
each batch by the assignment of least squared distance (optimal transport), or by a trained model's own ODE (**reflow**),
whose pairs ``(eps, x = ODE(eps))`` already lie on one trajectory. With either, eps depends on x: there is no score any more
and no stochastic sampler, while ODE samplers stay right. Samples of class y begin at p(eps) = N(0, I), so that the pairing
must leave p(eps | y) = N(0, I): a conditional model pairs within each class. Were classes mixed, the noise near a class's data
would be its own, and the noise of a class no normal law.

References:
    Lipman et al., "Flow Matching for Generative Modeling", 2023, https://arxiv.org/abs/2210.02747 (eq. 9, 20-23).
    Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", 2023,
    https://arxiv.org/abs/2209.03003 (eq. 1, algorithm 1).
    Tong et al., "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport", 2024,
    https://arxiv.org/abs/2302.00482 (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from genzoo.model import Denoiser, Loss, Samples, consult
from genzoo.prob import ranks
from genzoo.prob.noise_levels import NoiseLevels, UniformTime
from genzoo.prob.paths import GaussianPath, Prediction
from genzoo.prob.random import SampleStreams, rand, randint, randn
from genzoo.prob.schedules import CondOT, Schedule
from genzoo.probability_flow import ProbabilityFlow
from genzoo.samplers import AdaptiveODE, Heun, Sampler


def transport(x: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
    """Reorder noise so that the sum of squared distances to the data is least: (B, *shape), (B, *shape) -> (B, *shape).

    The data keep their order, and with it their classes. With classes ``y``, (B,), noise changes places within a class alone:
    which noise a class has then depends on the classes and not on the data, so that it is N(0, I) in each of them. Where
    ranks share a batch, noise changes places in all of it.
    """
    if ranks.world() > 1:
        eps = ranks.gather(eps.detach()).flatten(0, 1)
        y = None if y is None else ranks.gather(y).flatten()
    # Each rank computes its rows of the costs.
    rows = torch.cdist(x.detach().flatten(1).float(), eps.flatten(1).float()).square()
    cost = ranks.gather(rows).flatten(0, 1).cpu().numpy()
    if y is None:
        order = linear_sum_assignment(cost)[1]
    else:
        label = y.cpu().numpy()
        by_class = np.argsort(label, kind="stable")
        order = np.empty_like(by_class)
        for mine in np.split(by_class, np.flatnonzero(np.diff(label[by_class])) + 1):
            order[mine] = mine[linear_sum_assignment(cost[np.ix_(mine, mine)])[1]]
    return eps[torch.from_numpy(order).to(eps.device).chunk(ranks.world())[ranks.rank()]]


class FlowMatching(ProbabilityFlow):
    """A model of the velocity that moves noise to data.

    Args:
        network: builds the network, called as ``network(in_shape, out_shape, num_classes)``, for ``(x_t, t, y)``.
        shape, levels, num_classes: of the data, as in ``GenerativeModel``.
        schedule: of the path; the straight one by default.
        pairing: "independent", or "optimal_transport" within each batch, and within each class of a conditional model. Where
            ranks share a batch, all of it is paired.
        teacher: a trained model whose pairs are learned instead of the data's (reflow), or None.
        pool: how many pairs the teacher makes, once, before the first step; the data are not used then.
        noise_levels: law of the training times; uniform by default.
        label_dropout: how often training replaces a class by the null label, so that guidance can be used.
        sampler: draws the samples; Heun's method with 25 steps by default.
        tolerance: of the adaptive solver behind latents and densities, relative and absolute.

    Raises:
        ValueError: for a teacher that is no denoiser of the same data, has another prior, or draws noise on its way.
    """

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        levels: int | None = None,
        num_classes: int = 0,
        schedule: Schedule | None = None,
        pairing: Literal["independent", "optimal_transport"] = "independent",
        teacher: Denoiser | None = None,
        pool: int = 10_000,
        noise_levels: NoiseLevels | None = None,
        label_dropout: float = 0.1,
        sampler: Sampler | None = None,
        tolerance: float = 1e-5,
    ):
        super().__init__(shape, levels, num_classes)
        if pairing not in ("independent", "optimal_transport"):
            raise ValueError(f"pairing must be independent or optimal_transport, not {pairing!r}")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], not {label_dropout}")
        if tolerance <= 0 or pool < 1:
            raise ValueError(f"tolerance and pool must be positive, not {tolerance} and {pool}")
        self.network = network(self.shape, self.shape, num_classes)
        paired = pairing == "optimal_transport" or teacher is not None
        self.path = GaussianPath(schedule or CondOT(), independent=not paired)
        self.pairing, self.label_dropout = pairing, label_dropout
        self.noise_levels = noise_levels or UniformTime()
        self.sampler = sampler or Heun(steps=25)
        self.rtol = self.atol = tolerance
        self.pool = pool
        # In a tuple, which hides it: the teacher is no part of this model, neither of its weights nor of its checkpoints.
        self._teacher: tuple[Denoiser, ...] = () if teacher is None else (self._checked(teacher),)
        self._pairs: tuple[Tensor, ...] = ()

    def _checked(self, teacher: Denoiser) -> Denoiser:
        if not isinstance(teacher, Denoiser):
            raise ValueError(f"teacher: {type(teacher).__name__} has no ODE that could pair noise with data")
        ours, theirs = (self.shape, self.levels, self.num_classes), (teacher.shape, teacher.levels, teacher.num_classes)
        if ours != theirs:
            raise ValueError(f"teacher: models shape, levels, classes {theirs}, not {ours}")
        if teacher.path.schedule.prior_std != 1:
            raise ValueError(f"teacher: its noise has standard deviation {teacher.path.schedule.prior_std:g}, not 1")
        return teacher.eval().requires_grad_(False)

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        return Prediction("velocity", consult(self.network, x_t, t, y))

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, turn: str | None = None, rng: torch.Generator | None = None
    ) -> Loss:
        self.check_labels(y, len(x))
        if self._teacher:
            x, eps, y = self._rectified(len(x), x.dtype, rng)
        else:
            eps = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
            if self.pairing == "optimal_transport":
                eps = transport(x, eps, y)
        if y is not None:
            dropped = rand(y.shape, rng=rng, device=x.device) < self.label_dropout
            y = torch.where(dropped, self.num_classes, y)
        t = self.noise_levels.sample(len(x), self.path.schedule, rng, x.device)
        x_t = self.path.sample(x, eps, t)
        target = self.path.target("velocity", x, eps, t)
        mse = (self.predict(x_t, t, y).mean - target).square().mean()
        return Loss(mse, {"mse": mse.detach()})

    def _rectified(
        self, n: int, dtype: torch.dtype, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw pairs of the teacher's: data, noise and classes."""
        if not self._pairs:
            self._pairs = self._simulate()
        chosen = randint(self.pool, (n,), rng=rng, device=self.device)
        x, eps, *y = (part[chosen] for part in self._pairs)
        return x.to(dtype), eps.to(dtype), y[0] if y else None

    @torch.no_grad()
    def _simulate(self, chunk: int = 500) -> tuple[Tensor, ...]:
        """Follow the teacher's ODE from noise to data, for the whole pool; pair i depends on i alone."""
        teacher = self._teacher[0].to(device=self.device, dtype=self.dtype)
        parts = []
        for start in range(0, self.pool, chunk):
            rng = SampleStreams(0, range(start, min(start + chunk, self.pool)), device=self.device)
            n = len(rng.indices)
            y = self.draw_labels(n, None, rng)
            eps = randn((n, *self.shape), rng=rng, device=self.device, dtype=self.dtype)
            *_, (x, _) = AdaptiveODE(rtol=1e-4, atol=1e-4).states(teacher, eps, y, None)
            parts.append((x, eps) if y is None else (x, eps, y))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def sample(self, n: int, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Samples:
        return self.sampler(self, n, self.draw_labels(n, y, rng), rng)
