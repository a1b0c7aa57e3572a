"""Langevin dynamics and contrastive divergence against torchebm, with the same noise and the same chains, float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from genzoo.event import EventSpec
from genzoo.families.ebm import ebm
from genzoo.nn.mlp import MLP
from genzoo.numerics.random import generator


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_chains_and_the_loss_are_those_of_torchebm(temperature):
    """Their noise scale is the root of the temperature. Their penalty is that of whole energies: the reference is flat here."""
    core, losses = pytest.importorskip("torchebm.core"), pytest.importorskip("torchebm.losses")
    samplers, double = pytest.importorskip("torchebm.samplers"), torch.float64
    network = functools.partial(MLP, width=16, depth=1)
    ours = ebm(EventSpec((3,)), network=network, temperature=temperature, step_size=0.05, reference_std=1e6, steps=7)
    ours = ours.double()
    ours.restart = 0.0
    ours.chain_ages.fill_(1)
    ours.chains.normal_()

    class Energy(core.BaseModel):
        def forward(self, x):
            return ours.energy(x)

    energy = Energy(dtype=double)
    sampler = samplers.LangevinDynamics(energy, step_size=0.05, noise_scale=math.sqrt(temperature), dtype=double)
    theirs = losses.ContrastiveDivergence(energy, sampler, energy_reg_weight=ours.energy_penalty, dtype=double)

    x = torch.randn(20, 3, dtype=double)
    found = ours.loss(x, rng=generator("loss"))
    rng = generator("loss")
    start = ours.take(x, None, rng).x
    chains = sampler.sample(x=start.clone(), n_steps=7, generator=rng)
    torch.testing.assert_close(found.aux["chains"], chains, rtol=1e-10, atol=1e-10)
    expected = theirs.compute_loss(x, chains)
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, list(ours.parameters())) for loss in (found.total, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
