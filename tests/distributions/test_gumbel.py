"""The relaxation of categorical variables: its laws in closed form, its limit, and the annealing of its temperature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genzoo.distributions import gumbel
from genzoo.distributions.gumbel import Temperature, gumbel_softmax
from genzoo.numerics.random import SampleStreams, generator


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_the_largest_component_is_categorical_at_every_temperature(temperature):
    n, logits = 40_000, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    y = gumbel_softmax(logits.expand(n, 4), temperature, generator("categorical"))
    torch.testing.assert_close(y.sum(1), torch.ones(n).double())
    found, expected = torch.bincount(y.argmax(1), minlength=4), n * logits.softmax(0)
    assert float(((found - expected).square() / expected).sum()) < 3 + 5 * math.sqrt(6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_of_two_components_the_first_has_a_logistic_logit(temperature):
    """tau logit(y_1) = l_1 - l_2 + L with L logistic: its distribution function, by Kolmogorov and Smirnov."""
    n, logits = 20_000, torch.tensor([0.7, -0.4], dtype=torch.float64)
    y = gumbel_softmax(logits.expand(n, 2), temperature, generator("logistic"))[:, 0]
    u = torch.sigmoid(temperature * torch.logit(y) - (logits[0] - logits[1])).sort().values
    steps = torch.arange(n).double() / n
    distance = max(float((u - steps).max()), float((steps + 1 / n - u).max()))
    assert distance < 1.95 / math.sqrt(n), "a chance of one in a thousand"


def test_samples_become_one_hot_as_the_temperature_falls():
    logits = torch.randn(200, 5, 3, 3, generator=generator("logits"), dtype=torch.float64)
    warm, cold = (gumbel_softmax(logits, temperature, generator("noise")) for temperature in (1.0, 1e-4))
    assert torch.equal(warm.argmax(1), cold.argmax(1)), "of the same noise"
    assert float((cold.amax(1) > 1 - 1e-9).double().mean()) > 0.995
    assert float(warm.amax(1).mean()) < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_the_extreme_draws_of_noise_are_finite(monkeypatch, dtype, u):
    def rand(shape, *, rng, device, dtype) -> Tensor:
        drawn = torch.full(shape, 0.3, dtype=dtype)
        drawn[:, 0] = u
        return drawn

    monkeypatch.setattr(gumbel, "rand", rand)
    logits = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    y = gumbel_softmax(logits, 1 / 16)
    y[:, 0].sum().backward()
    assert bool(y.isfinite().all()) and bool(logits.grad.isfinite().all())
    assert (y[:, 0] > y[:, 1]).all() == (u > 0.5), "more noise, more probable"


def test_the_noise_of_an_example_is_a_function_of_its_stream():
    logits = torch.zeros(6, 4, 2, 2)
    whole = gumbel_softmax(logits, 1.0, SampleStreams(3, range(6)))
    assert torch.equal(gumbel_softmax(logits[:2], 1.0, SampleStreams(3, [4, 5])), whole[4:])


def test_the_temperature_falls_by_a_cosine_over_the_images_of_training():
    temperature, steps = Temperature(1.0, 1 / 16, 1000), []
    for _ in range(6):
        steps.append(float(temperature()))
        temperature.count(250)
    assert steps[0] == 1.0 and steps[2] == pytest.approx((1 + 1 / 16) / 2) and steps[4] == steps[5] == 1 / 16
    assert steps[1] == pytest.approx(1 / 16 + 15 / 16 * (1 + math.cos(math.pi / 4)) / 2)
    other = Temperature(1.0, 1 / 16, 1000)
    other.load_state_dict(temperature.state_dict())
    assert float(other()) == 1 / 16
    assert float(Temperature(1.0, 0.5, 0)()) == 0.5


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, -0.1)])
def test_temperatures_are_positive(start, end):
    with pytest.raises(ValueError, match="temperature must be positive"):
        Temperature(start, end, 10)
