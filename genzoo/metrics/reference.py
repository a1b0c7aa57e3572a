"""Cached reference features of a split of a data set.

The cache is content-addressed: the key is the SHA-256 of the images, the network's weights, its resizing and its precision, so
that no entry is ever stale. Concurrent processes wait for the one that computes an entry; files are written atomically, with
a checksum. A read-only cache is still read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load, save
from torch import Tensor

from genzoo.metrics.features import FeatureNetwork
from genzoo.metrics.frechet import FeatureMoments, Moments
from genzoo.runs import ResourceError, write_atomically

VERSION = 1  # of the file format
WAIT = 3600  # timeout in seconds of waiting for another process


class Reference:
    """Reference features of a split.

    Attributes:
        name: of the split, such as ``fashion_mnist/train``.
        sha256: of its images.
        features: (N, D) float32.
        y: classes, (N,), or None.
        moments: of all features.
        levels: of the data.
    """

    def __init__(
        self, name: str, sha256: str, features: Tensor, y: Tensor | None, moments: Moments, levels: int | None = None
    ):
        self.name, self.sha256, self.levels = name, sha256, levels
        self.features, self.y, self.moments = features, y, moments

    def of_class(self, label: int) -> Tensor:
        """Features of one class, (n, D)."""
        assert self.y is not None
        return self.features[self.y == label]


def tensor_sha256(x: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    x = x.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode())
    digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def reference(
    name: str,
    images: Tensor,
    y: Tensor | None,
    network: FeatureNetwork,
    cache: Path | None,
    batch_size: int = 250,
    progress: Callable[[int], None] | None = None,
    levels: int | None = None,
) -> Reference:
    """Load the reference features of a split from the cache, or compute them.

    Args:
        name: of the split.
        images: images, (N, C, H, W) uint8, or vectors, (N, D).
        y: classes, (N,).
        network: the feature network.
        cache: the folder; None for no cache.
        batch_size: images per batch.
        progress: called with the number of processed images.
        levels: of the data, for the protocol.
    """
    sha256 = tensor_sha256(images)

    def build() -> dict[str, Tensor]:
        # Computed on one rank, without synchronisation.
        moments, parts = FeatureMoments(network.dim, sync_on_compute=False).to(network.device), list[Tensor]()
        for batch in images.split(network.effective_batch_size(batch_size)):
            features = network(batch).features
            moments.update(features)
            parts.append(features.cpu())
            if progress:
                progress(sum(map(len, parts)))
        found = moments.compute()
        tensors = {"mean": found.mean, "cov": found.cov, "factor": found.factor}
        return {"features": torch.cat(parts), **{name: value.cpu() for name, value in tensors.items()}}

    key = {"version": VERSION, "images": sha256, "n": len(images), **network.metadata, "dtype": "float32"}
    tensors = cached(cache, key, build)
    moments = Moments(len(images), tensors["mean"], tensors["cov"])
    moments.__dict__["factor"] = tensors["factor"]  # fills the cached property
    return Reference(name, sha256, tensors["features"], y, moments, levels)


def cached(cache: Path | None, key: dict, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load tensors from the cache, or build and store them.

    Args:
        cache: a folder; None for no cache.
        key: all inputs that determine the result.
        build: computes the tensors.
    """
    if cache is None:
        return build()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache / f"{name}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    with _lock(cache / f"{name}.lock"):
        found = _read(path)  # may have been written while waiting
        if found is not None:
            return found
        tensors = {name: value.contiguous() for name, value in build().items()}
        with contextlib.suppress(OSError, ResourceError):  # a read-only or full cache
            write_atomically(path, _with_checksum(tensors))
        return tensors


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an interprocess lock, released when the process ends; continue without one if locks are unavailable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=WAIT)
        lock.acquire()
    except (OSError, RuntimeError):  # NotImplementedError on file systems without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _with_checksum(tensors: dict[str, Tensor]) -> bytes:
    content = save(tensors)
    return struct.pack("<Q", len(content)) + hashlib.sha256(content).digest() + content


def _read(path: Path) -> dict[str, Tensor] | None:
    """Read a cache file; None if it is missing or corrupt."""
    try:
        sealed = path.read_bytes()
    except OSError:
        return None
    content = sealed[40:]
    if sealed[:8] != struct.pack("<Q", len(content)) or sealed[8:40] != hashlib.sha256(content).digest():
        return None
    return load(content)
