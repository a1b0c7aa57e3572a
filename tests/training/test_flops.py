"""Operations, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genzoo.training.flops import count


@pytest.mark.parametrize("autocast", [False, True])
def test_matrices_and_convolutions_are_counted_by_hand(autocast):
    batch, width, side = 4, 8, 16
    linear, convolution = nn.Linear(width, width), nn.Conv2d(width, width, 3, padding=1)
    x, image = torch.randn(batch, width), torch.randn(batch, width, side, side, requires_grad=True)

    def work():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            linear(x).sum().backward()
            convolution(image).sum().backward()

    by_linear = 2 * 2 * batch * width * width  # forward, and the gradient of the weights alone
    by_convolution = 3 * 2 * batch * width * width * 9 * side * side
    assert count(work) == by_linear + by_convolution


def test_attention_is_counted_as_its_two_products():
    q = torch.randn(2, 3, 16, 8)
    with torch.no_grad():
        found = count(lambda: F.scaled_dot_product_attention(q, q, q))
    assert found == 2 * (2 * 2 * 3 * 16 * 16 * 8)
    q.requires_grad_()
    both = count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert both == found + 5 * found // 2  # the products anew, and the gradients of two of them


def test_second_derivatives_are_counted():
    layer = nn.Linear(4, 1, bias=False)
    x = torch.randn(3, 4, requires_grad=True)

    def work():
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()

    assert count(work) > 2 * 3 * 4 * 3
