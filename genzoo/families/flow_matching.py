r"""Flow matching.

A velocity field transports noise to data. On the straight path between a data point, t = 0, and a noise point, t = 1,

    x_t = (1 - t) x + t eps,      dx_t/dt = eps - x,

the marginal velocity field is the conditional expectation ``v(x_t, t) = E[dx_t/dt | x_t]``, learned by regression:

    L = E_{t, x, eps} |v_theta(x_t, t) - (alpha' x + sigma' eps)|^2.

Sampling integrates ``dx/dt = v_theta`` from t = 1 to t = 0; latents and densities use the same ODE, see
``genzoo.diffusion.probability_flow``. Any Gaussian path applies: ``CondOT`` is the straight path, ``VPSchedule`` that of
diffusion.

**Coupling.** Noise and data are drawn independently, or coupled to reduce crossings and straighten the field: by minibatch
optimal transport, or by the ODE of a teacher (**reflow**), with pairs ``(eps, x = ODE(eps))`` simulated once, before the first
step. Under a coupling eps depends on x: the score and stochastic samplers are undefined, while ODE samplers stay valid.

Samples of class y start from p(eps) = N(0, I), so that the coupling must preserve p(eps | y) = N(0, I): a conditional model
couples within each class. A coupling across classes would assign to a class the noise near its data.

References:
    Lipman et al., "Flow Matching for Generative Modeling", 2023, https://arxiv.org/abs/2210.02747 (eq. 9, 20-23).
    Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", 2023,
    https://arxiv.org/abs/2209.03003 (eq. 1, algorithm 1).
    Tong et al., "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport", 2024,
    https://arxiv.org/abs/2302.00482 (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from genzoo.conditions import Condition, DropRate
from genzoo.diffusion.denoiser import Denoiser, call_network
from genzoo.diffusion.noise_levels import NoiseLevels, UniformTime
from genzoo.diffusion.path import GaussianPath, Prediction
from genzoo.diffusion.probability_flow import ProbabilityFlow
from genzoo.diffusion.samplers import AdaptiveODE, Heun, Sampler
from genzoo.diffusion.schedules import CondOT, Schedule
from genzoo.event import EventSpec
from genzoo.model import Loss, Precomputed, Samples
from genzoo.nn import defaults
from genzoo.numerics import distributed
from genzoo.numerics.random import SampleStreams, randint, randn


def minibatch_ot(x: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
    """Minibatch optimal transport: permute noise to minimise the sum of squared distances to the data, (B, *shape) each.

    The data keep their order. With conditions ``y``, (B, ...), whose distinct values are classes, noise is permuted within each
    class, which preserves p(eps | y) = N(0, I). In distributed training the global batch is permuted.
    """
    if distributed.world_size() > 1:
        eps = distributed.all_gather(eps.detach()).flatten(0, 1)
        y = None if y is None else distributed.all_gather(y).flatten(0, 1)
    # Each rank computes its rows of the cost matrix.
    rows = torch.cdist(x.detach().flatten(1).float(), eps.flatten(1).float()).square()
    cost = distributed.all_gather(rows).flatten(0, 1).cpu().numpy()
    if y is None:
        order = linear_sum_assignment(cost)[1]
    else:
        label = np.unique(y.cpu().numpy(), axis=0, return_inverse=True)[1].reshape(-1)
        by_class = np.argsort(label, kind="stable")
        order = np.empty_like(by_class)
        for mine in np.split(by_class, np.flatnonzero(np.diff(label[by_class])) + 1):
            order[mine] = mine[linear_sum_assignment(cost[np.ix_(mine, mine)])[1]]
    return eps[torch.from_numpy(order).to(eps.device).chunk(distributed.world_size())[distributed.rank()]]


CHUNK = 500  # pairs per ODE solve


class ReflowPairs:
    """Pairs of noise and data on the probability-flow trajectories of a teacher, for reflow.

    They are neither parameters nor buffers of the student, and are shared by its copies, such as the EMA.

    Args:
        teacher: the trained model.
        size: number of pairs.
    """

    def __init__(self, teacher: Denoiser, size: int):
        self.teacher, self.size = teacher.eval().requires_grad_(False), size
        self.tensors: dict[str, Tensor] = {}  # "x" and "eps", (size, *shape), and if conditional "y"

    def __deepcopy__(self, memo: dict[int, object]) -> ReflowPairs:
        return self

    @torch.no_grad()
    def simulate(self, model: FlowMatching, chunk: int = CHUNK) -> dict[str, Tensor]:
        """Solve the teacher's ODE from noise to data for all pairs, in chunks distributed over the ranks.

        Args:
            model: the student; provides device, dtype and distribution of conditions.
            chunk: pairs per solve; pair i depends on i alone, up to rounding.
        """
        device, dtype = model.device, model.dtype
        teacher = self.teacher.to(device=device, dtype=dtype)
        solver = AdaptiveODE(rtol=1e-4, atol=1e-4)
        tensors = {name: torch.empty(self.size, *model.shape, device=device, dtype=dtype) for name in ("x", "eps")}
        if model.condition is not None:
            tensors["y"] = model.condition.empty(self.size, device, dtype)
        chunks = [range(start, min(start + chunk, self.size)) for start in range(0, self.size, chunk)]
        for own in chunks[distributed.rank() :: distributed.world_size()]:
            rng, rows = SampleStreams(0, own, device=device), slice(own.start, own.stop)
            y = model.conditioner.draw(len(own), None, rng)
            eps = randn((len(own), *model.shape), rng=rng, device=device, dtype=dtype)
            *_, (x, _) = solver.iterate(teacher, eps, y, None)
            tensors["x"][rows], tensors["eps"][rows] = x, eps
            if y is not None:
                tensors["y"][rows] = y
        for i, part in enumerate(chunks if distributed.world_size() > 1 else []):
            for tensor in tensors.values():
                distributed.broadcast(tensor[part.start : part.stop], i % distributed.world_size())
        teacher.cpu()  # frees device memory
        return tensors


class FlowMatching(ProbabilityFlow, Precomputed):
    """A flow matching model.

    Args:
        network: factory of the velocity network, called as ``network(in_shape, out_shape, condition)``, for ``(x_t, t, y)``.
        event, condition: as in ``GenerativeModel``.
        schedule: of the path; ``CondOT`` by default.
        pairing: "independent", or "optimal_transport" within each batch, and within each class of a conditional model.
        teacher: for reflow, a trained model whose pairs replace the data; None to train on data.
        pool: number of pairs of the teacher.
        noise_levels: distribution of training times; uniform by default.
        condition_dropout: probability of replacing a condition by the null value, for classifier-free guidance; for several
            conditions also one for each.
        sampler: default sampler; Heun with 25 steps by default.
        tolerance: relative and absolute tolerance of the adaptive solver of latents and densities.

    Raises:
        ValueError: for a teacher that is not a denoiser of the same data with a standard normal prior.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.denoiser,
        schedule: Schedule | None = None,
        pairing: Literal["independent", "optimal_transport"] = "independent",
        teacher: Denoiser | None = None,
        pool: int = 10_000,
        noise_levels: NoiseLevels | None = None,
        condition_dropout: DropRate = 0.1,
        sampler: Sampler | None = None,
        tolerance: float = 1e-5,
    ):
        super().__init__(event, condition, condition_dropout)
        if pairing not in ("independent", "optimal_transport"):
            raise ValueError(f"pairing must be independent or optimal_transport, not {pairing!r}")
        if tolerance <= 0 or pool < 1:
            raise ValueError(f"tolerance and pool must be positive, not {tolerance} and {pool}")
        self.network = network(self.shape, self.shape, condition)
        paired = pairing == "optimal_transport" or teacher is not None
        self.path = GaussianPath(schedule or CondOT(), independent=not paired)
        self.pairing = pairing
        self.noise_levels = noise_levels or UniformTime()
        self.sampler = sampler or Heun(steps=25)
        self.rtol = self.atol = tolerance
        self.pairs = None if teacher is None else ReflowPairs(self._checked(teacher), pool)

    def _checked(self, teacher: Denoiser) -> Denoiser:
        if not isinstance(teacher, Denoiser):
            raise ValueError(f"teacher: {type(teacher).__name__} is not a denoiser and has no probability-flow ODE")
        if (self.event, self.condition) != (teacher.event, teacher.condition):
            raise ValueError(
                f"teacher: models {teacher.event} with condition {teacher.condition}, not {self.event} with {self.condition}"
            )
        if teacher.path.schedule.prior_std != 1:
            raise ValueError(f"teacher: its prior has standard deviation {teacher.path.schedule.prior_std:g}, not 1")
        return teacher

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        return Prediction("velocity", call_network(self.network, x_t, t, y))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        if self.pairs is not None:
            x, eps, y = self._draw_pairs(self.pairs, len(x), x.dtype, rng)
        else:
            eps = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
            if self.pairing == "optimal_transport":
                eps = minibatch_ot(x, eps, y)
        y = self.conditioner.drop(y, rng)
        t = self.noise_levels.sample(len(x), self.path.schedule, rng, x.device)
        x_t = self.path.sample(x, eps, t)
        target = self.path.target("velocity", x, eps, t)
        mse = (self.predict(x_t, t, y).mean - target).square().mean()
        return Loss(mse, {"mse": mse.detach()})

    def _draw_pairs(
        self, pairs: ReflowPairs, n: int, dtype: torch.dtype, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw data, noise and conditions from the teacher's pairs."""
        tensors = self.precompute()
        chosen = randint(pairs.size, (n,), rng=rng, device=self.device)
        drawn = {name: tensor[chosen] for name, tensor in tensors.items()}
        return drawn["x"].to(dtype), drawn["eps"].to(dtype), drawn.get("y")

    def precompute(self) -> dict[str, Tensor]:
        if self.pairs is None:
            return {}
        if not self.pairs.tensors:
            self.pairs.tensors = self.pairs.simulate(self)
        elif self.pairs.tensors["x"].device != self.device:
            self.pairs.tensors = {name: tensor.to(self.device) for name, tensor in self.pairs.tensors.items()}
        return self.pairs.tensors

    def precomputed_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.pairs is None:
            return {}
        n = self.pairs.size
        shapes = {"x": (n, *self.shape), "eps": (n, *self.shape)}
        return shapes if self.condition is None else {**shapes, "y": (n, *self.condition.shape)}

    def set_precomputed(self, tensors: Mapping[str, Tensor]) -> None:
        if self.pairs is not None:
            self.conditioner.check(tensors.get("y"), self.pairs.size)
            self.pairs.tensors = dict(tensors)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return self.sampler(self, n, y, rng)
