"""Masked networks by their Jacobian: parameter i depends on all of x_1, ..., x_{i-1} and on nothing else of x."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels, Vector
from genzoo.nn.made import MADE


def made(D: int, P: int = 2, condition=None, **settings) -> MADE:
    return MADE((D,), (P * D,), condition, **{"width": 32, "zero_init": False, **settings}).double()


def jacobian(network: MADE, D: int, y: Tensor | None = None) -> Tensor:
    """Derivatives of the parameters, (P, D, D), the last dimension that of x."""
    x = torch.randn(D, dtype=torch.float64)
    return torch.func.jacfwd(lambda one: network(one[None], y)[0])(x).view(-1, D, D)


@pytest.mark.parametrize("condition", [None, ClassLabels(3), Vector(2)])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("D", [1, 2, 3, 7])
def test_parameters_depend_on_all_preceding_dimensions_and_on_no_other(D, depth, condition):
    y = (
        None
        if condition is None
        else torch.ones(1, dtype=torch.int64)
        if condition == ClassLabels(3)
        else torch.ones(1, 2)
    )
    dependence = jacobian(made(D, condition=condition, depth=depth), D, y) != 0
    assert torch.equal(dependence, torch.ones(D, D).tril(-1).bool().expand(2, D, D))


def test_a_network_narrower_than_its_input_is_autoregressive():
    dependence = jacobian(made(40, width=8), 40) != 0
    assert not dependence[:, torch.ones(40, 40).triu().bool()].any()
    assert dependence[:, -1, :35].all()


@torch.no_grad()
@pytest.mark.parametrize("D", [1, 2, 5])
def test_the_parameters_of_every_dimension_depend_on_the_condition(D):
    network, x = made(D, condition=ClassLabels(2)), torch.randn(1, D).double()
    one, two = (network(x, torch.tensor([c])) for c in range(2))
    assert (one != two).all()


@torch.no_grad()
def test_the_parameters_of_one_dimension_are_those_of_all():
    network, x = made(5, P=3, condition=ClassLabels(2)), torch.randn(4, 5).double()
    y = torch.arange(4) % 2
    every = network(x, y).view(4, 3, 5)
    for i in range(5):
        torch.testing.assert_close(network(x, y, i), every[:, :, i], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_zero_initialised_network_gives_zeros():
    assert not MADE((4,), (8,))(torch.randn(3, 4)).any()


def test_outputs_that_are_no_multiple_of_the_dimensions_are_rejected():
    with pytest.raises(ValueError, match="multiple of outputs, not 7"):
        MADE((3,), (7,))
