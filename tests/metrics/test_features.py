"""Feature networks: what they see, what they are made of, and what they say where they cannot be had."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from genzoo.data import digits
from genzoo.evaluation.samples import stored
from genzoo.metrics import features
from genzoo.metrics import reference as reference_module
from genzoo.metrics.features import (
    CONTRASTIVE,
    EMBEDDED,
    INCEPTION_URL,
    DINOv2,
    Embedded,
    FeatureError,
    Identity,
    Inception,
    cache_folder,
    default_feature_network,
    embedded,
    feature_network,
)
from genzoo.runs import ResourceError

CLOTHES = Path(__file__).parent / "clothes.png"  # of Fashion-MNIST's test split, forty of each class in a row


def digits_as_bytes() -> torch.Tensor:
    return stored(digits().test.x, 17)


def refusal(make) -> str:
    with pytest.raises(FeatureError) as caught:
        make()
    said = str(caught.value)
    assert "\n" not in said and caught.value.exit_code == 2
    return said


# Embedded networks


def test_points_are_their_own_features():
    x = torch.randn(7, 2, dtype=torch.float64)
    found = Identity().extract(x, batch_size=3)
    assert torch.equal(found.features, x.float()) and found.logits is None


@pytest.mark.parametrize("name", [name for name in embedded() if not name.startswith(CONTRASTIVE)])
def test_an_embedded_network_is_the_one_whose_training_is_on_record(name):
    network, record = Embedded(name), json.loads((EMBEDDED / "networks.json").read_text())[name]
    content = (EMBEDDED / f"{name}.safetensors").read_bytes()
    assert network.sha256 == record["sha256"] == hashlib.sha256(content).hexdigest()
    assert (network.dim, len(content)) == (record["dim"], record["bytes"])
    assert sum(p.numel() for p in network.network.parameters()) == record["weights"]


def test_digits_are_recognised_from_the_bytes_of_a_picture_file():
    logits = Embedded("digits").extract(digits_as_bytes()).logits
    assert float((logits.argmax(1) == digits().test.y).double().mean()) > 0.97


def test_clothes_are_recognised_from_the_bytes_of_a_picture_file():
    with Image.open(CLOTHES) as picture:
        sheet = torch.from_numpy(np.array(picture))
    images = sheet.unflatten(0, (10, 28)).unflatten(2, (40, 28)).transpose(1, 2).reshape(400, 1, 28, 28)
    logits = Embedded("fashion_mnist").extract(images).logits
    assert float((logits.argmax(1) == torch.arange(10).repeat_interleave(40)).double().mean()) > 0.88


def test_a_network_that_is_not_the_one_on_record_is_refused(monkeypatch, tmp_path):
    for path in EMBEDDED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(features, "EMBEDDED", tmp_path)
    file = tmp_path / "digits.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # still a network, by its form
    file.write_bytes(content)
    assert str(file) in refusal(lambda: Embedded("digits"))


def test_features_are_those_of_the_network_on_the_range_from_minus_one_to_one():
    network, x = Embedded("digits"), digits_as_bytes()[:20]
    expected, logits = network.network(x.float() / 127.5 - 1)
    found = network.extract(x)
    torch.testing.assert_close(found.features, expected)
    torch.testing.assert_close(found.logits, logits)


def test_features_depend_neither_on_the_batch_nor_on_autocast():
    network, x = Embedded("digits"), digits_as_bytes()[:40]
    expected = network.extract(x)
    for size in (1, 7, 40):
        torch.testing.assert_close(network.extract(x, size).features, expected.features, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.extract(x)
    assert torch.equal(found.features, expected.features) and torch.equal(found.logits, expected.logits)
    assert found.features.dtype == torch.float32 and not found.features.requires_grad


def test_features_leave_the_weights_alone():
    network, x = Embedded("digits"), digits_as_bytes()[:40]
    before = {name: value.clone() for name, value in network.network.state_dict().items()}
    network.extract(x)
    assert all(torch.equal(before[name], value) for name, value in network.network.state_dict().items())
    assert not any(p.requires_grad for p in network.network.parameters())


def test_colours_become_their_mean_and_sizes_that_of_the_network():
    network, grey = Embedded("digits"), digits_as_bytes()[:20]
    torch.testing.assert_close(network.extract(grey.expand(-1, 3, -1, -1)).features, network.extract(grey).features)
    large = grey.repeat_interleave(4, 2).repeat_interleave(4, 3)
    resized = [
        torch.frombuffer(
            bytearray(Image.fromarray(x[0].numpy()).resize((8, 8), Image.Resampling.BILINEAR).tobytes()),
            dtype=torch.uint8,
        ).view(1, 8, 8)
        for x in large
    ]
    # A picture library rounds to bytes, which the network does not.
    torch.testing.assert_close(
        network.extract(large).features, network.extract(torch.stack(resized)).features, rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize(
    ("data", "shape", "levels", "name"),
    [
        ("moons", (2,), None, "identity"),
        ("digits", (1, 8, 8), 17, "digits"),
        ("mnist", (1, 28, 28), 256, "fashion_mnist"),
        ("fashion_mnist", (1, 28, 28), 256, "fashion_mnist"),
        ("cifar10", (3, 32, 32), 256, "inception"),
        ("folder", (1, 64, 64), 256, "inception"),
    ],
)
def test_data_are_seen_by_the_network_that_knows_their_like(data, shape, levels, name):
    assert default_feature_network(data, shape, levels) == name


def test_an_unknown_network_is_refused_with_the_names_of_all():
    said = refusal(lambda: feature_network("resnet"))
    assert all(name in said for name in ("metrics.features=resnet", "inception", "dinov2", "digits", "identity"))


def test_a_network_is_made_once():
    assert feature_network("digits") is feature_network("digits")


# Inception: what is accepted


@pytest.fixture(name="cache")
def empty_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("GENZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "cache"


def unreachable(*_, **__):
    raise urllib.error.URLError("no route to host")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("GENZOO_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("GENZOO_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "genzoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "genzoo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the specification
    assert cache_folder() == Path.home() / ".cache" / "genzoo"


def test_without_a_home_the_cache_is_a_private_folder(monkeypatch, tmp_path):
    for name in ("GENZOO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(features, "home", lambda: None)
    monkeypatch.setattr(features.tempfile, "tempdir", str(tmp_path))
    features._temporary_home.cache_clear()
    folder = cache_folder()
    assert folder == cache_folder() and folder.parent.parent == tmp_path
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    features._temporary_home.cache_clear()


def test_a_cache_that_cannot_be_written_to_is_said_and_harms_nothing(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GENZOO_CACHE", str(tmp_path / "file" / "cache"))
    features.check_cache()
    assert re.match(r"genzoo: GENZOO_CACHE=\S+: cannot be written to: Not a directory: ", capsys.readouterr().err)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(features, "urlopen", lambda *_, **__: io.BytesIO(b"weights"))
    assert features._published_inception() == b"weights"


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), ResourceError("the disk is full")])
def test_a_cache_that_fills_up_harms_nothing(monkeypatch, tmp_path, error):
    def write(path, data):
        raise error

    monkeypatch.setattr(reference_module, "write_atomically", write)
    made = reference_module.cached(tmp_path, {"a": 1}, lambda: {"x": torch.ones(2)})
    assert torch.equal(made["x"], torch.ones(2))


def test_without_network_and_weights_one_line_says_what_to_get_and_what_to_take_instead(monkeypatch, cache):
    monkeypatch.setattr(features, "urlopen", unreachable)
    said = refusal(Inception)
    file = "weights-inception-2015-12-05-6726825d.pth"
    for word in (file, INCEPTION_URL, str(cache), "no route to host", "metrics.inception_weights=FILE"):
        assert word in said
    assert f"metrics.features={embedded()[-1]}" in said
    assert not cache.exists()


def served(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(features, "urlopen", lambda *_, **__: io.BytesIO(content))


def test_a_download_with_another_hash_is_not_kept(monkeypatch, cache):
    served(monkeypatch, b"something else")
    said = refusal(Inception)
    assert hashlib.sha256(b"something else").hexdigest() in said and "download discarded" in said
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_download_with_the_right_hash_is_kept_and_not_downloaded_again(monkeypatch, cache):
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"right").hexdigest())
    served(monkeypatch, b"right")
    assert features._published_inception() == b"right"
    monkeypatch.setattr(features, "urlopen", unreachable)
    assert features._published_inception() == b"right"
    assert [path.read_bytes() for path in cache.iterdir()] == [b"right"]


@pytest.mark.parametrize("folder", ["cache", "hub/checkpoints"])
def test_a_damaged_file_on_disk_is_not_used(monkeypatch, cache, folder):
    home = cache.parent / folder / INCEPTION_URL.rpartition("/")[2]
    home.parent.mkdir(parents=True)
    home.write_bytes(b"cut off")
    monkeypatch.setattr(features, "urlopen", unreachable)
    assert "was not downloaded" in refusal(Inception)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"cut off").hexdigest())
    assert features._published_inception() == b"cut off"


def test_the_published_hash_is_the_one_that_the_file_is_named_after():
    assert len(features.INCEPTION_SHA256) == 64 and features.INCEPTION_SHA256[:8] in INCEPTION_URL


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["torch", "torch old", "pickle"])
def test_a_program_that_calls_itself_weights_is_refused_and_not_run(tmp_path, form):
    file, marker = tmp_path / "weights.pth", tmp_path / "executed"
    state = {"Conv2d_1a_3x3.conv.weight": torch.zeros(2), "fc.bias": Evil(marker)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "torch")
    assert str(file) in refusal(lambda: Inception(file))
    assert not marker.exists()
    torch.load(file, weights_only=False) if form != "pickle" else pickle.loads(file.read_bytes())
    assert marker.exists()  # so would it have run


def wrong_files(folder: Path) -> dict[str, Path]:
    torch.save({"fc.weight": torch.zeros(3)}, folder / "other.pth")
    torch.save([torch.zeros(3)], folder / "list.pth")
    torch.save({"fc.weight": "a word"}, folder / "word.pth")
    safetensors.torch.save_file({"fc.weight": torch.zeros(3)}, folder / "other.safetensors")
    (folder / "text.pth").write_text("<html>\n<body>404</body>\n</html>")
    (folder / "empty.pth").write_bytes(b"")
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("a", "b")
    (folder / "folder.pth").mkdir()
    return {path.name: path for path in folder.iterdir()} | {"missing.pth": folder / "missing.pth"}


def test_a_wrong_file_is_refused_in_one_line_that_names_it(tmp_path):
    for name, file in wrong_files(tmp_path).items():
        assert name in refusal(lambda file=file: Inception(file))


def test_dinov2_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    said = refusal(lambda: DINOv2(None))
    assert "metrics.dinov2_weights=FILE" in said and "https://huggingface.co/timm/" in said
    assert "pip install 'genzoo[dinov2]'" in refusal(lambda: DINOv2("weights.safetensors"))
