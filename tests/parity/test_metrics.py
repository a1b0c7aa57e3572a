"""Distances, scores and Inception's features against torch-fidelity, clean-fid and prdc, on the same features and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from genzoo.data.pictures import read_samples
from genzoo.metrics import kernel
from genzoo.metrics.features import DINOv2, Inception
from genzoo.metrics.frechet import frechet_distance, frechet_distance_of_features, moments
from genzoo.metrics.inception_score import inception_score
from genzoo.metrics.kernel import kernel_distance
from genzoo.metrics.manifold import manifold


def features(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / d**0.5
    return torch.from_numpy(shift + scale * (rng.normal(size=(n, d)) @ mix)).float()


def statistics(x: Tensor) -> dict[str, np.ndarray]:
    x = x.double().numpy()
    return {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)}


# Features


def test_the_frechet_distance_is_torch_fidelitys():
    theirs = pytest.importorskip("torch_fidelity.metric_fid").fid_statistics_to_metric
    x, y = features(500, 64, 0), features(400, 64, 1, 1.2, 0.1)
    expected = theirs(statistics(x), statistics(y), False)["frechet_inception_distance"]
    assert frechet_distance_of_features(x, moments(y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("d", "n", "m"), [(64, 500, 400), (512, 1500, 1200)])
def test_the_frechet_distance_is_clean_fids(d, n, m):
    theirs = pytest.importorskip("cleanfid.fid").frechet_distance
    x, y = features(n, d, 0), features(m, d, 1, 1.2, 0.1)
    expected = theirs(*statistics(x).values(), *statistics(y).values())
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(float(expected), rel=1e-8)


def test_the_kernel_distance_is_torch_fidelitys(monkeypatch):
    theirs = pytest.importorskip("torch_fidelity.metric_kid").kid_features_to_metric
    monkeypatch.setattr(kernel, "SUBSETS", 8)
    real, fake = features(1100, 16, 0), features(1300, 16, 1, 1.2, 0.1)
    expected = theirs(fake.double(), real.double(), kid_subsets=8, verbose=False)["kernel_inception_distance_mean"]
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [100, 1237])
def test_the_score_is_torch_fidelitys(n):
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = 3 * torch.randn(n, 20)
    expected, found = theirs(logits), inception_score(logits)
    assert found.value == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert found.stderr == pytest.approx(
        expected["inception_score_std"] / 3, rel=1e-9
    )  # theirs is of one split, over n


def test_neighbourhoods_are_those_of_prdc():
    theirs = pytest.importorskip("prdc").compute_prdc
    real, fake = features(300, 8, 0).double(), features(250, 8, 0, 0.7, 0.5).double()
    narrow, wide = (theirs(real.numpy(), fake.numpy(), k) for k in (3, 5))
    expected = narrow["precision"], narrow["recall"], wide["density"], wide["coverage"]
    assert manifold(real, fake, 3, 5) == pytest.approx(expected, rel=1e-12)
    assert min(expected) > 0.1 and max(expected[:2]) < 1


# Pictures


def random_weights(monkeypatch, file: Path) -> None:
    """Write weights of torch-fidelity's network which keep the size of what passes through it."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.normal_(network.fc.weight, std=0.3)
    torch.save(network.state_dict(), file)


def pictures(folder: Path, n: int, seed: int, contrast: float) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(n):
        blocks = rng.uniform(128 - contrast, 128 + contrast, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        pixels = (blocks + rng.normal(scale=20, size=(32, 32, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_pictures_have_the_fid_kid_and_score_of_torch_fidelity(monkeypatch, tmp_path):
    fidelity = pytest.importorskip("torch_fidelity")
    n, size = 20, 15
    random_weights(monkeypatch, tmp_path / "weights.pth")
    samples, data = pictures(tmp_path / "samples", n, 0, 120), pictures(tmp_path / "data", n, 1, 60)
    expected = fidelity.calculate_metrics(
        input1=str(samples), input2=str(data), feature_extractor_weights_path=str(tmp_path / "weights.pth"),
        cuda=False, isc=True, fid=True, kid=True, kid_subset_size=size, cache=False, verbose=False, batch_size=n,
    )  # fmt: skip

    monkeypatch.setattr(kernel, "SUBSET_SIZE", size)
    network = Inception(tmp_path / "weights.pth")
    fake, real = (network.extract(read_samples(folder, (3, 32, 32), 256)) for folder in (samples, data))
    assert fake.features.shape == (n, 2048) and fake.logits.shape == (n, 1008)
    found = {
        "frechet_inception_distance": frechet_distance_of_features(fake.features, moments(real.features)),
        "kernel_inception_distance_mean": kernel_distance(real.features, fake.features),
        "inception_score_mean": inception_score(fake.logits).value,
    }
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-3)
    assert found["inception_score_mean"] > 1.01 and found["kernel_inception_distance_mean"] > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = network.extract(read_samples(samples, (3, 32, 32), 256)[:2])
    torch.testing.assert_close(again.features, fake.features[:2], rtol=1e-3, atol=1e-4)
    assert network.is_inception and len(network.sha256) == 64


@pytest.mark.parametrize("side", [224, 518])
def test_dinov2_sees_what_a_picture_library_resizes(monkeypatch, tmp_path, side):
    monkeypatch.setattr(DINOv2, "ARCHITECTURE", "vit_small_patch14_dinov2")  # the same, smaller
    timm = pytest.importorskip("timm")
    peer = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=side).eval()
    torch.nn.init.normal_(peer.pos_embed, std=0.02)
    for name, weight in peer.named_parameters():
        if name.endswith(".gamma"):  # which begin so small that the class token would see no picture
            torch.nn.init.ones_(weight)
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    resized = [np.array(picture.resize((224, 224), Image.Resampling.BICUBIC)) / 255 for picture in pictures]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = torch.stack([torch.from_numpy((image - mean) / std).permute(2, 0, 1).float() for image in resized])
    peer.set_input_size((224, 224))
    with torch.no_grad():
        expected = peer(x)
    found = DINOv2(tmp_path / "weights.pth").extract(images).features
    # A picture library rounds to bytes; two pictures differ by more.
    apart = float((expected[0] - expected[1]).norm())
    assert float((found - expected).norm(dim=1).max()) < 0.02 * apart
