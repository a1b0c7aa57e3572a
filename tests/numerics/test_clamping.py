"""A clamp with the gradient of projected descent."""

from __future__ import annotations

import pytest
import torch

from genzoo.numerics.clamping import projected_clamp

X = torch.tensor([-3.0, -1.0, 0.5, 2.0, 7.0])


def test_the_value_is_that_of_a_clamp():
    assert torch.equal(projected_clamp(X, -1, 2), X.clamp(-1, 2))
    assert torch.equal(projected_clamp(X, -1), X.clamp(min=-1))


@pytest.mark.parametrize(("sign", "kept"), [(1, [0, 0, 1, 1, 1]), (-1, [1, 1, 1, 0, 0])])
def test_the_gradient_is_dropped_where_it_leads_further_out_alone(sign, kept):
    x = X.clone().requires_grad_()
    (sign * projected_clamp(x, -1, 2)).sum().backward()
    assert torch.equal(x.grad, sign * torch.tensor(kept))


@pytest.mark.parametrize("start", [-30.0, 40.0])
def test_descent_comes_back_from_beyond_the_bounds(start):
    x = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.4)
    for _ in range(200):
        optimizer.zero_grad()
        (projected_clamp(x, -1, 2) - 0.3).square().backward()
        optimizer.step()
    assert float(x.detach()) == pytest.approx(0.3, abs=1e-4)
