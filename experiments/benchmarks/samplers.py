"""Samplers of diffusion: what a loop costs beside a network as small as can be, an affine map of each pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from run import Pair
from torch import Tensor, nn

from genzoo.diffusion.samplers import DDIM, Ancestral, DPMSolver
from genzoo.diffusion.samplers.chain import ChainSampler
from genzoo.families.ddpm import DDPM

N, SHAPE, T = 64, (1, 8, 8), 1000


class Network(nn.Module):
    """The same for either side; without parameters, for to look them up takes as long as to use them."""

    def __init__(self, *_: Any):
        super().__init__()
        self.scale, self.shift = 0.7, torch.tensor(0.1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.add(self.shift, x, alpha=self.scale)


Sample = Callable[[torch.Generator], Tensor]


def by_genzoo(sampler: ChainSampler) -> Sample:
    model = DDPM(SHAPE, network=Network, levels=256, sampler=sampler)
    return lambda rng: model.sample(N, rng=rng).x


def by_diffusers(scheduler: Any, timesteps: dict[str, Any], **options: Any) -> Sample:
    """Sample as the pipelines do."""
    network = Network()

    @torch.no_grad()
    def sample(rng: torch.Generator) -> Tensor:
        x = torch.randn((N, *SHAPE), generator=rng)
        scheduler.set_timesteps(**timesteps)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(N)), t, x, generator=rng, **options).prev_sample
        return x

    return sample


def ancestral() -> tuple[Sample, Sample]:
    """Both ways of DDPM's whole chain."""
    theirs = diffusers.DDPMScheduler(T, variance_type="fixed_large")
    return by_genzoo(Ancestral()), by_diffusers(theirs, {"num_inference_steps": T})


def ddim() -> tuple[Sample, Sample]:
    """Both ways of DDIM, with the noise computed anew from the clipped data."""
    theirs = diffusers.DDIMScheduler(T)
    return by_genzoo(DDIM(50)), by_diffusers(theirs, {"num_inference_steps": 50}, use_clipped_model_output=True)


def dpm_solver() -> tuple[Sample, Sample]:
    """Both ways of DPM-Solver++(2M); its scheduler spreads no 20 times as DDIM does, and is told them."""
    theirs = diffusers.DPMSolverMultistepScheduler(T, final_sigmas_type="zero")
    ours = by_genzoo(DPMSolver(20, rho=None, clip=False))
    return ours, by_diffusers(theirs, {"timesteps": list(range(T - T // 20, -1, -T // 20))})


def side(both: Callable[[], tuple[Sample, Sample]], which: int) -> Callable[[], Callable[[], Tensor]]:
    """Set up one side; from equal noise it must make what the other makes."""

    def build() -> Callable[[], Tensor]:
        ours, theirs = (way(torch.Generator().manual_seed(0)) for way in both())
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max())), (
            both
        )  # tables of theirs are in float32
        way, rng = both()[which], torch.Generator().manual_seed(1)
        return lambda: way(rng)

    return build


def pairs() -> Iterator[Pair]:
    """The three samplers of diffusion that both have."""
    for name, both, target in (
        ("DDPM, 1000 steps", ancestral, 1.6),
        ("DDIM, 50 steps", ddim, 3.5),
        ("DPM-Solver++(2M), 20 steps", dpm_solver, 5.0),
    ):
        yield Pair(f"sampler loop, tiny network: {name}", "diffusers", side(both, 0), side(both, 1), target)
