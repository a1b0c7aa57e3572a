"""What is not finite is refused by every score of samples, and what is empty changes none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genzoo.evaluation.samples import class_scores, feature_scores, memorization_scores, point_scores
from genzoo.metrics.cat_metric import CatMetric
from genzoo.metrics.features import FeatureNetwork, Features
from genzoo.metrics.finite import NonFiniteError, check_finite
from genzoo.metrics.frechet import FeatureMoments, frechet_distance_of_features, moments
from genzoo.metrics.inception_score import inception_score
from genzoo.metrics.kernel import gaussian_mmd, kernel_distance
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.metrics.manifold import manifold
from genzoo.metrics.memorisation import neighbours
from genzoo.metrics.reference import Reference
from genzoo.metrics.sliced_wasserstein import sliced_wasserstein

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


class Named(FeatureNetwork):
    def __init__(self):
        self.name, self.dim, self.sha256, self.resize, self.classes = "digits", 2, "0" * 64, "none", "digits"

    def forward(self, images: Tensor) -> Features:
        raise AssertionError("features are given here")


def reference(x: Tensor) -> Reference:
    return Reference("digits/train", "0" * 64, x, torch.zeros(len(x), dtype=torch.int64), moments(X), 17)


SCORES = {
    "manifold": lambda real, fake: manifold(real, fake),
    "frechet": lambda real, fake: frechet_distance_of_features(fake, moments(real)),
    "frechet of few": lambda real, fake: frechet_distance_of_features(fake.repeat(1, 50), moments(real.repeat(1, 50))),
    "kernel": lambda real, fake: kernel_distance(real, fake),
    "mmd": lambda real, fake: gaussian_mmd(real, fake, 1.0),
    "slices": lambda real, fake: sliced_wasserstein(real, fake),
    "copies": lambda real, fake: neighbours(fake, real),
    "all of points": lambda real, fake: point_scores(fake, real, "moons/test"),
    "all of features": lambda real, fake: feature_scores(Features(fake, None), reference(real), Named()),
    "copies of points": lambda real, fake: memorization_scores(fake, real, X, False, "moons", None),
    "class score": lambda real, fake: (inception_score(real), inception_score(fake)),
    "class accuracy": lambda real, fake: [
        class_scores(Features(X, logits), torch.zeros(40), reference(X), Named(), ("a", "b")) for logits in (real, fake)
    ],
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["real", "fake"])
@pytest.mark.parametrize("name", SCORES)
def test_one_row_that_is_not_finite_is_counted_and_refused(name, which, value):
    broken = X.clone()
    broken[7, 1] = value
    pair = {"real": X, "fake": X + 0.1} | {which: broken}
    with pytest.raises(NonFiniteError, match=r"1 of 40 .* not finite"):
        SCORES[name](**pair)
    SCORES[name](X, X + 0.1)


def test_integers_are_always_finite():
    check_finite(bytes=torch.zeros(3, 1, 2, 2, dtype=torch.uint8))


def test_an_empty_batch_changes_no_stream():
    empty = torch.zeros(0, 2)
    stream, rows = FeatureMoments(2), CatMetric(mean_and_stderr)
    for part in (empty, X[:15], empty, X[15:], empty):
        stream.update(part)
        rows.update(part[:, 0])
    expected = moments(X)
    found = stream.compute()
    assert found.n == 40
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.cov, expected.cov)
    assert rows.compute().n == 40


def test_the_moments_of_a_stream_of_numbers_keep_their_shapes():
    stream = FeatureMoments(1)
    stream.update(X[:, :1])
    found = stream.compute()
    assert found.mean.shape == (1,) and found.cov.shape == found.factor.shape == (1, 1)


def test_a_stream_that_is_not_finite_has_no_moments():
    stream = FeatureMoments(2)
    stream.update(X)
    stream.update(torch.full((1, 2), torch.nan))
    with pytest.raises(NonFiniteError, match="not finite"):
        stream.compute()
