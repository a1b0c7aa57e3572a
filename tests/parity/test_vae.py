"""Divergences and draws of diagonal normal laws against diffusers' own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from genzoo.distributions.bounds import RateCost
from genzoo.distributions.divergences import kl_normal
from genzoo.families.hvae import Layer, Normal


def laws(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and log variances of n laws of 3x4x4 latents."""
    return torch.randn(n, 3, 4, 4).double(), torch.randn(n, 3, 4, 4).double()


def test_divergences_from_the_standard_normal_law():
    mean, log_var = laws()
    reference = DiagonalGaussianDistribution(torch.cat([mean, log_var], 1)).kl()
    divergence = kl_normal(mean, log_var)
    torch.testing.assert_close(divergence.flatten(1).sum(1), reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(RateCost()(divergence), reference.mean(), rtol=1e-12, atol=0)


def test_divergences_of_a_layer_from_its_learned_prior():
    q, p = laws(), laws()
    reference = DiagonalGaussianDistribution(torch.cat(q, 1)).kl(DiagonalGaussianDistribution(torch.cat(p, 1)))
    layer = Layer(Normal(p[0], 0.5 * p[1]), Normal(q[0], 0.5 * q[1]), q[0])
    torch.testing.assert_close(layer.divergence().flatten(1).sum(1), reference, rtol=1e-12, atol=0)


def test_densities_up_to_the_constant():
    mean, log_var = laws()
    z = torch.randn_like(mean)
    reference = -DiagonalGaussianDistribution(torch.cat([mean, log_var], 1)).nll(z, dims=[1, 2, 3])
    constant = 0.5 * mean[0].numel() * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    ours = Normal(mean, 0.5 * log_var).log_prob(z) - constant
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=0)
