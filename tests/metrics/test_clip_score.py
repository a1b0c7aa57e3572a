"""Embedded contrastive networks, the score of captions in their space, and who was trained against them."""

from __future__ import annotations

import functools
import hashlib
import json

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import Tokens
from genzoo.data.shapes import pictures
from genzoo.diffusion.denoiser import replaced
from genzoo.diffusion.guidance import ClassifierGuidance, GuidedSampler
from genzoo.evaluation.contrastive import candidate_sets
from genzoo.evaluation.text import clip_scores, contrastive_network, trained_against
from genzoo.families.ddpm import DDPM
from genzoo.loading import shipped_encoder
from genzoo.metrics.clip_score import ClipScore, clip_score, contains, weights_sha256
from genzoo.metrics.features import (
    CONTRASTIVE,
    EMBEDDED,
    EmbeddedContrastive,
    FeatureError,
    Features,
    default_feature_network,
    embedded,
    feature_network,
)

NAMES = [name for name in embedded() if name.startswith(CONTRASTIVE)]


@pytest.fixture(scope="module", name="network")
def of_shapes() -> EmbeddedContrastive:
    return EmbeddedContrastive("clip_shapes")


@functools.cache
def held_out(size: int = 32, n: int = 400) -> tuple[Tensor, list[str]]:
    """Pictures of combinations that the network has not seen, drawn for this test."""
    found = pictures(n, size, seed=77, split="test")
    return found.x, found.captions


# The networks


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_the_one_whose_training_is_on_record(name):
    network, record = EmbeddedContrastive(name), json.loads((EMBEDDED / "networks.json").read_text())[name]
    content = (EMBEDDED / f"{name}.safetensors").read_bytes()
    assert network.sha256 == record["sha256"] == hashlib.sha256(content).hexdigest()
    assert (network.dim, len(content)) == (record["dim"], record["bytes"]) and len(content) < 1_000_000
    assert sum(p.numel() for p in network.network.parameters()) == record["weights"]
    assert network.tokenizer.sha256 == record["tokenizer_sha256"]
    assert (network.tokenizer.length, network.tokenizer.vocabulary) == (record["length"], record["vocabulary"])
    assert not any(p.requires_grad for p in network.network.parameters()) and not network.network.training


@pytest.mark.parametrize(("size", "least"), [(16, 0.6), (32, 0.9), (64, 0.9)])
def test_captions_of_unseen_combinations_are_found(network, size, least):
    """Of 100 captions the right one, at the size of the training and at others."""
    x, captions = held_out(size)
    tokens = network.tokenizer.encode(captions, truncate=True)
    (chosen, *_) = candidate_sets(tokens, 100)
    f = network.extract(x[chosen]).features
    g = network.embed_text([captions[i] for i in chosen.tolist()])
    assert float(((f @ g.T).argmax(1) == torch.arange(100)).double().mean()) > least


def test_features_are_embeddings_with_a_mean_square_of_one(network):
    x, _ = held_out()
    found = network.extract(x[:20], batch_size=7)
    assert found.logits is None and found.features.dtype == torch.float32
    torch.testing.assert_close(found.features.square().mean(1), torch.ones(20))
    torch.testing.assert_close(found.features, network.extract(x[:20]).features, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.extract(x[:20], batch_size=7).features, found.features)
    grey = x[:3, :1]
    torch.testing.assert_close(network.extract(grey).features, network.extract(grey.expand(-1, 3, -1, -1)).features)


def test_data_with_captions_are_seen_by_their_own_network():
    assert default_feature_network("shapes", (3, 32, 32), 256) == "clip_shapes"
    assert isinstance(feature_network("clip_shapes"), EmbeddedContrastive)
    assert contrastive_network("shapes", None) is feature_network("clip_shapes")
    assert (
        contrastive_network("digits", None) is None and contrastive_network("digits", feature_network("digits")) is None
    )
    network = feature_network("clip_shapes")
    assert contrastive_network("folder", network) is network


