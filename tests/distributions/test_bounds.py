"""What the loss charges for the rate, against sums written out; and what it must leave alone."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.distributions.bounds import RateCost, importance_weighted
from genzoo.distributions.likelihoods import Gaussian
from genzoo.families.vae import VAE
from genzoo.nn.mlp import MLP
from genzoo.numerics.random import generator
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule

KL = torch.tensor([[0.0, 3.0, 1.0], [1.0, 0.2, 2.0]]).double()  # two events, three latents; means .5, 1.6, 1.5


def test_plain_it_is_the_mean_rate_of_all_layers():
    maps = torch.rand(2, 4, 3, 3).double()
    cost = RateCost()(KL, maps)
    torch.testing.assert_close(cost, (KL.sum() + maps.sum()) / 2)
    torch.testing.assert_close(RateCost(beta=2.5)(KL, maps), 2.5 * cost)


def test_free_bits_are_granted_to_the_mean_over_the_batch_of_each_group():
    """The first latent uses .5 nats on average, and the second 1.6 although one event uses only .2 of it."""
    assert float(RateCost(free_bits=1.0)(KL)) == pytest.approx(1.0 + 1.6 + 1.5)
    assert float(RateCost(beta=2.0, free_bits=1.55)(KL)) == pytest.approx(2 * (1.55 + 1.6 + 1.55))
    channels = torch.tensor([[[[0.1, 0.2], [0.3, 0.1]], [[0.0, 0.0], [0.1, 0.0]]]])  # one event, sums .7 and .1
    assert float(RateCost(free_bits=0.5)(channels)) == pytest.approx(0.7 + 0.5)


def test_free_bits_have_no_gradient():
    kl = KL.clone().requires_grad_(True)
    RateCost(free_bits=1.0)(kl).backward()
    assert torch.equal(kl.grad, torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]).double())


def test_the_weight_rises_with_the_images_of_training_and_then_stays():
    cost = RateCost(beta=3.0, warmup=5)
    paid = []
    for _ in range(5):
        paid.append(float(cost(KL)) / 3.6)
        cost.count(2)
    assert paid == pytest.approx([0.0, 3 * 2 / 5, 3 * 4 / 5, 3.0, 3.0])
    assert int(cost.seen) == 10


@pytest.mark.parametrize("training", [True, False])
def test_a_cost_counts_nothing_and_the_count_is_saved_with_the_weights(training):
    cost, other = RateCost(warmup=8), RateCost(warmup=8)
    for _ in range(2):
        cost.count(2)
    cost.train(training)
    assert float(cost(KL)) == float(cost(KL)) == pytest.approx(1.8) and int(cost.seen) == 4
    other.load_state_dict(cost.state_dict())
    assert float(other(KL)) == pytest.approx(1.8)
    assert int(copy.deepcopy(cost).double().seen) == 4


def test_the_trainer_counts_its_steps_and_forgets_those_that_measured_its_speed():
    small = functools.partial(MLP, width=8, depth=1)
    model = VAE((2,), encoder=small, decoder=small, likelihood=Gaussian(), latent_dim=2, warmup=1000).train()
    batches = Batches(Split(torch.randn(32, 2), None), 8, seed=0)
    module = GenerativeModule(model, functools.partial(torch.optim.Adam, lr=1e-3), batches, Budget(seconds=1.0))
    module.make_plan()
    assert int(model.cost.seen) == 0
    for _ in range(3):
        module.step()
    assert int(model.cost.seen) == int(module.ema.model.cost.seen) == module.images == 24


@pytest.mark.parametrize("name", ["beta", "warmup", "free_bits"])
def test_a_negative_price_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, not -1"):
        RateCost(**{name: -1})


def test_the_importance_weighted_bound_is_the_logarithm_of_the_mean_weight():
    log_w = torch.randn(7, 5, dtype=torch.float64) + 800  # far beyond what exp can hold
    value, stderr = importance_weighted(log_w)
    w = (log_w - 800).exp()
    torch.testing.assert_close(value, w.mean(0).log() + 800, atol=1e-12, rtol=0)
    without = torch.stack([torch.cat([w[:k], w[k + 1 :]]).mean(0).log() for k in range(7)])
    jackknife = (6 / 7 * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(stderr, jackknife, atol=1e-12, rtol=0)


def test_one_draw_says_nothing_of_its_error():
    value, stderr = importance_weighted(torch.tensor([[-3.0, 2.0]]))
    assert value.tolist() == [-3.0, 2.0] and stderr is None


def test_of_weights_that_are_alike_the_error_is_that_of_the_delta_method():
    log_w = 0.01 * torch.randn(20, 50, generator=generator(1)) - 3000
    value, stderr = importance_weighted(log_w)
    w = (log_w - value).double().exp()
    torch.testing.assert_close(stderr.double(), w.std(0) / math.sqrt(20) / w.mean(0), rtol=0.02, atol=0)


@pytest.mark.parametrize("K", [2, 3, 5, 20, 100])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0, 30.0])
def test_its_error_is_the_spread_over_repetitions(K, spread):
    """Where weights are alike as where one outweighs all others: 3.2 nats of two draws with log weights of spread 4."""
    log_w = spread * torch.randn(K, 10_000, dtype=torch.float64, generator=generator(0))
    value, stderr = importance_weighted(log_w)
    ratio = float(stderr.square().mean().sqrt() / value.std())
    assert ratio == pytest.approx(1, abs=0.17), (ratio, float(value.std()))
    if spread <= 0.3:
        assert ratio == pytest.approx(1, abs=0.03)
