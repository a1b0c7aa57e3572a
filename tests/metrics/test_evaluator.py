"""What is said of each score: its name, its numbers, and whether it may be trusted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genzoo.evaluation import samples as evaluator
from genzoo.evaluation.samples import (
    class_scores,
    feature_scores,
    memorization_scores,
    named,
    point_scores,
    stored,
    subset,
)
from genzoo.metrics.features import FeatureNetwork, Features
from genzoo.metrics.frechet import frechet_distance_of_features, frechet_infinity, frechet_stderr, moments
from genzoo.metrics.kernel import gaussian_mmd, kernel_distance, kernel_distance_stderr, median_distance
from genzoo.metrics.manifold import manifold
from genzoo.metrics.reference import reference
from genzoo.metrics.sample_size import TooFewSamplesError, check_references, check_sample_size
from genzoo.metrics.sliced_wasserstein import sliced_wasserstein
from genzoo.numerics.random import generator


class Pixels(FeatureNetwork):
    """The first pixels, as features and as logits."""

    def __init__(self, name: str = "digits", dim: int = 6):
        self.name, self.dim, self.sha256, self.resize, self.classes = name, dim, "0" * 64, "none", name

    def forward(self, images):
        x = images.flatten(1)[:, : self.dim].float() / 64
        return Features(x, 4 * x[:, :3])


def images(n: int, seed: int, low: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(low, 256, (n, 1, 4, 4), dtype=np.uint8))


NETWORK, REAL, FAKE = Pixels(), images(200, 0), images(150, 1, low=40)
CLASSES = torch.arange(200) % 3


def real(network: FeatureNetwork = NETWORK, name: str = "digits/train"):
    return reference(name, REAL, CLASSES, network, None)


@pytest.mark.parametrize(
    ("metric", "of_inception", "of_another"),
    [
        ("fd", "fid", "fd_digits"),
        ("fd_infinity", "fid_infinity", "fd_digits_infinity"),
        ("kd", "kid", "kd_digits"),
        ("class_score", "is", "class_score_digits"),
        ("precision", "precision", "precision_digits"),
        ("coverage", "coverage", "coverage_digits"),
    ],
)
def test_the_names_of_the_literature_are_inceptions_alone(metric, of_inception, of_another):
    assert named(metric, Pixels("inception")) == of_inception
    assert named(metric, Pixels("digits")) == of_another


def test_every_score_is_that_of_its_function_and_of_its_samples():
    x, y = NETWORK.extract(REAL).features, NETWORK.extract(FAKE).features
    found = feature_scores(Features(y, None), real(), NETWORK)
    shape = manifold(x[subset(200, 150)], y, 3, 5)  # sets of one size
    expected = {
        "fd_digits": (frechet_distance_of_features(y, moments(x)), frechet_stderr(y, moments(x))),
        "fd_digits_infinity": (frechet_infinity(y, moments(x)), frechet_stderr(y, moments(x))),
        "kd_digits": (kernel_distance(x, y), kernel_distance_stderr(x, y)),
        "precision_digits": (shape.precision, (shape.precision * (1 - shape.precision) / 150) ** 0.5),
        "recall_digits": (shape.recall, None),
        "density_digits": (shape.density, None),
        "coverage_digits": (shape.coverage, None),
    }
    assert set(found) == set(expected)
    for name, (value, stderr) in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-9)
        assert found[name].stderr == (stderr and pytest.approx(stderr, rel=1e-9))
        card = found[name].protocol
        assert (card["features"], card["features_sha256"], card["reference"]) == ("digits", "0" * 64, "digits/train")
        assert card["n_fake"] == 150 and "forced" not in card
    assert found["recall_digits"].value != found["precision_digits"].value
    assert found["kd_digits"].protocol["subset_size"] == 150
    assert found["recall_digits"].protocol["n_real"] == 150
    assert [found[f"{name}_digits"].protocol["k"] for name in shape._fields] == [3, 3, 5, 5]


def test_fewer_samples_than_features_are_refused():
    few, wide = Features(torch.randn(15, 16), None), Pixels(dim=16)
    check_sample_size(16, wide, force=False)
    for refused in (lambda: check_sample_size(15, wide, force=False), lambda: feature_scores(few, real(wide), wide)):
        with pytest.raises(TooFewSamplesError, match=r"metrics\.n=15: .* dimension 16 .*metrics\.force=true") as caught:
            refused()
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_reference_of_fewer_events_than_features_gives_no_distance_unless_forced_and_marked():
    wide, samples = Pixels(dim=16), Features(torch.randn(20, 16), None)
    small = reference("digits/test", REAL[:15], None, wide, None)
    found = feature_scores(samples, small, wide)
    assert "fd_digits" not in found and "fd_digits_infinity" not in found and found["kd_digits"].value is not None
    forced = feature_scores(samples, small, wide, force=True)
    assert forced["fd_digits"].protocol["forced"] == "15 real of 16 features" and "fd_digits_infinity" not in forced
    both = feature_scores(Features(torch.randn(9, 16), None), small, wide, force=True)["fd_digits"]
    assert both.protocol["forced"] == "9 samples and 15 real of 16 features"
    assert "fd_digits" not in feature_scores(
        samples, reference("digits/test", REAL[:1], None, wide, None), wide, force=True
    )
    check_references({"train": 16, "test": 2}, wide, force=False)
    check_references({"train": 15, "test": 2}, wide, force=True)
    check_references({"train": 15}, None, force=False)
    with pytest.raises(
        TooFewSamplesError,
        match=r"train \(15 real images\) and test \(2 real images\) .* dimension 16 .*metrics\.force",
    ):
        check_references({"train": 15, "test": 2}, wide, force=False)


def test_what_is_forced_is_marked_and_has_neither_error_nor_extrapolation():
    few, wide = Features(torch.randn(15, 16), None), Pixels(dim=16)
    found = feature_scores(few, real(wide), wide, force=True)
    assert found["fd_digits"].protocol["forced"] == "15 samples of 16 features"
    assert found["fd_digits"].stderr is None and "fd_digits_infinity" not in found
    assert "forced" not in found["kd_digits"].protocol
    enough = feature_scores(Features(torch.randn(16, 16), None), real(wide), wide, force=True)
    assert "forced" not in enough["fd_digits"].protocol


def test_classes_that_were_asked_for_are_counted_where_the_network_knows_them():
    fake, y = NETWORK.extract(FAKE), torch.arange(150) % 3
    found = class_scores(fake, y, real(), NETWORK, ("zero", "one", "two"))
    right = (fake.logits.argmax(1) == y).double()
    names = ("class_score", "class_accuracy", "fd_per_class", "recall_per_class")
    assert set(found) == {f"{name}_digits" for name in names}
    features = NETWORK.extract(REAL).features
    for i, (name, value) in enumerate(found["recall_per_class_digits"].detail["per_class"].items()):
        n = min(int((y == i).sum()), int((i == CLASSES).sum()))
        chosen = [side[subset(len(side), n)] for side in (features[i == CLASSES], fake.features[y == i])]
        assert name == ("zero", "one", "two")[i] and value == manifold(*chosen, 3, 5).recall
    values = found["recall_per_class_digits"].detail["per_class"].values()
    assert found["recall_per_class_digits"].value == pytest.approx(np.mean(list(values)))
    assert found["class_accuracy_digits"].value == float(right.mean())
    assert found["class_accuracy_digits"].detail["per_class"]["one"] == float(right[y == 1].mean())
    each = [
        frechet_distance_of_features(fake.features[y == i], moments(NETWORK.extract(REAL[i == CLASSES]).features))
        for i in range(3)
    ]
    assert list(found["fd_per_class_digits"].detail["per_class"].values()) == pytest.approx(each, rel=1e-9)
    assert found["fd_per_class_digits"].value == pytest.approx(np.mean(each), rel=1e-9)


def test_classes_of_other_data_are_not_counted():
    fake, y = NETWORK.extract(FAKE), torch.arange(150) % 3
    for reference_, labels in ((real(name="mnist/train"), y), (real(), None)):
        assert set(class_scores(fake, labels, reference_, NETWORK, ("a", "b", "c"))) == {"class_score_digits"}


def test_a_class_with_fewer_samples_than_features_has_no_distance():
    fake = NETWORK.extract(FAKE)
    y = torch.zeros(150, dtype=torch.int64)
    y[:5] = 1
    found = class_scores(fake, y, real(), NETWORK, ("zero", "one", "two"))
    assert set(found["fd_per_class_digits"].detail["per_class"]) == {"zero"}
    assert found["fd_per_class_digits"].protocol["classes"] == 1
    assert found["class_accuracy_digits"].detail["per_class"]["two"] is None


def test_points_are_compared_by_slices_and_by_a_kernel_of_the_data_s_width():
    x, y = torch.randn(80, 2), 0.5 + torch.randn(60, 2)
    found = point_scores(y, x, "moons/test")
    assert found["sliced_wasserstein"].value == sliced_wasserstein(x, y)
    assert found["mmd"].value == gaussian_mmd(x, y, median_distance(x))
    wider = point_scores(2 * y, x, "moons/test")["mmd"]
    assert found["mmd"].protocol["bandwidth"] == wider.protocol["bandwidth"] == median_distance(x)


def test_copies_raise_a_warning_and_fresh_images_do_not(tmp_path):
    train, test = images(200, 0), images(100, 1)
    scores, warning = memorization_scores(torch.cat([train[:50], FAKE[:50]]), train, test, False, "digits", tmp_path)
    assert warning == ("memorised: 50.0% of the samples are copies of training examples (0.0% for the test split)")
    assert (scores["copied"].value, scores["copied"].detail) == (0.5, {"of_test": 0.0})
    assert (scores["exact_copies"].value, scores["exact_copies"].detail) == (50, {"of_test": 0})
    assert "shifted" not in scores, "the insides of tiny images are alike by chance"
    large = torch.randint(0, 256, (250, 1, 8, 8), generator=generator("large")).to(torch.uint8)
    moved = torch.nn.functional.pad(large[:50], (1, 0, 0, 1))[..., 1:, :-1]
    scores, warning = memorization_scores(moved, large[:200], large[200:], False, "digits", None)
    assert warning == (
        "memorised: 100.0% of the samples are copies of training examples up to a shift by a pixel (0.0% for the test "
        "split)"
    )
    assert (scores["shifted"].value, scores["copied"].value, scores["exact_copies"].value) == (1.0, 0.0, 0)
    assert memorization_scores(images(100, 2), train, test, False, "digits", tmp_path)[1] is None
    assert memorization_scores(train[:50].flip(-1), train, test, False, "digits", tmp_path)[1] is None
    assert memorization_scores(train[:50].flip(-1), train, test, True, "digits", tmp_path)[1] is not None
    # Neighbours of the test split are kept, with mirror images and without.
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_few_of_many_samples_are_looked_at_and_said(monkeypatch):
    monkeypatch.setattr(evaluator, "NEIGHBOURS", 90)
    found = feature_scores(NETWORK.extract(FAKE), real(), NETWORK)
    assert (found["precision_digits"].protocol["n_real"], found["precision_digits"].protocol["n_fake"]) == (90, 90)
    assert (found["fd_digits"].protocol["n_real"], found["fd_digits"].protocol["n_fake"]) == (200, 150)


def test_integers_are_stored_as_bytes_and_points_as_they_are():
    x = torch.randn(5, 2)
    assert stored(x, None) is x
    k = torch.arange(17, dtype=torch.uint8)
    assert stored(k, 17).tolist() == [round(i * 255 / 16) for i in range(17)]
    assert torch.equal(stored(torch.arange(256, dtype=torch.uint8), 256), torch.arange(256, dtype=torch.uint8))
