r"""Consistency models: from noise to data in one evaluation, trained alone or from a finished denoiser.

A consistency function maps every point of a trajectory of the probability-flow ODE to its end at the data,

    f(x_t, t) = f(x_s, s)   for all x_t, x_s of one trajectory,      f(x, t_min) = x.

It is a step of Euler's method for the ODE of ``z = x/alpha`` in ``r = sigma/alpha``, from r_t to the smallest ratio r_min, by
an estimate D of the data that is trained to make the step exact, however long it is:

    f(x_t, t) = alpha_min ((r_min/r_t) x_t/alpha_t + (1 - r_min/r_t) D(x_t, t)).

The boundary condition holds for every D. Trained alone, D is preconditioned as by Karras et al., which is their
parameterization of consistency models up to terms of order ``r_min/sigma_data``. From a teacher, any denoiser on any path, D
starts as its estimate.

**Consistency training** compares two points that share data and noise, at neighbouring times s < t,

    L = E d(f_theta(x_t, t), sg f_theta(x_s, s)) / (r_t - r_s),      d(a, b) = sqrt(|a - b|^2 + c^2) - c,

with a stop-gradient on the target, the same weights and dropout in both, and times that approach each other during training
(``genzoo.diffusion.time_pairs``). Easy Consistency Tuning is this loss from the weights of a teacher.

**Consistency distillation** finds x_s by a step of Heun's method along the teacher's ODE from x_t instead of the data. The
teacher may be guided, ``u + s (c - u)``; samples are then guided at the cost of one evaluation.

For data N(mu, lambda), ``f(x_t, t) = m_min + sqrt(c_min/c_t) (x_t - m_t)`` with ``m = alpha mu``, ``c = alpha^2 lambda +
sigma^2``.

References:
    Song, Dhariwal, Chen, Sutskever, "Consistency Models", 2023, https://arxiv.org/abs/2303.01469 (algorithms 1-3).
    Song, Dhariwal, "Improved Techniques for Training Consistency Models", 2024, https://arxiv.org/abs/2310.14189.
    Geng et al., "Consistency Models Made Easy", 2024, https://arxiv.org/abs/2406.14548.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition, DropRate
from genzoo.diffusion.denoiser import Denoiser, call_network, replaced
from genzoo.diffusion.flow_map import FlowMap
from genzoo.diffusion.noise_levels import LogNormalRatio, NoiseLevels
from genzoo.diffusion.path import GaussianPath, cast_like, expand
from genzoo.diffusion.preconditioning import precondition
from genzoo.diffusion.samplers import Jump, Sampler
from genzoo.diffusion.samplers.sampler import initial_state
from genzoo.diffusion.schedules import EDMSchedule, Schedule
from genzoo.diffusion.time_pairs import GridPairs, TimePairs
from genzoo.event import EventSpec
from genzoo.model import Continuous, Decoder, Loss, Samples
from genzoo.nn import defaults
from genzoo.numerics.random import randn

HUBER = 0.00054  # c of the metric, times the root of the dimension (Song, Dhariwal 2024, section 3.3)


class Teacher:
    """A finished denoiser, which is no part of its student and shared by the student's copies, such as the EMA.

    Args:
        denoiser: the trained model, which is copied.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser = copy.deepcopy(denoiser).eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, object]) -> Teacher:
        return self

    def on(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the denoiser on a device and in a floating-point type."""
        if (self.denoiser.device, self.denoiser.dtype) != (device, dtype):
            self.denoiser.to(device=device, dtype=dtype)
        return self.denoiser


class Consistency(Decoder, FlowMap):
    """A consistency model.

    Args:
        network: factory of the network, called as ``network(in_shape, out_shape, condition)``, for ``(x_t, t, y)``.
        event, condition: as in ``GenerativeModel``.
        schedule: of the path; that of Karras et al. by default.
        sigma_data: standard deviation of the data, for the preconditioning.
        teacher: a trained denoiser, whose network, parameterization and path replace those above; None to train alone.
        objective: "training" on data, or "distillation" of the teacher's ODE.
        guidance: scale of the teacher's classifier-free guidance in distillation; 1 for none.
        noise_levels: distribution of training times; log-normal by default.
        time_pairs: neighbouring times; those of a grid that is refined by default.
        condition_dropout: probability of replacing a condition by the null value; for several conditions also one for each.
        sampler: default sampler; ``Jump`` in one step by default.

    Raises:
        ValueError: for a teacher that is not a denoiser of the same data, distillation without a teacher, and guidance of
            anything but a conditional teacher in distillation.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.denoiser,
        schedule: Schedule | None = None,
        sigma_data: float = 0.5,
        teacher: Denoiser | None = None,
        objective: Literal["training", "distillation"] = "training",
        guidance: float = 1.0,
        noise_levels: NoiseLevels | None = None,
        time_pairs: TimePairs | None = None,
        condition_dropout: DropRate = 0.1,
        sampler: Sampler | None = None,
    ):
        super().__init__(event, condition, condition_dropout)
        if objective not in ("training", "distillation"):
            raise ValueError(f"objective must be training or distillation, not {objective!r}")
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, not {sigma_data}")
        if objective == "distillation" and teacher is None:
            raise ValueError("objective=distillation needs a finished run: teacher=run teacher.run=DIR")
        if guidance != 1 and (objective != "distillation" or condition is None or not guidance >= 0):
            raise ValueError(
                f"guidance={guidance:g} is that of the teacher of a conditional model, at least 0: "
                "model.objective=distillation data.conditional=true teacher=run teacher.run=DIR"
            )
        self.teacher = None if teacher is None else Teacher(self._checked(teacher))
        self.network: nn.Module
        if self.teacher is None:
            self.network = network(self.shape, self.shape, condition)
            self.path = GaussianPath(schedule or EDMSchedule())
        else:
            finished: Any = self.teacher.denoiser
            self.network = copy.deepcopy(finished.network).requires_grad_(True).train()
            self.path = copy.deepcopy(finished.path)
        self.sigma_data, self.objective, self.guidance = sigma_data, objective, guidance
        self.noise_levels = noise_levels or LogNormalRatio(-1.1, 2.0)
        self.time_pairs = time_pairs or GridPairs()
        self.sampler = sampler or Jump()
        self.drops_out = any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.network.modules())

    def _checked(self, teacher: Denoiser) -> Denoiser:
        if not isinstance(teacher, Denoiser) or not isinstance(getattr(teacher, "network", None), nn.Module):
            raise ValueError(
                f"teacher: {type(teacher).__name__} is no denoiser with a network: choose ddpm or score_sde"
            )
        if (self.event, self.condition) != (teacher.event, teacher.condition):
            raise ValueError(
                f"teacher: models {teacher.event} with condition {teacher.condition}, not {self.event} with {self.condition}"
            )
        if not teacher.path.independent:
            raise ValueError(
                "teacher: was trained on coupled noise and data, and has another ODE than independent pairs"
            )
        return teacher

    @property
    def latent(self) -> Continuous:  # type: ignore[override]
        """Standard normal noise of the data's shape."""
        return Continuous(self.shape)

    def to_data(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c = self.path.schedule.at(t)
        first = self.path.schedule.at(torch.full((), self.ends[0], dtype=torch.float64, device=t.device))
        kept = (first.sigma / first.alpha) * c.alpha / c.sigma
        of_x_t, of_x0 = expand(kept * first.alpha / c.alpha, x_t), expand((1 - kept) * first.alpha, x_t)
        return of_x_t * x_t + of_x0 * self._x0(x_t, t, y)

    def _x0(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Return D(x_t, t), (B, *shape)."""
        if self.teacher is not None:
            student: Any = replaced(self.teacher.on(x_t.device, x_t.dtype), network=self.network, path=self.path)
            return cast_like(self.path.convert(student.predict(x_t, t, y), x_t, t, "x0"), x_t)
        c_skip, c_out, c_in = precondition(self.path.schedule, x_t, t, self.sigma_data)
        return c_skip * x_t + c_out * call_network(self.network, c_in * x_t, t, y)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        y = self.conditioner.drop(y, rng)
        schedule = self.path.schedule
        t, s = self.time_pairs.pair(self.noise_levels.sample(len(x), schedule, rng, x.device), schedule)
        eps = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
        x_t = self.path.sample(x, eps, t)
        x_s = self.path.sample(x, eps, s) if self.objective == "training" else self._taught(x_t, t, s, y)
        with torch.no_grad(), self._same_dropout(x.device):
            target = self.to_data(x_s, s, y)
        error = (self.to_data(x_t, t, y) - target).square().flatten(1).sum(1)
        c = HUBER * math.sqrt(self.dim)
        distance = torch.sqrt(error + c**2) - c
        gap = (schedule.ratio(t) - schedule.ratio(s)).to(x.dtype)
        return Loss((distance / gap).mean(), {"mse": error.detach().mean() / self.dim})

    @torch.no_grad()
    def _taught(self, x_t: Tensor, t: Tensor, s: Tensor, y: Tensor | None) -> Tensor:
        """Return x_s, by a step of Heun's method in r along the teacher's ODE."""
        alpha_t, alpha_s = (expand(self.path.schedule.at(time).alpha, x_t) for time in (t, s))
        step = expand(self.path.schedule.ratio(s) - self.path.schedule.ratio(t), x_t)
        z, slope = x_t / alpha_t, self._slope(x_t, t, y)
        ahead = self._slope(alpha_s * (z + step * slope), s, y)
        return alpha_s * (z + step * (slope + ahead) / 2)

    def _slope(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Return dz/dr = E[eps | x_t] of the guided teacher."""
        assert self.teacher is not None
        teacher = self.teacher.on(x_t.device, x_t.dtype)
        eps = self.path.convert(teacher.predict(x_t, t, y), x_t, t, "eps")
        if self.guidance == 1:
            return eps
        free = self.path.convert(teacher.predict(x_t, t, None), x_t, t, "eps")
        return free + self.guidance * (eps - free)

    def _same_dropout(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Restore torch's global generators afterwards, so that the next evaluation has the same dropout."""
        if not self.drops_out or not self.training:
            return contextlib.nullcontext()
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self.time_pairs.count(batch_size)
        return {}

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        x = self._decode_smooth(z, y)
        return x if self.levels is None else x.clamp(-1, 1)

    def _decode_smooth(self, z: Tensor, y: Tensor | None) -> Tensor:
        noise = self.ends[1]
        t = torch.full((len(z),), noise, dtype=torch.float64, device=z.device)
        return self.to_data(initial_state(self.path.schedule, z, noise), t, y)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return self.sampler(self, n, y, rng)  # type: ignore[arg-type]
