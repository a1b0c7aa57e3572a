"""The logit against the Jacobian of autograd and the law that it must give uniform data; the KL against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from genzoo.distributions.divergences import kl_normal
from genzoo.distributions.transforms import Logit


@pytest.mark.parametrize("margin", [0.05, 1e-6, 0.3])
def test_log_det_of_the_logit_is_that_of_its_jacobian(margin):
    logit = Logit(margin)
    x = (2 * torch.rand(4, 1, 3, 2, dtype=torch.float64) - 1) * 0.999
    log_det = logit(x)[1]
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda one: logit(one[None])[0].flatten(), x[i]).view(6, 6)
        assert float(log_det[i]) == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-10)


@pytest.mark.parametrize("margin", [0.05, 1e-6, 0.3])
def test_the_logit_comes_back(margin):
    logit = Logit(margin)
    x = torch.linspace(-1, 1, 101, dtype=torch.float64).view(-1, 1)
    torch.testing.assert_close(logit.inverse(logit(x)[0]), x, atol=1e-9, rtol=0)
    z = torch.linspace(-9, 9, 101, dtype=torch.float64).view(-1, 1)
    inside = logit.inverse(z).abs() <= 1
    torch.testing.assert_close(logit(logit.inverse(z))[0][inside], z[inside], atol=1e-9, rtol=0)


def test_the_ends_of_the_interval_go_to_the_logits_of_the_margin():
    z = Logit(0.05)(torch.tensor([[-1.0], [0.0], [1.0]]).double())[0].flatten()
    torch.testing.assert_close(z, torch.tensor([-1.0, 0.0, 1.0]).double() * math.log(19), atol=1e-9, rtol=0)


@pytest.mark.parametrize("margin", [0.0, 0.5, -1.0])
def test_a_margin_leaves_some_room(margin):
    with pytest.raises(ValueError, match="margin"):
        Logit(margin)


def test_kl_of_normal_laws_is_torchs():
    mean_q, log_var_q, mean_p, log_var_p = 2 * torch.randn(4, 100, dtype=torch.float64)
    q, p = Normal(mean_q, (0.5 * log_var_q).exp()), Normal(mean_p, (0.5 * log_var_p).exp())
    torch.testing.assert_close(
        kl_normal(mean_q, log_var_q, mean_p, log_var_p), kl_divergence(q, p), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(kl_normal(mean_q, log_var_q), kl_divergence(q, Normal(0.0, 1.0)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        kl_normal(mean_q, log_var_q, 1.5, -2.0), kl_divergence(q, Normal(1.5, math.exp(-1.0))), rtol=1e-5, atol=1e-5
    )


def test_kl_of_a_law_from_itself_is_zero():
    mean, log_var = torch.randn(2, 50, dtype=torch.float64)
    assert torch.equal(kl_normal(mean, log_var, mean, log_var), torch.zeros(50).double())
