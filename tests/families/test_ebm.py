"""Energy-based models against normal distributions in closed form, float64: the learned precision, the distribution of the
chains at a temperature, log Z; and the replay buffer, the gradient of both phases, and the joint model of classes."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Vector
from genzoo.evaluation.classification import classification
from genzoo.evaluation.partition import log_partition, partition_scores, resampled
from genzoo.evaluation.samplers import sampler_card
from genzoo.evaluation.settings import EvalSettings
from genzoo.event import EventSpec
from genzoo.families.ebm import EBM, JEM, ebm
from genzoo.model import Classifier, Unnormalised
from genzoo.nn.mlp import MLP
from genzoo.nn.resnet import ConvEncoder
from genzoo.numerics.random import generator

small = functools.partial(MLP, width=16, depth=1)
POINTS, CLASSES = EventSpec((2,)), ClassLabels(3)


class Quadratic(nn.Module):
    """f(x, y) = |x - m_y|^2 . precision/2: with the reference, a normal distribution."""

    def __init__(self, in_shape, out_shape, condition=None, precision=(0.0, 0.0)):
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(precision, dtype=torch.float64))
        self.means = nn.Parameter(torch.zeros(condition.n if condition else 1, 2, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.means[0] if y is None else self.means[y]
        return 0.5 * ((x - mean).square() * self.precision).sum(1, keepdim=True)


def quadratic(*precision: float, condition=None, **settings) -> EBM | JEM:
    return ebm(POINTS, condition, network=functools.partial(Quadratic, precision=precision), **settings).double().eval()


def trained(model: EBM | JEM, x: Tensor, updates: int, lr: float) -> EBM | JEM:
    optimizer, rng = torch.optim.Adam(model.train().parameters(), lr=lr), generator("training")
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / updates)
        optimizer.zero_grad()
        loss = model.loss(x, rng=rng)
        loss.total.backward()
        optimizer.step()
        model.after_step(loss.aux, len(x), rng=rng)
    return model.eval()


# Normal distributions


def test_the_learned_precision_is_that_of_the_data():
    x = torch.randn(512, 2, generator=generator("data"), dtype=torch.float64) * torch.tensor([0.5, 1.2])
    model = quadratic(
        0.0, 0.0, step_size=0.1, steps=5, metropolis=True, buffer_size=1024, restart=0.0, energy_penalty=0.0
    )
    trained(model, x, 300, 0.1)
    precision = model.network.precision.detach() + 1 / model.reference_std**2
    torch.testing.assert_close(precision, 1 / x.var(0), rtol=0.1, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_fresh_chains_are_stationary_at_the_temperature(temperature):
    """E = x'Lx/2 at temperature T has variance T/L, and w^2 s^4/(l (2 s^2 - l)) with s^2 = 1/L and w^2 = 2 l T for steps l."""
    step, n = 0.1, 4000
    model = quadratic(3.0, 8.0, temperature=temperature, step_size=step, sampling_steps=60, reference_std=1.0)
    L = torch.tensor([3.0, 8.0], dtype=torch.float64) + temperature  # with the reference, T |x|^2/2
    w2, s2 = 2 * step * temperature, 1 / L
    tolerance = 5 * math.sqrt(2 / n)
    x = model.sample(n, rng=generator("chains")).x
    torch.testing.assert_close(x.var(0), w2 * s2**2 / (step * (2 * s2 - step)), rtol=tolerance, atol=0)
    model.metropolis = True
    x = model.sample(n, rng=generator("chains")).x
    torch.testing.assert_close(x.var(0), temperature / L, rtol=tolerance, atol=0)
    card = sampler_card(model)
    assert card["temperature"] == temperature and card["steps"] == 60 and card["name"] == "MALA"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_z_of_a_normal_distribution_lies_between_its_bounds(temperature):
    model = quadratic(3.0, 20.0, temperature=temperature, reference_std=2.0)
    L = torch.tensor([3.0, 20.0], dtype=torch.float64) / temperature + 1 / 4
    truth = 0.5 * (2 * math.log(2 * math.pi) - float(L.log().sum()))
    found = log_partition(model, rng=generator("z"))
    assert found.lower == pytest.approx(truth, abs=4 * found.lower_stderr)
    assert found.upper == pytest.approx(truth, abs=4 * found.upper_stderr)
    assert max(found.lower_stderr, found.upper_stderr) < 0.12
    with pytest.raises(ValueError, match="chains must be at least 2, not 1"):
        log_partition(model, chains=1)


