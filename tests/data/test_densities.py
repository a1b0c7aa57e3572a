"""The laws of the plane: they integrate to 1, their samplers follow them, and their entropies and scores are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from genzoo.data import (
    Checkerboard,
    DataSet,
    GaussianMixture,
    LabelledDensity,
    Moons,
    PlaneDensity,
    SwissRoll,
    plane_dataset,
)
from genzoo.numerics.random import SampleStreams, generator

SKEWED = {
    "means": [[0.0, 0.0], [1.5, -1.0], [-1.0, 2.0]],
    "scale": [[[0.5, 0.0], [0.4, 0.2]], [[0.3, 0.1], [0.0, 0.6]], [[0.2, 0.0], [0.0, 0.2]]],
    "weights": [1.0, 2.0, 3.0],
}
DENSITIES = {
    "ring": GaussianMixture(),
    "skewed": GaussianMixture(**SKEWED),
    "checkerboard": Checkerboard(),
    "moons": Moons(),
    "swiss_roll": SwissRoll(),
}
every = pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)


def grid(density: PlaneDensity, n: int) -> tuple[torch.Tensor, float]:
    """Midpoints of n x n cells of the support, float64, (n^2, 2), and the area of a cell."""
    sides = [(lo, (hi - lo) / n) for lo, hi in density.support]
    axes = [lo + step * (torch.arange(n, dtype=torch.float64) + 0.5) for lo, step in sides]
    return torch.cartesian_prod(*axes), sides[0][1] * sides[1][1]


@every
def test_density_integrates_to_one(density):
    points, area = grid(density, 160)
    assert float(density.log_prob(points).exp().sum() * area) == pytest.approx(1.0, abs=1e-6)


@every
def test_entropy_is_the_expected_surprise(density):
    points, area = grid(density, 240)
    log_p = density.log_prob(points)
    surprise = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum() * area
    assert density.entropy() == pytest.approx(float(surprise), abs=1e-6)

    log_p = density.log_prob(density.sample(20_000, generator("entropy test")))
    stderr = float(log_p.std()) / math.sqrt(len(log_p))
    assert abs(density.entropy() + float(log_p.mean())) < 4 * stderr + 1e-9


@every
def test_sampler_follows_the_density(density):
    n, cells, fine = 30_000, 12, 16  # the expected count of a cell is an integral over 16 x 16 points
    points, area = grid(density, cells * fine)
    mass = (density.log_prob(points).exp() * area).reshape(cells, fine, cells, fine).sum(dim=(1, 3))
    edges = [np.linspace(lo, hi, cells + 1) for lo, hi in density.support]
    x = density.sample(n, generator("chi-square test")).numpy()
    counts, _, _ = np.histogram2d(x[:, 0], x[:, 1], bins=edges)
    assert counts.sum() == n

    expected, counts = n * mass.numpy().ravel(), counts.ravel()
    seen = expected > 5
    observed, expected = (
        np.append(counts[seen], counts[~seen].sum()),
        np.append(expected[seen], n - expected[seen].sum()),
    )
    observed, expected = (v[expected > 1e-3] for v in (observed, expected))
    assert stats.chisquare(observed, expected * n / expected.sum()).pvalue > 1e-3


@every
def test_dtypes_and_the_support_of_samples(density):
    x = density.sample(1000, generator("dtype test"))
    assert x.shape == (1000, 2) and x.dtype == torch.float32
    log_p = density.log_prob(x)
    assert log_p.shape == (1000,) and log_p.dtype == torch.float64 and bool(log_p.isfinite().all())
    assert torch.equal(log_p, density.log_prob(x.double()))
    assert density.log_prob(x[:0]).shape == (0,)


@every
def test_samples_depend_on_their_generator_alone(density):
    x = density.sample(64, generator("a"))
    torch.manual_seed(1)
    assert torch.equal(x, density.sample(64, generator("a")))
    assert not torch.equal(x, density.sample(64, generator("b")))
    wide, narrow = density.sample(6, SampleStreams(3, range(6))), density.sample(2, SampleStreams(3, [4, 5]))
    assert torch.equal(wide[4:], narrow)


@every
def test_chunks_do_not_change_the_density(density, monkeypatch):
    points, _ = grid(density, 20)
    whole = density.log_prob(points)
    monkeypatch.setattr("genzoo.data.densities.CHUNK", 4096)
    torch.testing.assert_close(density.log_prob(points), whole, rtol=1e-13, atol=0)


def arc_integral(x: np.ndarray, curve, lo: float, hi: float, noise: float, nodes: int = 20_001) -> float:
    """The density at one point of a blurred curve, by a Simpson sum over a uniform parameter."""
    from scipy.integrate import simpson

    s = np.linspace(lo, hi, nodes)
    squares = ((x - np.stack(curve(s), axis=-1)) ** 2).sum(axis=-1)
    return simpson(np.exp(-squares / (2 * noise**2)) / (2 * math.pi * noise**2), x=s) / (hi - lo)


@pytest.mark.parametrize("noise", [0.03, 0.1, 3.0])
def test_blurred_curves_agree_with_an_independent_quadrature(noise):
    def upper(s):
        return np.cos(s) - 0.5, np.sin(s) - 0.25

    def lower(s):
        return 0.5 - np.cos(s), 0.25 - np.sin(s)

    def spiral(r):
        return r * np.cos(2 * math.pi * r), r * np.sin(2 * math.pi * r)

    moons, roll = Moons(noise), SwissRoll(noise)
    for x in moons.sample(12, generator("quadrature test")).double():
        p = sum(arc_integral(x.numpy(), curve, 0, math.pi, noise) for curve in (upper, lower)) / 2
        assert float(moons.log_prob(x[None])) == pytest.approx(math.log(p), abs=1e-10)
    for x in roll.sample(12, generator("quadrature test")).double():
        p = arc_integral(x.numpy(), spiral, 0.75, 2.25, noise)
        assert float(roll.log_prob(x[None])) == pytest.approx(math.log(p), abs=1e-10)


def test_moments_of_the_curves():
    """E[x] and E[|x|^2] from integrals by hand."""
    n, noise = 40_000, 0.1
    x, y = Moons(noise).sample_with_labels(n, generator("moments"))
    upper = x[y == 0].double()
    assert float(upper[:, 0].mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(upper[:, 1].mean()) == pytest.approx(2 / math.pi - 0.25, abs=0.01)
    assert float((upper + torch.tensor([0.5, 0.25])).square().sum(dim=1).mean()) == pytest.approx(
        1 + 2 * noise**2, abs=0.01
    )

    x = SwissRoll(noise).sample(n, generator("moments")).double()
    second = (2.25**3 - 0.75**3) / (3 * 1.5)
    assert float(x.square().sum(dim=1).mean()) == pytest.approx(second + 2 * noise**2, abs=0.04)


def test_checkerboard_is_uniform_on_eight_squares():
    board = Checkerboard()
    assert board.entropy() == math.log(8)
    x = board.sample(100_000, generator("board"))
    assert bool(torch.all(board.log_prob(x) == -math.log(8)))
    squares = x.floor().long() + 2
    counts = torch.bincount(4 * squares[:, 0] + squares[:, 1], minlength=16)
    assert int((counts > 0).sum()) == 8
    off = torch.tensor([[-1.5, -0.5], [0.5, 1.5], [2.5, 0.5], [0.5, -2.5]])
    assert bool(torch.all(board.log_prob(off) == -math.inf))


def test_checkerboard_keeps_the_greatest_draw_inside_its_square(monkeypatch):
    """corner + u rounds to corner + 1 in float32 where u is the largest number below 1."""
    monkeypatch.setattr("genzoo.data.densities.rand", lambda shape, **_: torch.full(shape, 1 - 2.0**-24))
    x = Checkerboard().sample(500)
    assert bool(Checkerboard().log_prob(x).isfinite().all())


def test_gaussian_mixture_equals_its_definition():
    mixture = GaussianMixture(**SKEWED)
    x = 2 * torch.randn(50, 2, dtype=torch.float64, generator=generator("definition"))
    scale = np.array(SKEWED["scale"])
    p = sum(
        w / 6 * stats.multivariate_normal(m, a @ a.T).pdf(x.numpy())
        for w, m, a in zip(SKEWED["weights"], SKEWED["means"], scale, strict=True)
    )
    np.testing.assert_allclose(mixture.log_prob(x).exp().numpy(), p, rtol=1e-11)


def test_entropy_of_one_gaussian_is_the_closed_form():
    scale = torch.tensor([[0.03, 0.0], [5.0, 40.0]], dtype=torch.float64)
    entropy = 1 + math.log(2 * math.pi) + float(torch.linalg.slogdet(scale).logabsdet)
    assert GaussianMixture([[3.0, -2.0]], scale[None]).entropy() == pytest.approx(entropy, abs=1e-10)


@pytest.mark.parametrize("mixture", [DENSITIES["ring"], DENSITIES["skewed"]], ids=["ring", "skewed"])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.7, 0.5), (0.0, 1.0)])
def test_score_is_the_gradient_of_the_diffused_density(mixture, alpha, sigma):
    x = (2 * torch.randn(40, 2, dtype=torch.float64, generator=generator("score"))).requires_grad_()
    # The diffused mixture by its definition, apart from the class: scale' scale'^T = alpha^2 A A^T + sigma^2 I.
    covariances = alpha**2 * mixture.scale @ mixture.scale.mT + sigma**2 * torch.eye(2, dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(alpha * mixture.means, covariances)
    log_p = (mixture.weights.log() + parts.log_prob(x[:, None])).logsumexp(dim=1)
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(mixture.log_prob(x, alpha, sigma), log_p, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixture.score(x, alpha, sigma), gradient, rtol=1e-9, atol=1e-9)


def test_score_takes_a_time_for_each_point():
    mixture = GaussianMixture(**SKEWED)
    x = torch.randn(5, 2, generator=generator("times"))
    alpha, sigma = torch.linspace(0.1, 0.9, 5), torch.linspace(1.0, 0.2, 5)
    one_by_one = torch.cat([mixture.score(x[i : i + 1], alpha[i], sigma[i]) for i in range(5)])
    torch.testing.assert_close(mixture.score(x, alpha, sigma), one_by_one)


def test_labels_name_the_component():
    mixture = GaussianMixture(**SKEWED)
    x, y = mixture.sample_with_labels(30_000, generator("labels"))
    assert y.dtype == torch.int64
    share = torch.bincount(y, minlength=3) / len(y)
    torch.testing.assert_close(share, torch.tensor([1.0, 2.0, 3.0]) / 6, atol=0.012, rtol=0)
    for k in range(3):
        torch.testing.assert_close(x[y == k].mean(dim=0).double(), mixture.means[k], atol=0.03, rtol=0)
        torch.testing.assert_close(x[y == k].T.double().cov(), mixture.scale[k] @ mixture.scale[k].T, atol=0.02, rtol=0)

    x, y = Moons(0.01).sample_with_labels(2000, generator("labels"))
    radius = torch.where(
        y == 0, (x + torch.tensor([0.5, 0.25])).norm(dim=1), (x - torch.tensor([0.5, 0.25])).norm(dim=1)
    )
    assert float((radius - 1).abs().max()) < 0.06 and 900 < int(y.sum()) < 1100


@pytest.mark.parametrize(
    "bad",
    [
        {"means": [0.0, 1.0]},
        {"weights": [1.0, 2.0]},
        {"weights": [0.0] + 7 * [1.0]},
        {"scale": 0.0},
        {"scale": [1.0, 2.0]},
    ],
)
def test_impossible_mixtures_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        GaussianMixture(**bad)


@pytest.mark.parametrize("law", [Moons, SwissRoll])
def test_noise_must_be_positive(law):
    with pytest.raises(ValueError, match="noise must be positive, not 0"):
        law(noise=0.0)


@every
def test_plane_dataset(density):
    data = plane_dataset(density, n_train=300, n_test=200, seed=5)
    assert isinstance(data, DataSet)
    assert (data.shape, data.levels, data.density) == ((2,), None, density)
    assert data.train.x.shape == (300, 2) and data.test.x.shape == (200, 2)
    assert torch.equal(data.test.x, plane_dataset(density, n_train=7, n_test=200, seed=5).test.x)
    assert not torch.equal(data.train.x[:200], data.test.x)
    assert not torch.equal(data.train.x, plane_dataset(density, n_train=300, n_test=200, seed=6).train.x)
    if isinstance(density, LabelledDensity):
        x, y = density.sample_with_labels(300, generator("data", 5, "train"))
        assert torch.equal(data.train.x, x) and torch.equal(data.train.y, y)
        assert data.num_classes == len(density.classes) == int(data.train.y.max()) + 1
    else:
        assert data.train.y is None and data.test.y is None and data.num_classes == 0
