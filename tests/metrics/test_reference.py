"""References are built once by whoever comes first, named by all that they depend on, and never used when damaged."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from genzoo.metrics import reference as module
from genzoo.metrics.features import FeatureNetwork, Features
from genzoo.metrics.reference import cached, reference, tensor_sha256


class Counting(FeatureNetwork):
    """The pixels, by a network that counts the images it has seen."""

    def __init__(self, name="pixels", sha256="0" * 64, resize="none"):
        self.name, self.sha256, self.resize, self.dim, self.seen = name, sha256, resize, 4, 0

    def forward(self, images):
        self.seen += len(images)
        return Features(images.flatten(1).float(), None)


IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (30, 1, 2, 2), dtype=np.uint8))


def of(images: torch.Tensor, network: FeatureNetwork, cache: Path | None, **kwargs):
    return reference("pixels/train", images, torch.arange(len(images)) % 3, network, cache, **kwargs)


def test_a_reference_holds_features_moments_and_classes():
    found = of(IMAGES, Counting(), None, batch_size=7)
    x = IMAGES.flatten(1).double().numpy()
    np.testing.assert_array_equal(found.features, x)
    assert (found.name, found.sha256, found.moments.n) == ("pixels/train", tensor_sha256(IMAGES), 30)
    np.testing.assert_allclose(found.moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.moments.cov, np.cov(x, rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(found.moments.factor @ found.moments.factor.T, found.moments.cov, rtol=1e-12)
    np.testing.assert_array_equal(found.of_class(2), x[2::3])


def test_a_second_look_computes_nothing_and_finds_the_same(tmp_path):
    networks, done = [Counting(), Counting()], []
    first = of(IMAGES, networks[0], tmp_path, batch_size=20, progress=done.append)
    second = of(IMAGES, networks[1], tmp_path, batch_size=5)
    assert [network.seen for network in networks] == [30, 0] and done == [20, 30]
    assert torch.equal(first.features, second.features)
    for part in ("mean", "cov", "factor"):
        assert torch.equal(getattr(first.moments, part), getattr(second.moments, part))


def test_whatever_a_reference_depends_on_gives_it_another_name(tmp_path):
    of(IMAGES, Counting(), tmp_path)
    changed = IMAGES.clone()
    changed[17, 0, 1, 1] ^= 1
    others = [
        (changed, Counting()),
        (IMAGES.flip(0), Counting()),
        (IMAGES[:29], Counting()),
        (IMAGES.view(30, 1, 1, 4), Counting()),
        (IMAGES, Counting(sha256="1" * 64)),
        (IMAGES, Counting(resize="bilinear")),
        (IMAGES, Counting(name="others")),
    ]
    for images, network in others:
        of(images, network, tmp_path)
        assert network.seen == len(images)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + len(others)


def test_another_version_of_what_is_stored_is_built_anew(monkeypatch, tmp_path):
    of(IMAGES, Counting(), tmp_path)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    network = Counting()
    of(IMAGES, network, tmp_path)
    assert network.seen == 30


def test_tensors_are_named_by_type_shape_and_bytes():
    zeros = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2).double(),
        torch.ones(4),
    ]
    assert len({tensor_sha256(x) for x in zeros}) == len(zeros)
    x = torch.arange(6).view(2, 3)
    assert tensor_sha256(x.T) == tensor_sha256(x.T.contiguous()) != tensor_sha256(x)


def damages() -> dict:
    def flipped(content: bytes) -> bytes:
        return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]

    return {
        "bit": flipped,
        "cut": lambda content: content[:-1],
        "half": lambda content: content[: len(content) // 2],
        "header": lambda content: content[:20],
        "empty": lambda content: b"",
        "longer": lambda content: content + b"0",
        "text": lambda content: b"not a cache file, but long enough to have a checksum in its middle",
        "unsealed": lambda content: content[40:],
    }


@pytest.mark.parametrize("damage", list(damages()))
def test_a_damaged_file_is_built_anew_and_replaced(tmp_path, damage):
    first = of(IMAGES, Counting(), tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(damages()[damage](content))
    network = Counting()
    second = of(IMAGES, network, tmp_path)
    assert network.seen == 30 and torch.equal(first.features, second.features)
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_to_is_read_and_gone_without(monkeypatch, tmp_path):
    of(IMAGES, Counting(), tmp_path)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(module, "write_atomically", refuse)
    monkeypatch.setattr(module, "FileLock", refuse)
    known, unknown = Counting(), Counting()
    of(IMAGES, known, tmp_path)
    found = of(IMAGES[:20], unknown, tmp_path)
    assert (known.seen, unknown.seen, len(found.features)) == (0, 20, 20)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind here")
def test_a_folder_without_permission_is_read_and_gone_without(tmp_path):
    of(IMAGES, Counting(), tmp_path)
    tmp_path.chmod(0o500)
    try:
        known, unknown = Counting(), Counting()
        of(IMAGES, known, tmp_path)
        of(IMAGES[:20], unknown, tmp_path)
        assert (known.seen, unknown.seen) == (0, 20)
    finally:
        tmp_path.chmod(0o700)


def test_a_cache_below_a_file_is_gone_without(tmp_path):
    (tmp_path / "file").write_text("")
    network = Counting()
    of(IMAGES, network, tmp_path / "file" / "cache")
    assert network.seen == 30


def test_without_a_cache_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cached(None, {}, lambda: {"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def ask(cache: Path, log: Path, start, answers) -> None:
    def build() -> dict[str, torch.Tensor]:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.2)
        return {"x": torch.tensor([float(os.getpid())])}

    start.wait(30)
    found = cached(cache, {"what": "a race"}, build)["x"]
    answers.put(hashlib.sha256(found.numpy().tobytes()).hexdigest())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starting processes takes long here")
def test_of_many_processes_one_builds_and_all_have_the_same(tmp_path):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    start, answers = context.Event(), context.Queue()
    processes = [context.Process(target=ask, args=(tmp_path / "cache", log, start, answers)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    found = {answers.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(30)
    assert log.read_text() == "built\n" and len(found) == 1
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