def test_the_density_of_an_evaluation_is_a_bound_with_its_log_z_on_the_card():
    """For classes with normal distributions in closed form, whose normalisers are equal."""
    model = quadratic(3.0, 20.0, condition=CLASSES, reference_std=2.0)
    model.network.means.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    y = torch.arange(60) % 3
    x = model.network.means.detach()[y] + 0.2 * torch.randn(60, 2, dtype=torch.float64)
    L = torch.tensor([3.0, 20.0], dtype=torch.float64) + 1 / 4
    mean = model.network.means.detach()[y] * torch.tensor([3.0, 20.0]) / L
    log_p = torch.distributions.Normal(mean, L.rsqrt()).log_prob(x).sum(1)
    data = SimpleNamespace(
        held_out="test", scored=("test", SimpleNamespace(x=x.float(), y=y)), levels=None, density=None
    )
    settings = EvalSettings(n=0, events=None)
    found = partition_scores(model, data, settings, {"seed": 0})
    assert set(found) == {"partition/log_z_lower", "partition/log_z_upper", "test/nll_upper_estimate"}
    score, upper = found["test/nll_upper_estimate"], found["partition/log_z_upper"]
    assert score["value"] == pytest.approx(-float(log_p.mean()), abs=4 * upper["stderr"])
    assert score["card"]["protocol"]["bound"] == "LOWER|ESTIMATE" and score["card"]["protocol"]["chains"] > 0
    assert score["card"]["setting"]["temperature"] == 1.0
    assert score["card"]["setting"]["log_z"] == [found["partition/log_z_lower"]["value"], upper["value"]]
    images = ebm(EventSpec((1, 4, 4), 17), network=functools.partial(ConvEncoder, width=4))
    assert partition_scores(images, data, settings, {"seed": 0}) == {}
    assert partition_scores(ebm(POINTS, Vector(2), network=small), data, settings, {"seed": 0}) == {}


def test_resampling_follows_the_weights():
    log_w = torch.tensor([0.1, 0.0, 0.4, 0.5], dtype=torch.float64).log()
    rows = torch.cat([resampled(log_w, generator("resampling", i)) for i in range(500)])
    torch.testing.assert_close(torch.bincount(rows, minlength=4) / 2000, log_w.exp().float(), atol=0.02, rtol=0)


# Energies and the two phases


def cases() -> dict[str, EBM | JEM]:
    shape = EventSpec((1, 8, 8), 17)
    conv = functools.partial(ConvEncoder, width=8, blocks=0, norm=False)
    settings = {"buffer_size": 40, "steps": 3, "sampling_steps": 4}
    return {
        "points": ebm(POINTS, network=small, temperature=0.5, **settings),
        "classes": ebm(POINTS, CLASSES, network=small, metropolis=True, **settings),
        "image": ebm(shape, network=conv, temperature=1e-3, step_size=0.1, data_noise=0.03, **settings),
        "joint": ebm(POINTS, CLASSES, network=small, labels="joint", temperature=0.2, **settings),
        "joint image": ebm(shape, CLASSES, network=conv, labels="joint", **settings),
    }


def batch(model: EBM | JEM, n: int = 12) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(n, *model.shape, dtype=torch.float64).tanh()
    return x, None if model.condition is None else torch.arange(n) % 3


