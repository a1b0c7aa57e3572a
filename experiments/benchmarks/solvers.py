"""Solvers of the ODE of flow matching: what a loop costs beside a network as small as can be, an affine map of each pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from run import Pair
from torch import Tensor, nn
from torchdiffeq import odeint

from genzoo.diffusion.samplers import AdaptiveODE, Euler, Heun, Sampler
from genzoo.families.flow_matching import FlowMatching
from genzoo.numerics.random import generator, randn

N, SHAPE, STEPS, TOLERANCE = 64, (1, 8, 8), 50, 1e-5
ENDS, GRID = torch.tensor([1.0, 0.0]), torch.linspace(1, 0, STEPS + 1)

Sample = Callable[[torch.Generator], tuple[Tensor, int]]


class Network(nn.Module):
    """The same for either side; without parameters, for to look them up takes as long as to use them."""

    def __init__(self, *_: Any):
        super().__init__()
        self.scale, self.shift = 3.0, torch.tensor(0.1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.add(self.shift, x, alpha=self.scale)


def by_genzoo(sampler: Sampler) -> Sample:
    model = FlowMatching(SHAPE, network=Network, sampler=sampler)

    def sample(rng: torch.Generator) -> tuple[Tensor, int]:
        x, nfe, _ = model.sample(N, rng=rng)
        return x, nfe

    return sample


def by_torchdiffeq(method: str, times: Tensor = ENDS, **options: Any) -> Sample:
    network, asked = Network(), 0

    def drift(t: Tensor, x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return network(x, t.expand(N))

    @torch.no_grad()
    def sample(rng: torch.Generator) -> tuple[Tensor, int]:
        nonlocal asked
        asked, x = 0, randn((N, *SHAPE), rng=rng)
        x = odeint(drift, x, times, method=method, **options)[-1]
        return x, asked

    return sample


def euler() -> tuple[Sample, ...]:
    """Both ways of Euler's method; theirs is given the times, as most who sample with it do."""
    return by_genzoo(Euler(STEPS)), by_torchdiffeq("euler", GRID)


def euler_by_size() -> tuple[Sample, ...]:
    """Both ways of Euler's method; theirs is given the ends and the size of a step."""
    return by_genzoo(Euler(STEPS)), by_torchdiffeq("euler", options={"step_size": 1 / STEPS})


def heun() -> tuple[Sample, ...]:
    """Both ways of Heun's method, on a grid of times."""
    return by_genzoo(Heun(STEPS)), by_torchdiffeq("heun2", GRID)


def heun_by_size() -> tuple[Sample, ...]:
    """Both ways of Heun's method, by the size of a step."""
    return by_genzoo(Heun(STEPS)), by_torchdiffeq("heun2", options={"step_size": 1 / STEPS})


def dopri5() -> tuple[Sample, ...]:
    """Both ways of Dormand and Prince's method; theirs takes one step for the whole batch, ours a step for each sample."""
    ours = by_genzoo(AdaptiveODE(TOLERANCE, TOLERANCE))
    return ours, by_torchdiffeq("dopri5", rtol=TOLERANCE, atol=TOLERANCE)


def side(both: Callable[[], tuple[Sample, ...]], which: int) -> Callable[[], Any]:
    """Set up one side; from equal noise it must arrive where the other arrives, with about as many evaluations."""

    def build() -> Callable[[], Any]:
        (ours, n), (theirs, m) = (way(generator("noise")) for way in both())
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4), both
        assert n == m or (both is dopri5 and n <= 1.2 * m), f"{n} evaluations against {m}"
        way, rng = both()[which], generator("bench")
        return lambda: way(rng)

    return build


def pairs() -> Iterator[Pair]:
    """Two methods of fixed steps, told in both of torchdiffeq's ways, and an adaptive one."""
    for name, both, target in (
        ("Euler, a grid of times", euler, 4.0),
        ("Euler, a step size", euler_by_size, 4.0),
        ("Heun, a grid of times", heun, 3.0),
        ("Heun, a step size", heun_by_size, 3.0),
        ("dopri5", dopri5, 4.0),
    ):
        yield Pair(f"ODE loop, tiny network: {name}", "torchdiffeq", side(both, 0), side(both, 1), target)
