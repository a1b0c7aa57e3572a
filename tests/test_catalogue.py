"""Runs write exactly the metrics that the catalogue declares, under distinct names, and reports use its units."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from genzoo import catalogue
from genzoo.catalogue import METRICS, declared, direction, label, lookup
from genzoo.config.instantiate import build
from genzoo.data.dataset import DataSet, Split
from genzoo.data.shapes import shapes
from genzoo.evaluation.density import reconstruction
from genzoo.evaluation.records import to_record
from genzoo.evaluation.samples import class_scores, named, stored
from genzoo.evaluation.scores import Trained, evaluate_model, pick_network
from genzoo.evaluation.settings import EvalData, EvalSettings
from genzoo.evaluation.text import attribute_scores, clip_scores
from genzoo.metrics.features import Embedded, EmbeddedContrastive, FeatureNetwork
from genzoo.metrics.reference import reference
from genzoo.model import GenerativeModel
from genzoo.report import leaderboard, texts, wandb_view
from tests.captions import squares
from tests.commands import described
from tests.conftest import CLASSIFIERS, composed
from tests.report import entry, run, scored
from tests.report.test_leaderboard import tables_of
from tests.test_interface import DATA, Case, cases

SETTINGS = EvalSettings(n=70, events=2, num_samples=4, batch_size=100, throughput=1)
SPENT = Trained(costs={"images": 1, "train_seconds": 1.0, "train_flops": 1})


@functools.cache
def subject(name: str) -> tuple[EvalData, FeatureNetwork | None]:
    """The first events of a data set, and the network that compares them."""
    data = build(composed("model=vae", f"data={name}")["data"]["source"], "data")
    train, test = (Split(split.x[:n], split.y[:n]) for split, n in ((data.train, 1000), (data.test, 80)))
    network = pick_network(SETTINGS, name, data.event, needed=True)
    return EvalData(dataclasses.replace(data, train=train, test=test), name, flip=False), network


def test_every_family_writes_declared_metrics_and_every_declared_metric_is_written():
    flow = "prior=flow_matching"  # whose density is an estimate, and that of a codec a bound
    more = [Case("latent", kind, (*words, flow), False) for kind, words in DATA.items()]
    more += [Case("ebm", "image", (*DATA["image"], "model.labels=joint"), True)]  # a classifier, too
    every = {case: model for case, model in cases().values() if isinstance(model, GenerativeModel)}
    written: set[str] = set()
    for case, model in {**every, **{case: case.fresh() for case in more}}.items():
        captions = EvalData(squares(), "squares", flip=False), None
        chosen, network = captions if case.captioned else subject(case.config["data"]["name"])
        written |= evaluate_model(model, chosen, SETTINGS, network, trained=SPENT)["metrics"].keys()
    for name in CLASSIFIERS:
        classifier = build(described(f"model={name}", "data=digits")["model"], "model")
        written |= evaluate_model(classifier, subject("digits")[0], SETTINGS, trained=SPENT)["metrics"].keys()
    # Distances of classes need more samples, and SSIM larger images, than are worth the time of every family.
    chosen, network = subject("digits")
    images, y = stored(chosen.data.train.x, chosen.data.levels), chosen.data.train.y
    of_split = reference("digits/train", images, y, network, None)
    of_classes = class_scores(network.extract(images), y, of_split, network, chosen.data.classes)
    written |= {f"train/{name}" for name in of_classes}
    text = shapes(size=16, n=40, n_test=10)
    scores = attribute_scores(
        text.train.x, text.tokenizer.decode(text.train.y), text.checker, "text/attributes", "train"
    )
    written |= {*scores, *(name.replace("attributes", "held_out") for name in scores)}
    large = Split(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), None)
    vae = Case("vae", "image", ("data=digits", "data.shape=[1,16,16]"), False).fresh().eval()
    shipped = EmbeddedContrastive("clip_shapes")
    written |= clip_scores(text.train.x, text.tokenizer.decode(text.train.y), shipped, vae, "shapes/train").keys()
    written |= reconstruction(vae, DataSet(large, large, levels=17), SETTINGS, {}).keys()
    assert not [name for name in written if declared(name) is None]
    assert [metric.name for metric in METRICS if metric not in {lookup(name) for name in written}] == []


def test_names_of_metrics_are_unlike_and_complete():
    assert len({metric.name for metric in METRICS}) == len({metric.base for metric in METRICS}) == len(METRICS)
    names = [name for metric in METRICS for name, _ in metric.variants]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.label and metric.unit and metric.meaning and "\n" not in metric.meaning
        assert not metric.source or "https://" in metric.source
        for name, _ in metric.variants:
            of_split = name.replace("{split}", "train").replace("{scored}", "validation")
            assert lookup(of_split.replace("{network}", "fashion_mnist")) is metric


@pytest.mark.parametrize(
    ("name", "base", "unit", "said"),
    [
        ("test/fid", "fd", "squared distance", "FID to test"),
        ("train/fd_fashion_mnist", "fd", "squared distance", "FD (fashion_mnist) to train"),
        ("test/fd_digits_infinity", "fd_infinity", "squared distance", "FD of infinitely many samples (digits) to test"),
        ("test/fid_infinity", "fd_infinity", "squared distance", "FID of infinitely many samples to test"),
        ("all/kid", "kd", "squared MMD", "KID"),
        ("train/is", "class_score", "classes", "IS to train"),
        ("train/class_score_digits", "class_score", "classes", "class score (digits) to train"),
        ("train/fd_per_class_digits", "fd_per_class", "squared distance, mean over classes",
         "FD per class (digits) to train"),
        ("test/precision", "precision", "share", "precision to test"),
        ("test/density_identity", "density", "share", "density (identity) to test"),
        ("reconstruction/psnr", "reconstruction/psnr", "dB", "PSNR of reconstructions"),
        ("test/nll_upper", "nll_upper", "nats", "nats (upper bound)"),
        ("validation/nll_upper", "nll_upper", "nats", "nats (upper bound) of validation"),
        ("validation/kd_digits", "kd", "squared MMD", "KD (digits) to validation"),
    ],
)  # fmt: skip
def test_names_have_their_metric_and_label(name, base, unit, said):
    metric = lookup(name)
    assert (metric.base, metric.unit, label(name), texts.label(name)) == (base, unit, said, said)


@pytest.mark.parametrize("name", ["", "fid", "test/", "valid/fid", "train/bpd", "test/fd_", "test/loss", "a/test/fid"])
def test_other_names_are_in_no_catalogue(name):
    assert declared(name) is None and label(name) is None
    with pytest.raises(KeyError, match="catalogue"):
        lookup(name)
    with pytest.raises(KeyError, match="catalogue"):
        to_record(name, 1.0, None, {}, {})


def test_a_record_has_unit_and_direction_of_its_metric():
    written = to_record("memorisation/nearest_ratio", 1.0, None, {"n": 3}, {})
    assert (written["better"], written["card"]["protocol"]) == ("neither", {"unit": "samples' over test's", "n": 3})


def test_every_metric_of_a_network_has_a_name_on_inception():
    network = Embedded("digits")
    for metric in METRICS:
        if "{network}" in metric.name:
            assert named(metric.base, network) == metric.name.replace("{network}", "digits").removeprefix("{split}/")
            assert metric.on(None) == metric.variants[1][0].removeprefix("{split}/")


def test_reports_name_declared_metrics():
    shown = [name.replace("*", "_digits").replace("__", "_") for name in leaderboard.HEADLINES]
    shown += [*wandb_view.QUALITY, *wandb_view.DENSITY, *wandb_view.COST]
    assert not [name for name in shown if declared(name) is None]


def test_directions_are_the_catalogue_s_and_of_other_names_the_file_s(tmp_path):
    assert (direction("test/fid", "higher"), direction("memorisation/nearest_ratio", "lower")) == ("lower", None)
    assert (direction("test/x", "higher"), direction("test/x", ["lower"]), direction("test/x")) == (
        "higher",
        None,
        None,
    )
    for model, fd in {"vae": 1.0, "gan": 2.0}.items():
        metrics = scored(fd) | {"test/fd_digits": entry(fd, 0.1, "higher"), "test/x": entry(fd, 0.1, "higher")}
        run(tmp_path, model=model, metrics=metrics)
    (table,) = tables_of(tmp_path)
    assert [leaderboard.leaders(table, name)[0][0].label for name in ("test/fd_digits", "test/x")] == ["vae", "gan"]


def test_the_catalogue_is_frozen():
    with pytest.raises(AttributeError):
        METRICS[0].unit = "nats"
    assert all(catalogue.BY_BASE[metric.base] is metric for metric in METRICS)