@pytest.mark.parametrize("name", cases())
def test_the_score_is_minus_the_gradient_of_the_energy_over_the_temperature(name):
    model = cases()[name].double().eval()
    x, y = batch(model)
    assert isinstance(model, Unnormalised)
    expected = torch.func.grad(lambda x: model.energy(x, y).sum())(x) / -model.temperature
    torch.testing.assert_close(model.score(x, y), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.score(x, y), expected)
        far = model.energy(100 * x, y) - model.tilt(100 * x, y)
    square = (100 * x).square().flatten(1).sum(1)
    torch.testing.assert_close(far, model.temperature * square / (2 * model.reference_std**2))


@pytest.mark.parametrize("name", cases())
def test_the_gradient_of_the_loss_is_that_of_the_data_less_that_of_the_chains(name):
    model = cases()[name].double().train()
    model.energy_penalty = 0.0
    x, y = batch(model)
    loss = model.loss(x, y, rng=generator("loss"))
    loss.total.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    again, chains = cases()[name].double(), loss.aux["chains"]
    again.load_state_dict(model.state_dict())
    if model.data_noise:
        noise = x - x  # drawn after the places, restarts and first states of the chains
        rng = generator("loss")
        model.take(x, y, rng)
        noise = model.data_noise * torch.randn(x.shape, generator=rng, dtype=x.dtype)
        x = x + noise
    if isinstance(model, JEM):
        summed = [-again.logits(z).logsumexp(1).mean() for z in (x, chains)]
        total = summed[0] - summed[1] + nn.functional.cross_entropy(again.logits(x), y)
    else:
        total = again.energy(x, y).mean() - again.energy(chains, loss.aux.get("chain_y")).mean()
    total.backward()
    torch.testing.assert_close(found, [p.grad for p in again.parameters() if p.grad is not None])
    assert not chains.requires_grad and all(not value.requires_grad for value in loss.aux.values())


def test_the_penalty_is_that_of_the_squared_energies():
    x = batch(quadratic(1.0, 1.0))[0]
    totals = []
    for penalty in (0.0, 0.3):
        model = quadratic(1.0, 2.0, energy_penalty=penalty, buffer_size=20)
        totals.append(model.loss(x, rng=generator("loss")))
    chains = totals[0].aux["chains"]
    squares = model.tilt(x, None).square().mean() + model.tilt(chains, None).square().mean()
    torch.testing.assert_close(totals[1].total - totals[0].total, 0.3 * squares)


# The replay buffer