@pytest.mark.parametrize("suffix", [".safetensors", ".tokenizer.json"])
def test_a_file_that_is_not_the_one_on_record_is_refused(monkeypatch, tmp_path, suffix):
    for path in EMBEDDED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("genzoo.metrics.features.EMBEDDED", tmp_path)
    file = tmp_path / f"clip_shapes{suffix}"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(FeatureError, match=f"{file.name}: its SHA-256"):
        EmbeddedContrastive("clip_shapes")


# The score


class Known(EmbeddedContrastive):
    """A network whose embeddings are given: images by their first pixels, captions by their numbers."""

    def __init__(self) -> None:
        self.network, self.dim = nn.Linear(1, 1), 2

    def extract(self, images: Tensor, batch_size: int = 250) -> Features:
        return Features(5 * images[:, 0, 0, :2].float(), None)

    def embed_text(self, captions) -> Tensor:
        return torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])[[int(caption) for caption in captions]]


def image(*first: int) -> Tensor:
    x = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    x[0, 0, 0, : len(first)] = torch.tensor(first, dtype=torch.uint8)
    return x


def test_the_score_is_two_and_a_half_times_the_positive_cosine():
    x = torch.cat([image(3, 4), image(3, 4), image(3, 4), image(0, 7)])
    found = clip_score(x, ["0", "1", "2", "1"], Known())
    torch.testing.assert_close(found, torch.tensor([1.5, 2.0, 0.0, 2.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="captions: 1 for 4 images"):
        clip_score(x, ["0"], Known())


def test_the_metric_is_the_mean_over_all_updates():
    metric = ClipScore(Known())
    metric.update(torch.cat([image(3, 4), image(3, 4)]), ["0", "1"])
    metric.update(image(0, 7), ["1"])
    assert float(metric.compute()) == pytest.approx((1.5 + 2.0 + 2.5) / 3)


def test_right_captions_score_higher_than_those_of_others(network):
    x, captions = held_out()
    right, wrong = (clip_score(x, said, network) for said in (captions, captions[1:] + captions[:1]))
    assert float((right > wrong).double().mean()) > 0.98 and float(right.mean()) > 2 * float(wrong.mean())


# Who was trained against a network


def contrastive_model(name: str = "clip_shapes") -> nn.Module:
    return shipped_encoder(name)


def test_a_model_that_contains_the_network_is_found_out(network):
    encoder = contrastive_model()
    assert contains(nn.Sequential(nn.Linear(2, 2), encoder), network)
    assert contains(nn.Sequential(encoder).double(), network), "in another precision"
    before = weights_sha256(network.network)
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-3
    assert not contains(encoder, network) and weights_sha256(network.network) == before
    assert not contains(nn.Linear(2, 2), network)


def test_a_model_that_is_guided_by_the_network_is_found_out(network):
    model = DDPM((3, 32, 32), Tokens(network.tokenizer.length, network.tokenizer.vocabulary), levels=256)
    assert not trained_against(model, network)
    guided = replaced(
        model,
        sampler=GuidedSampler(
            model.sampler, functools.partial(ClassifierGuidance, classifier=contrastive_model(), scale=1.0)
        ),
    )
    assert trained_against(guided, network)
    x, captions = held_out()
    for drawn_by, said in ((model, False), (guided, True)):
        (name, score), *rest = clip_scores(x[:50], captions[:50], network, drawn_by, "shapes/test").items()
        assert name == "text/clip_score_clip_shapes" and not rest
        assert score.protocol["trained_against"] is said and score.protocol["features_sha256"] == network.sha256
        assert score.protocol["tokenizer_sha256"] == network.tokenizer.sha256 and score.protocol["n_fake"] == 50
        assert score.value == pytest.approx(float(clip_score(x[:50], captions[:50], network).mean()))


def test_a_shipped_encoder_is_the_network_as_a_model(network):
    encoder, (x, captions) = contrastive_model(), held_out()
    y = network.tokenizer.encode(captions[:20], truncate=True)
    scaled = (x[:20].float() + 0.5) / 128 - 1
    torch.testing.assert_close(network.dim**0.5 * encoder.embed_image(scaled), network.extract(x[:20]).features)
    torch.testing.assert_close(encoder.embed_text(y), network.embed_text(captions[:20]))
    with pytest.raises(ValueError, match=r"encoder\.name=clip_digits: is not among clip_"):
        shipped_encoder("clip_digits")
