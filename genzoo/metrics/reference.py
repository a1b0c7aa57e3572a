"""What samples are compared with: features of a split of a data set, computed once and kept in a cache.

A reference is named by the SHA-256 of everything that it depends on: the images' bytes and their number, the network's weights,
its resizing and its precision. Whatever changes gives another name, so that no reference is ever stale. Of many processes that
want the same one at once, one builds it and the others wait; a file appears under its name only when it is whole, and carries
its own checksum. A cache that cannot be written to is read from all the same.
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

VERSION = 1  # of what is stored
WAIT = 3600  # seconds for another process that builds the same reference


class Reference:
    """Features of a split.

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


def sha256_of(x: Tensor) -> str:
    """Name a tensor by its type, its shape and its bytes."""
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
    """Compute, or find, the features of a split.

    Args:
        name: of the split.
        images: bytes, (N, C, H, W) uint8, or points, (N, 2).
        y: classes, (N,).
        network: what makes the features.
        cache: the folder; None to compute them anew.
        batch_size: images at once.
        progress: called with the number of images done.
        levels: of the data, for the protocol.
    """
    sha256 = sha256_of(images)

    def build() -> dict[str, Tensor]:
        # Whoever computes it does so alone, even where several processes train together.
        moments, parts = FeatureMoments(network.dim, sync_on_compute=False).to(network.device), list[Tensor]()
        for batch in images.split(network.at_once(batch_size)):
            features = network(batch).features  # stay on the network's device for the moments
            moments.update(features)
            parts.append(features.cpu())
            if progress:
                progress(sum(map(len, parts)))
        found = moments.compute()
        tensors = {"mean": found.mean, "cov": found.cov, "factor": found.factor}
        return {"features": torch.cat(parts), **{name: value.cpu() for name, value in tensors.items()}}

    key = {"version": VERSION, "images": sha256, "n": len(images), **network.card, "dtype": "float32"}
    tensors = cached(cache, key, build)
    moments = Moments(len(images), tensors["mean"], tensors["cov"])
    moments.__dict__["factor"] = tensors["factor"]  # where the cached property looks first
    return Reference(name, sha256, tensors["features"], y, moments, levels)


def cached(cache: Path | None, key: dict, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what ``build`` makes, from a cache where it has been made before.

    Args:
        cache: a folder; None for no cache.
        key: everything that the result depends on.
        build: makes it.
    """
    if cache is None:
        return build()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache / f"{name}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    with _lock(cache / f"{name}.lock"):
        found = _read(path)  # somebody else may have been faster
        if found is not None:
            return found
        tensors = {name: value.contiguous() for name, value in build().items()}
        with contextlib.suppress(OSError, ResourceError):  # a cache that cannot be written to, or is full
            write_atomically(path, _sealed(tensors))
        return tensors


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock between processes, which ends with its holder; where none can be made, go on without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=WAIT)
        lock.acquire()
    except (OSError, RuntimeError):  # the latter, NotImplementedError, where the file system has no locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _sealed(tensors: dict[str, Tensor]) -> bytes:
    content = save(tensors)
    return struct.pack("<Q", len(content)) + hashlib.sha256(content).digest() + content


def _read(path: Path) -> dict[str, Tensor] | None:
    """Read a file of the cache; one that is damaged counts as missing, and is replaced."""
    try:
        sealed = path.read_bytes()
    except OSError:
        return None
    content = sealed[40:]
    if sealed[:8] != struct.pack("<Q", len(content)) or sealed[8:40] != hashlib.sha256(content).digest():
        return None
    return load(content)