@pytest.mark.parametrize("name", cases())
def test_chains_go_on_where_they_were_put_back_with_their_conditions(name):
    model = cases()[name].double().train()
    model.restart = 0.0
    x, y = batch(model, 40)  # all chains of the buffer
    first = model.loss(x, y, rng=generator("first"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert (before["chain_ages"] == 0).all()
    model.after_step(first.aux, 40)
    assert (model.chain_ages == 1).all()
    torch.testing.assert_close(model.chains[first.aux["rows"]], first.aux["chains"], rtol=0, atol=0)
    taken = model.take(x, y, generator("second"))
    assert sorted(taken.rows.tolist()) == list(range(40)) and (taken.age == 1).all()
    assert torch.equal(taken.x, model.chains[taken.rows])
    if y is not None:
        assert torch.equal(model.chain_y[first.aux["rows"]], y)
        assert torch.equal(taken.y, model.chain_y[taken.rows]) and not torch.equal(taken.y, y)
    few = model.loss(x[:10], None if y is None else y[:10], rng=generator("few"))
    held = model.chains.clone()
    model.after_step(few.aux, 10)
    moved = (model.chains != held).flatten(1).any(1)
    assert sorted(moved.nonzero().flatten().tolist()) == sorted(few.aux["rows"].tolist())
    assert model.chain_ages.sum() == 40 + 10


def test_chains_restart_as_often_as_is_set_and_then_take_the_conditions_of_the_data():
    model = ebm(POINTS, CLASSES, network=small, buffer_size=4000, restart=0.25)
    model.chain_ages.fill_(7)
    model.chains.fill_(99.0)
    y = torch.full((4000,), 2)
    taken = model.take(torch.zeros(4000, 2), y, generator("restarts"))
    fresh = taken.age == 0
    assert abs(float(fresh.double().mean()) - 0.25) < 0.03
    assert (taken.x[~fresh] == 99).all() and (taken.y[~fresh] == 0).all() and (taken.y[fresh] == 2).all()
    assert abs(float(taken.x[fresh].std()) - model.reference_std) < 0.05


@pytest.mark.parametrize("name", cases())
def test_samples_are_fresh_chains_whatever_the_buffer_holds(name):
    model = cases()[name].eval()
    before = model.sample(5, rng=generator("fresh"))
    model.chains.fill_(math.nan)
    model.chain_ages.fill_(1000)
    after = model.sample(5, rng=generator("fresh"))
    assert torch.equal(before.x, after.x)
    assert before.nfe == 4 + model.metropolis


def test_the_buffer_must_hold_a_batch():
    model = ebm(POINTS, network=small, buffer_size=5)
    with pytest.raises(ValueError, match="buffer_size=5: must be at least the batch size, 6"):
        model.loss(torch.zeros(6, 2))


def test_networks_are_evaluated_without_state_while_chains_move():
    model = ebm(POINTS, network=lambda *_: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, 1)))
    model.tilt = lambda x, y: model.network(x)[:, 0]
    model.train()
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(model.run(torch.ones(3, 2), None, 3, generator("run"), torch.ones(3, dtype=torch.bool), 0)[0])
    assert torch.equal(*runs) and model.training and model.network[1].training


# The joint model


def test_a_joint_model_is_a_classifier_whose_energies_are_its_logits():
    model = cases()["joint"].double().eval()
    x, _ = batch(model)
    assert isinstance(model, Classifier) and not isinstance(cases()["classes"], Classifier)
    energies = torch.stack([model.energy(x, torch.full((len(x),), c)) for c in range(3)], dim=1)
    torch.testing.assert_close(model.class_log_probs(x), (-energies).log_softmax(1))
    summed = -(-energies).logsumexp(1)
    torch.testing.assert_close(summed, -model.logits(x).logsumexp(1) + model.reference(x))


def test_the_accuracy_of_a_joint_model_is_that_of_its_largest_logit():
    model = cases()["joint"].eval()
    x, _ = batch(model, 50)
    right = model.class_log_probs(x.float()).argmax(1)
    y = torch.where(torch.arange(50) < 20, right, (right + 1) % 3)
    data = SimpleNamespace(held_out="test", scored=("test", SimpleNamespace(x=x.float(), y=y)), levels=None)
    found = classification(model, data, EvalSettings(n=0, events=None), {"seed": 0})
    assert set(found) == {"classifier/accuracy", "classifier/cross_entropy"}
    assert found["classifier/accuracy"]["value"] == pytest.approx(0.4)
    expected = nn.functional.cross_entropy(model.logits(x.float()).double(), y)
    assert found["classifier/cross_entropy"]["value"] == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"labels": "both"}, "labels must be condition or joint, not 'both'"),
        ({"labels": "joint"}, "labels=joint needs data with classes, not None; set data.conditional=true"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"step_size": -1.0}, "step_size must be positive"),
        ({"reference_std": math.inf}, "reference_std must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1"),
        ({"buffer_size": 0}, "buffer_size must be at least 1"),
        ({"restart": 1.5}, r"restart must be in \[0, 1\]"),
        ({"data_noise": -0.1}, "must not be negative"),
        ({"energy_penalty": -1.0}, "must not be negative"),
    ],
)
def test_impossible_options_are_rejected(words, message):
    with pytest.raises(ValueError, match=message):
        ebm(POINTS, network=small, **words)
