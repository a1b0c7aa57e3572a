"""Families so small that what training does to them is known in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genzoo.event import EventSpec
from genzoo.families.gan import gradient_penalty
from genzoo.model import Adversarial, GenerativeModel, Loss, Samples, Stage, Staged
from genzoo.nn.layers import BatchNorm2d
from genzoo.numerics.random import randn


class Toy(GenerativeModel):
    """What the toys share: they sample noise."""

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return Samples(randn((n, *self.shape), rng=rng, device=self.device, dtype=self.dtype), nfe=1)


class Mean(Toy):
    """The mean of the data: the loss |x - m|^2/2 has the gradient m - mean of the batch."""

    def __init__(self, event: EventSpec = EventSpec((2,)), start: float = 0.0):
        super().__init__(event)
        self.mean = nn.Parameter(torch.full(self.shape, start))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        fit = 0.5 * (x - self.mean).square().flatten(1).sum(1).mean()
        return Loss(fit, {"fit": fit.detach()})


class Jittered(Mean):
    """A mean that is told noisy data, half of which a dropout layer hides: both sources of a step's noise count."""

    def __init__(self, event: EventSpec = EventSpec((2,))):
        super().__init__(event)
        self.dropout = nn.Dropout(0.5)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        return super()._loss(self.dropout(x + randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)), y, rng)


class Duel(Toy, Adversarial):
    """A mean, and a critic that moves once in every three steps; either loss depends on both."""

    def __init__(self, event: EventSpec = EventSpec((2,))):
        super().__init__(event)
        self.generator, self.critic = nn.Linear(2, 2), nn.Linear(2, 1)

    def networks(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}

    def turn(self, step: int) -> str:
        return "critic" if step % 3 == 2 else "generator"

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None, turn: str = "") -> Loss:
        gap = (self.critic(x) - self.critic(self.generator(randn(x.shape, rng=rng)))).mean()
        total = gap if turn == "generator" else -gap
        return Loss(total, {str(turn): total.detach()})


class Relay(Toy, Staged):
    """Two linear maps, trained one after another; the second one's loss goes through the first, which must not move."""

    def __init__(self, event: EventSpec = EventSpec((2,)), shares: Sequence[float] = (0.25, 0.75)):
        super().__init__(event)
        self.shares = tuple(shares)
        self.first = Half(nn.Linear(2, 2))
        self.second = Half(nn.Linear(2, 2), before=[self.first.map])

    def stages(self) -> list[Stage]:
        return [Stage("first", self.first, self.shares[0]), Stage("second", self.second, self.shares[1])]

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        return self.second._loss(x, y, rng)


class Half(Toy):
    """One stage of a relay: a linear map after others that it does not own."""

    def __init__(self, linear: nn.Linear, before: Sequence[nn.Module] = ()):
        super().__init__(EventSpec((2,)))
        self.map = linear
        self.before = tuple(before)  # a tuple hides them from ``parameters()``

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        h = x
        for module in self.before:
            h = module(h)
        fit = (self.map(h) - x).square().mean()
        return Loss(fit, {"fit": fit.detach()})


class Steep(Toy):
    """A critic with batch norm whose slope is to be one: a loss that goes through the statistics of a batch twice."""

    def __init__(self, event: EventSpec = EventSpec((1, 4, 4))):
        super().__init__(event)
        self.critic = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(64, 1, bias=False)
        )

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        noise = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
        penalty = gradient_penalty(lambda x, y: self.critic(x), x, noise, y, noise[:, 0, 0, 0].sigmoid())
        return Loss(penalty, {"penalty": penalty.detach()})
