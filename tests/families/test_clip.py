"""Contrastive networks: their bound of the mutual information, equal texts, the scale, and noisy events."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Tokens, Vector
from genzoo.data.dataset import DataSet, Split
from genzoo.data.loader import Batches
from genzoo.diffusion.noisy import at_angle
from genzoo.distributions.discretization import bin_center
from genzoo.evaluation.contrastive import CANDIDATES, candidate_sets, retrieval
from genzoo.evaluation.settings import EvalSettings
from genzoo.event import EventSpec
from genzoo.families.clip import Contrastive, NoiseConditionalContrastive, cross_entropies
from genzoo.nn.mlp import MLP
from genzoo.numerics.random import SampleStreams, generator
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule

ONE = torch.ones((), dtype=torch.float64)
small = functools.partial(MLP, width=16, depth=1)


def moved(model: nn.Module, scale: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator("moved"))
    return model.double().eval()


def plane(condition=Vector(2), family=Contrastive, **settings) -> Contrastive:
    torch.manual_seed(0)
    given = {} if family is NoiseConditionalContrastive else {"network": small}
    return moved(family((2,), condition, dim=8, text_width=16, **given, **settings))


def rows(n: int, d: int, name: str = "rows") -> Tensor:
    return torch.randn(n, d, generator=generator(name), dtype=torch.float64)


# The loss


def gaussian_pairs(n: int, d: int, rho: float, name: str) -> tuple[Tensor, Tensor]:
    """Draw N pairs of correlation rho; return features whose inner product is log p(x, y)/(p(x) p(y))."""
    x, eps = rows(n, d, f"{name} x"), rows(n, d, f"{name} y")
    y = rho * x + math.sqrt(1 - rho**2) * eps
    a, b = rho / (1 - rho**2), -(rho**2) / (2 * (1 - rho**2))
    one, constant = torch.ones(n, 1, dtype=torch.float64), -0.5 * d * math.log(1 - rho**2)
    f = torch.cat([a * x, b * x.square().sum(1, keepdim=True) + constant, one], dim=1)
    g = torch.cat([y, one, b * y.square().sum(1, keepdim=True)], dim=1)
    return f, g


@pytest.mark.parametrize(("d", "rho"), [(1, 0.5), (2, 0.8), (3, 0.6)])
def test_the_optimal_critic_reaches_the_mutual_information_of_gaussian_pairs(d, rho):
    information, n = -0.5 * d * math.log(1 - rho**2), 4000
    losses = torch.stack(cross_entropies(*gaussian_pairs(n, d, rho, "reached"), ONE))
    bounds = (math.log(n) - losses).double()
    error = float(bounds.std()) / math.sqrt(n)
    assert bounds.mean(1).tolist() == pytest.approx([information] * 2, abs=4 * error + math.exp(2 * information) / n)


@pytest.mark.parametrize("n", [2, 5, 50])
def test_few_candidates_bound_the_information_from_below_and_by_their_number(n):
    d, rho = 4, 0.95
    information, bounds = -0.5 * d * math.log(1 - rho**2), []
    for i in range(2000 // n):
        losses = cross_entropies(*gaussian_pairs(n, d, rho, f"{n} {i}"), ONE)
        bounds.append(math.log(n) - torch.cat(losses).mean())
    assert 0.3 * math.log(n) < float(torch.stack(bounds).mean()) < min(math.log(n), information)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_no_other_critic_exceeds_the_mutual_information(factor):
    d, rho, n = 2, 0.8, 4000
    f, g = gaussian_pairs(n, d, rho, "others")
    bounds = [math.log(n) - torch.cat(cross_entropies(f, g, scale * ONE)).mean() for scale in (1.0, factor)]
    assert float(bounds[1]) < float(bounds[0]) - 0.01


@pytest.mark.parametrize("model", [plane(), plane(ClassLabels(3)), plane(family=NoiseConditionalContrastive)])
def test_without_a_scale_the_loss_is_that_of_a_guess(model):
    with torch.no_grad():
        model.encoders.log_scale.fill_(-math.inf)
    y = torch.arange(9) % 3 if isinstance(model.condition, ClassLabels) else rows(9, 2)
    loss = model.loss(rows(9, 2, "x"), y, rng=generator("noise"))
    assert float(loss.total) == pytest.approx(math.log(9), rel=1e-12)
    assert float(loss.terms["mutual_information"]) == pytest.approx(0, abs=1e-12)


def test_the_loss_is_the_mean_of_both_directions_of_a_table_of_cosines():
    model, x, y = plane(), rows(7, 2, "x"), rows(7, 2, "y")
    loss = model.loss(x, y)
    table = torch.tensor(
        [[float(model.similarity(x[i : i + 1], y[j : j + 1])) for j in range(7)] for i in range(7)], dtype=torch.float64
    )
    logits, own = float(model.scale) * table, torch.arange(7)
    of_images, of_texts = F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)
    assert abs(float(of_images - of_texts)) > 1e-3, "the directions are told apart"
    assert float(loss.terms["loss_of_images"]) == pytest.approx(float(of_images), rel=1e-10)
    assert float(loss.terms["loss_of_texts"]) == pytest.approx(float(of_texts), rel=1e-10)
    assert float(loss.total) == pytest.approx(0.5 * float(of_images + of_texts), rel=1e-10)


def test_embeddings_are_on_the_sphere():
    model = plane(Tokens(5, 11))
    y = torch.randint(0, 11, (6, 5), generator=generator("tokens"))
    for e in (model.embed_image(rows(6, 2)), model.embed_text(y)):
        assert e.shape == (6, 8) and e.dtype == torch.float64
        torch.testing.assert_close(e.norm(dim=1), torch.ones(6, dtype=torch.float64))
    noisy = plane(family=NoiseConditionalContrastive)
    torch.testing.assert_close(noisy.embed_image(rows(6, 2)).norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_the_order_of_a_batch_does_not_matter():
    model, x, y, order = plane(), rows(8, 2, "x"), rows(8, 2, "y"), torch.randperm(8, generator=generator("order"))
    assert float(model.loss(x[order], y[order]).total) == pytest.approx(float(model.loss(x, y).total), rel=1e-12)
    assert float(model.loss(x, y[order]).total) != pytest.approx(float(model.loss(x, y).total), rel=1e-3)


def test_equal_texts_share_the_right_answer():
    """Loss and gradient are those with equal weights on every pair whose texts are equal."""
    model, x = plane(ClassLabels(3)), rows(9, 2, "x")
    y = torch.tensor([0, 1, 0, 2, 2, 0, 1, 0, 2])
    loss = model.loss(x, y).total
    same = (y[:, None] == y).double()
    target = same / same.sum(1, keepdim=True)
    logits = model.scale * model.embed_image(x) @ model.embed_text(y).T
    shared = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    assert float(shared) == pytest.approx(float(loss), rel=1e-12)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(shared, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_the_scale_stays_below_one_hundred():
    torch.manual_seed(0)
    model = Contrastive((2,), Vector(2), network=small, dim=8, text_width=16)
    x = rows(64, 2).float()
    adam = functools.partial(torch.optim.Adam, lr=0.5)
    module = GenerativeModule(model, adam, Batches(Split(x, x), 16, seed=0), Budget(images=16 * 8))
    module.make_plan()
    with torch.no_grad():
        model.encoders.log_scale.fill_(math.log(99.0))
    seen = []
    for _ in range(8):
        model.encoders.log_scale.register_hook(lambda grad: -torch.ones_like(grad))  # upwards
        module.step()
        seen.append(float(model.scale))
    assert max(seen) == pytest.approx(100, rel=1e-5) and seen[-1] == pytest.approx(100, rel=1e-5)


def test_images_are_embedded_without_the_noise_of_dequantisation():
    torch.manual_seed(0)
    model = moved(Contrastive((1, 4, 4), ClassLabels(2), levels=3, dim=4, text_width=8))
    k = torch.randint(0, 3, (6, 1, 4, 4), generator=generator("levels"))
    y, center = torch.arange(6) % 2, bin_center(k, 3, torch.float64)
    losses = [model.loss(center + shift, y).total.item() for shift in (-0.3, 0.0, 0.3)]
    assert losses[0] == losses[1] == losses[2]


def test_data_without_conditions_are_refused():
    with pytest.raises(ValueError, match=r"data\.conditional=true"):
        Contrastive((2,))
    with pytest.raises(ValueError, match="y must"):
        plane(ClassLabels(3)).embed_text(torch.tensor([3]))


# Noisy events


def test_a_noisy_embedding_depends_on_the_ratio_of_noise_and_signal_and_ends_with_the_signal():
    model, x = plane(family=NoiseConditionalContrastive), rows(4, 2)
    alpha, sigma = torch.tensor([1.0, 0.5, 0.1, 0.0]).double(), torch.tensor([0.0, 0.5, 2.0, 1.0]).double()
    found = model.embed_noisy(x, alpha, sigma)
    torch.testing.assert_close(model.embed_noisy(3 * x, 3 * alpha, 3 * sigma), found)
    torch.testing.assert_close(found.norm(dim=1), alpha / torch.hypot(alpha, sigma))
    torch.testing.assert_close(found[0], model.embed_image(x)[0])
    y = rows(4, 2, "y")
    expected = model.scale * (found * model.embed_text(y)).sum(1)
    torch.testing.assert_close(model.log_likelihood(x, alpha, sigma, y), expected)
    assert float(model.log_likelihood(x, alpha, sigma, y)[3]) == 0


def test_noisy_training_sees_every_noise_level():
    model, seen = plane(family=NoiseConditionalContrastive), []

    class Recorder(nn.Module):
        def forward(self, x_u: Tensor, u: Tensor, y: None) -> Tensor:
            seen.append((x_u, u))
            return x_u.repeat(1, 4)

    model.encoders.image = Recorder()
    x = torch.full((4000, 2), 3.0, dtype=torch.float64)
    losses = cross_entropies(model._images(x, SampleStreams(0, range(4000))), model.embed_text(x), model.scale)
    assert all(loss.isfinite().all() for loss in losses)
    ((x_u, u),) = seen
    assert float((u.sort().values - torch.linspace(0, 1, 4000).double()).abs().max()) < 0.03
    eps = (x_u - torch.cos(math.pi / 2 * u)[:, None] * x) / torch.sin(math.pi / 2 * u)[:, None]
    assert float(eps.mean()) == pytest.approx(0, abs=0.05) and float(eps.std()) == pytest.approx(1, abs=0.04)


def test_an_angle_is_that_of_the_unit_circle():
    x, u = rows(5, 2), torch.linspace(0, 1, 5, dtype=torch.float64)
    alpha, sigma = torch.cos(math.pi / 2 * u), torch.sin(math.pi / 2 * u)
    x_u, found, signal = at_angle(7 * x, 7 * alpha, 7 * sigma)
    torch.testing.assert_close(x_u, x)
    torch.testing.assert_close(found, u)
    torch.testing.assert_close(signal, alpha)


# Retrieval


@pytest.mark.parametrize("kinds", [3, 40])
def test_candidates_have_distinct_conditions_and_no_example_occurs_twice(kinds):
    y = torch.randint(0, kinds, (300, 2), generator=generator("candidates"))
    distinct = len({tuple(row) for row in y.tolist()})
    sets = candidate_sets(y, 7)
    assert sets.shape[1] == min(7, distinct) and len(sets) > 5
    assert len(set(sets.flatten().tolist())) == sets.numel()
    assert all(len({tuple(row) for row in y[some].tolist()}) == sets.shape[1] for some in sets)


class Known(Contrastive):
    """A network whose embeddings are the columns of the data, of which some are wrong."""

    def __init__(self, right: int, n: int):
        super().__init__(EventSpec((n,)), ClassLabels(n), network=small, dim=n, text_width=4)
        self.right = right

    def _embed_image(self, x: Tensor) -> Tensor:
        return x.double()

    def _embed_text(self, y: Tensor) -> Tensor:
        return F.one_hot(y, self.shape[0]).double()


@pytest.mark.parametrize(("n", "right"), [(10, 7), (CANDIDATES, 75)])
def test_retrieval_counts_what_has_the_largest_cosine(n, right):
    """Of n images, the wrong ones point at one text: they find it, and it finds the first of them."""
    x = torch.eye(n)
    x[right:] = 0.0
    x[right:, 0] = 1.0
    data = DataSet(Split(x, torch.arange(n)), Split(x, torch.arange(n)), None, tuple(map(str, range(n))))
    model = Known(right, n).eval()
    found = retrieval(model, data, EvalSettings(events=None), {"seed": 0})
    assert found["retrieval/image_to_text"]["value"] == pytest.approx(right / n)
    by_hand = [float(x[:, j].argmax() == j) for j in range(n)]
    assert found["retrieval/text_to_image"]["value"] == pytest.approx(sum(by_hand) / n)
    assert found["retrieval/loss"]["card"]["protocol"]["candidates"] == n
    logits = float(model.scale) * x.double()
    loss = 0.5 * (F.cross_entropy(logits, torch.arange(n)) + F.cross_entropy(logits.T, torch.arange(n)))
    assert found["retrieval/loss"]["value"] == pytest.approx(float(loss), rel=1e-6)
    assert "retrieval/loss_noisy" not in found


def test_a_trained_network_finds_the_partner_of_an_event():
    torch.manual_seed(0)
    angle = 2 * math.pi * torch.rand(4000, generator=generator("angles"))
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    y = torch.stack([(2 * angle).cos(), (2 * angle).sin(), angle.sin()], dim=1)
    model = Contrastive((2,), Vector(3), network=small, dim=8, text_width=32)
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    module = GenerativeModule(model, adam, Batches(Split(x, y), 64, seed=0), Budget(images=64 * 150))
    module.make_plan()
    for _ in range(150):
        module.step()
    f, g = model.eval().embed_image(x[:50]), model.embed_text(y[:50])
    near = (torch.cdist(x[:50], x[(f @ g.T).argmax(1)]).diagonal() < 0.5).double().mean()
    assert float(near) > 0.9


def test_pairs_are_all_compared():
    """Every text is a candidate for every image: the loss changes with any of them."""
    model, x, y = plane(), rows(5, 2, "x"), rows(5, 2, "y")
    before = cross_entropies(model.embed_image(x), model.embed_text(y), model.scale)
    for i, j in itertools.permutations(range(5), 2):
        other = y.clone()
        other[j] += 1.0
        after = cross_entropies(model.embed_image(x), model.embed_text(other), model.scale)
        assert float(after[0][i]) != pytest.approx(float(before[0][i]), rel=1e-9)
