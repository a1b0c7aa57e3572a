"""The logit against the Jacobian of autograd and the law that it must give uniform data; divergences against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from genzoo.distributions.divergences import kl_normal, squared_mmd
from genzoo.distributions.transforms import Logit
from genzoo.numerics.random import generator


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


@pytest.mark.parametrize("equal", [True, False])
def test_the_discrepancy_of_normal_laws_is_its_closed_form_in_the_mean(equal):
    """E k(a, b) = det(I + (S1 + S2)/l^2)^(-1/2) exp(-d'(l^2 I + S1 + S2)^-1 d/2) for a ~ N(m1, S1), b ~ N(m2, S2)."""
    rng, length = generator("mmd"), 1.3
    roots = [torch.eye(2).double(), torch.tensor([[1.5, 0.0], [0.4, 0.7]]).double()]
    means = [torch.zeros(2).double(), torch.tensor([0.8, -0.3]).double()]
    if equal:
        roots[1], means[1] = roots[0], means[0]

    def expected(i: int, j: int) -> float:
        spread, d = roots[i] @ roots[i].T + roots[j] @ roots[j].T, means[i] - means[j]
        eye = torch.eye(2).double()
        quadratic = d @ torch.linalg.solve(length**2 * eye + spread, d)
        return float(torch.linalg.det(eye + spread / length**2) ** -0.5 * torch.exp(-quadratic / 2))

    def draw(i: int, n: int) -> Tensor:
        return means[i] + torch.randn(n, 2, generator=rng).double() @ roots[i].T

    values = torch.stack([squared_mmd(draw(0, 20), draw(1, 25), length) for _ in range(3000)])
    closed = expected(0, 0) + expected(1, 1) - 2 * expected(0, 1)
    assert (closed < 1e-12) == equal
    assert float(values.mean()) == pytest.approx(closed, abs=4 * float(values.std()) / math.sqrt(3000))
    one = squared_mmd(draw(0, 1), draw(1, 1), length)
    assert bool(one.isfinite())
