"""Sampling paths: the states of a sampler from noise to data, and the denoiser's estimates of the data along them.

``RecordingSampler`` is a sampler that keeps the states of another one. The path of a model is recorded while the model samples,
so that its last state equals the sample bit for bit, for any sampler and any denoiser that the model places around itself.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (figure 6: estimates
    of the data along a trajectory).
    Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, https://arxiv.org/abs/2202.00512
    (section 4: the angle arctan(sigma/alpha)).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser, PathModel, path_model
from genzoo.diffusion.guidance import GuidedSampler
from genzoo.diffusion.samplers.sampler import Sampler, Trajectory
from genzoo.model import AbilityError, Composite, GenerativeModel


class SamplingPath(NamedTuple):
    """States of a sampler, from noise to data."""

    x: Tensor  # (frames, n, *shape); the last is the sample
    times: list[float]  # of the frames, in [0, 1], the last is 0
    noise: list[float]  # noise-to-data ratio sigma/alpha of the frames; infinite at pure noise
    nfe: int  # network evaluations per sample, without those of the estimates
    estimate: Tensor | None = None  # E[x | x_t] of the frames, (frames, n, *shape), if requested


def frame_indices(noise: Sequence[float], frames: int | None) -> list[int]:
    """Choose ``frames`` states, as evenly as possible in the angle arctan(sigma/alpha), with the first and the last.

    The angle of a variance-preserving path, ``alpha = cos, sigma = sin``, changes as fast as the image does; most steps of a
    diffusion sampler are spent on states that are almost pure noise or almost data.

    Args:
        noise: sigma/alpha of all states, decreasing.
        frames: number of states; None, or at least as many as there are, for all.

    Raises:
        ValueError: for fewer than 2 frames.
    """
    count = len(noise)
    if frames is not None and frames < 2:
        raise ValueError(f"frames must be at least 2, the noise and the sample, not {frames}")
    if frames is None or frames >= count:
        return list(range(count))
    angles = [math.atan(ratio) for ratio in noise]
    chosen = [0]
    for k in range(1, frames):
        wanted = angles[0] + (angles[-1] - angles[0]) * k / (frames - 1)
        room = range(chosen[-1] + 1, count - (frames - 1 - k))  # leaves one state for each later frame
        chosen.append(min(room, key=lambda i: abs(angles[i] - wanted)))
    chosen[-1] = count - 1
    return chosen


class RecordingSampler(Sampler):
    """A sampler that records the states of another one, without changing them.

    Args:
        sampler: any sampler whose times are known.
        frames: number of recorded states, see ``frame_indices``.
        estimate: whether to record estimates of the data too, by one further evaluation per frame.

    Attributes:
        states: recorded states of the last call, (n, *shape) each.
        estimates: recorded estimates of the last call.
        times: of the recorded states.
        noise: sigma/alpha of the recorded states.
    """

    def __init__(self, sampler: Sampler, frames: int | None = None, estimate: bool = False):
        super().__init__(sampler.steps, sampler.clip)
        self.stochastic, self.evaluates = sampler.stochastic, sampler.evaluates
        self.sampler, self.frames, self.estimate = sampler, frames, estimate
        self.states: list[Tensor] = []
        self.estimates: list[Tensor] = []
        self.times: list[float] = []
        self.noise: list[float] = []

    def state_times(self, denoiser: Denoiser) -> list[float] | None:
        return self.sampler.state_times(denoiser)

    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        times = self.sampler.state_times(denoiser)
        if times is None:
            raise AbilityError(
                f"{type(self.sampler).__name__} has no time grid that all samples share: choose another sampler, such as heun"
            )
        ratios = denoiser.path.schedule.ratio(torch.tensor(times, dtype=torch.float64)).tolist()
        chosen = frame_indices(ratios, self.frames)
        self.states, self.estimates = [], []
        self.times, self.noise = [times[i] for i in chosen], [ratios[i] for i in chosen]
        for i, (x, nfe) in enumerate(self.sampler.iterate(denoiser, noise, y, rng)):
            if i in chosen:
                self.states.append(x.clone())
                if self.estimate:
                    self.estimates.append(self._estimate(denoiser, x, times[i], y))
            yield x, nfe

    def _estimate(self, denoiser: Denoiser, x_t: Tensor, t: float, y: Tensor | None) -> Tensor:
        """Estimate the data at a state; the last state is its own estimate."""
        if t == 0:
            return x_t.clone()
        x0 = denoiser.estimate(x_t, torch.full((len(x_t),), t, dtype=torch.float64, device=x_t.device), y)
        return x0.clamp(-1, 1) if self.clip and denoiser.event.levels is not None else x0


def path_denoiser(model: GenerativeModel | PathModel) -> PathModel:
    """Return the denoiser or flow map along whose path a model samples.

    Raises:
        AbilityError: for a model that samples in one pass.
    """
    found = path_model(model) if isinstance(model, GenerativeModel) else model
    if found is None:
        family = type(getattr(model, "prior", model)).__name__
        raise AbilityError(
            f"{family} samples in one pass and has no sampling path: choose ddpm, score_sde, flow_matching, or latent with "
            "one of them as its prior"
        )
    return found


@contextlib.contextmanager
def _replaced(denoiser: Any, sampler: Sampler) -> Iterator[None]:
    before, denoiser.sampler = denoiser.sampler, sampler
    try:
        yield
    finally:
        denoiser.sampler = before


@torch.no_grad()
def trajectory(
    model: GenerativeModel,
    n: int,
    y: Tensor | None = None,
    *,
    frames: int | None = None,
    estimate: bool = False,
    rng: torch.Generator | None = None,
) -> SamplingPath:
    """Draw samples and return the states of the sampler; the samples equal ``model.sample(n, y, rng=rng).x``.

    The states of a latent model are those of its prior, decoded.

    Args:
        model: a denoiser, or a latent model whose prior is one.
        n: number of samples.
        y: conditions, (n, *condition.shape); None to draw them from the training distribution.
        frames: number of states, evenly spaced, with the first and the last; None for all.
        estimate: whether to return estimates of the data too.
        rng: source of randomness.

    Raises:
        AbilityError: for a model that samples in one pass, and for a sampler whose steps differ between samples.
        ValueError: for fewer than 2 frames.
    """
    denoiser: Any = path_denoiser(model)
    own = denoiser.sampler
    guidance = own.guidance if isinstance(own, GuidedSampler) else None
    recorder = RecordingSampler(own.sampler if isinstance(own, GuidedSampler) else own, frames, estimate)
    y = model.conditioner.draw(n, y, rng)
    with _replaced(denoiser, GuidedSampler(recorder, guidance) if guidance else recorder):
        x, nfe, _ = model.sample(n, y, rng=rng)

    def events(states: list[Tensor]) -> Tensor:
        return torch.stack([*(_to_events(model, state, y, rng) for state in states[:-1]), x])

    estimates = events(recorder.estimates) if estimate else None
    return SamplingPath(events(recorder.states), recorder.times, recorder.noise, nfe, estimates)


def _to_events(model: GenerativeModel, state: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
    """Map a state of the innermost prior to an event of the model."""
    if not isinstance(model, Composite):
        return state
    return model.from_prior(_to_events(model.prior, state, y, rng), y, rng)
