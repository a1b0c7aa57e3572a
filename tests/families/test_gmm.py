"""Mixtures of normal distributions, against scikit-learn and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.event import EventSpec
from genzoo.families.gmm import GMM, Mixture, em_step, first_means, fit
from genzoo.numerics.random import generator


def points(n: int = 300, dim: int = 3) -> Tensor:
    """Three clusters, correlated."""
    rng = generator("clusters")
    centres = torch.tensor([[-2.0, 0.0, 1.0], [2.0, 1.0, 0.0], [0.0, -2.0, -1.0]])[:, :dim]
    mixing = torch.randn(dim, dim, generator=rng) * 0.5 + torch.eye(dim)
    return (centres[torch.arange(n) % 3] + 0.6 * torch.randn(n, dim, generator=rng) @ mixing).double()


def mixture(components: int = 3, dim: int = 3) -> Mixture:
    rng = generator("mixture")
    roots = torch.randn(components, dim, dim, generator=rng).double()
    covariances = roots @ roots.mT + 0.3 * torch.eye(dim).double()
    return Mixture(torch.arange(1.0, components + 1).double() / (components * (components + 1) / 2),
                   2 * torch.randn(components, dim, generator=rng).double(), covariances)  # fmt: skip


def of_sklearn(start: Mixture, ridge: float, steps: int, x: Tensor) -> GaussianMixture:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # it has not converged, as it should not
        precisions = torch.linalg.inv(start.covariances).numpy()
        reference = GaussianMixture(
            len(start.weights), reg_covar=ridge, max_iter=steps, tol=0.0, weights_init=start.weights.numpy(),
            means_init=start.means.numpy(), precisions_init=precisions,
        )  # fmt: skip
        return reference.fit(x.numpy())


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_density_is_that_of_scikit_learn(covariance):
    x, given = points(), mixture()
    model = GMM(EventSpec((3,)), components=3, covariance=covariance).double()
    model.set(given)
    kind = "full" if covariance == "full" else "diag"
    reference = GaussianMixture(3, covariance_type=kind)
    covariances = given.covariances if kind == "full" else given.covariances.diagonal(dim1=1, dim2=2)
    reference.weights_, reference.means_ = given.weights.numpy(), given.means.numpy()
    precisions = torch.linalg.inv(torch.linalg.cholesky(given.covariances)).mT if kind == "full" else covariances**-0.5
    reference.precisions_cholesky_ = precisions.numpy()
    expected = torch.from_numpy(reference.score_samples(x.numpy()))
    torch.testing.assert_close(model.log_prob(x).value, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("steps", [1, 7])
def test_iterations_of_em_are_those_of_scikit_learn(steps):
    x, found = points(), mixture()
    reference = of_sklearn(found, 1e-3, steps, x)
    for _ in range(steps):
        found, log_p = em_step(x, found, 1e-3)
    for ours, theirs in zip(found, (reference.weights_, reference.means_, reference.covariances_), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-10, rtol=0)
    assert float(log_p) == pytest.approx(reference.lower_bound_, abs=1e-9)


def test_em_never_lowers_the_likelihood_and_ends_where_the_gradient_is_zero():
    x, found, values = points(), mixture(), []
    for _ in range(300):
        found, log_p = em_step(x, found, 0.0)
        values.append(float(log_p))
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(values)) and values[-1] > values[0] + 0.1
    model = GMM(EventSpec((3,)), components=3).double()
    model.set(found)
    loss = model.loss(x).total
    assert float(loss.detach()) == pytest.approx(-values[-1] / 3, abs=1e-6)
    loss.backward()
    for name, p in model.named_parameters():
        assert float(p.grad.abs().max()) < 1e-5, name


def test_the_first_fit_finds_clusters_and_survives_few_data():
    x = points(120)
    model = GMM(EventSpec((3,)), components=3).double()
    model.initialize(x, rng=generator("fit"))
    centres = torch.stack([x[i::3].mean(0) for i in range(3)])
    distance = (model.means.detach()[:, None] - centres).norm(dim=2).amin(0)
    assert float(distance.max()) < 0.5
    few = fit(torch.randn(4, 10).double(), 6, torch.rand(6))
    assert all(bool(part.isfinite().all()) for part in few)
    assert float(torch.linalg.eigvalsh(few.covariances).min()) > 0
    same = fit(torch.ones(5, 2).double(), 3, torch.rand(3))
    assert all(bool(part.isfinite().all()) for part in same)


def test_first_means_are_data_and_far_apart():
    x = torch.tensor([[0.0, 0.0], [0.01, 0.0], [100.0, 0.0], [0.0, 100.0]]).double()
    for seed in range(20):
        chosen = first_means(x, 3, torch.rand(3, generator=generator(seed)))
        assert all(bool((x == row).all(1).any()) for row in chosen)
        assert len({tuple(row.round().tolist()) for row in chosen}) == 3


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_samples_have_the_moments_of_the_mixture(covariance):
    given = mixture()
    model = GMM(EventSpec((3, 1, 1)), components=3, covariance=covariance).double()
    model.set(given)
    covariances = given.covariances
    if covariance == "diagonal":
        covariances = torch.diag_embed(covariances.diagonal(dim1=1, dim2=2))
    x = model.sample(200_000, rng=generator("samples")).x.flatten(1)
    mean = given.weights @ given.means
    gap = given.means - mean
    spread = (given.weights[:, None, None] * (covariances + gap[:, :, None] * gap[:, None])).sum(0)
    torch.testing.assert_close(x.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), spread, atol=0.15, rtol=0)


def test_classes_share_components_and_differ_in_their_weights():
    model = GMM(EventSpec((1,)), ClassLabels(2), components=2).double()
    model.set(Mixture(torch.ones(2) / 2, torch.tensor([[-5.0], [5.0]]), torch.ones(2, 1, 1)))
    model.embed_y.weight.data.copy_(torch.tensor([[0.9, 0.1], [0.25, 0.75]]).log())
    y = torch.arange(2)
    centre = model.log_prob(torch.tensor([[-5.0], [5.0]]).double(), y).value.exp()
    normal = (2 * torch.pi) ** -0.5
    torch.testing.assert_close(centre, torch.tensor([0.9, 0.75]).double() * normal, atol=1e-7, rtol=0)
    x = model.sample(20_000, torch.ones(20_000, dtype=torch.int64), rng=generator("classes")).x
    assert float((x > 0).double().mean()) == pytest.approx(0.75, abs=0.02)


def test_settings_that_do_not_fit_are_refused():
    for settings, message in (({"components": 0}, "components"), ({"covariance": "tied"}, "covariance")):
        with pytest.raises(ValueError, match=message):
            GMM(EventSpec((2,)), **settings)
    with pytest.raises(ValueError, match="levels"):
        GMM(EventSpec((1, 2, 2), 4))
