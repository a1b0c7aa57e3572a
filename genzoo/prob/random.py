"""Randomness by name: every draw is a function of what it is for, never of what ran before.

A run's order of data is f(seed, epoch), the noise of a step f(seed, step, rank), and the noise of sample ``i``
f(seed, i) whatever the batch size. Nothing is saved and nothing drifts: a resumed run draws what the first one would
have drawn. ``seed_of`` turns such a name into a seed; ``SampleStreams`` keeps one stream for each sample of a batch and
can stand wherever a ``torch.Generator`` can.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genzoo.prob.precision import cumulative_sum


def seed_of(*name: int | str) -> int:
    """Hash a name such as ``("noise", seed, step, rank)`` into a seed of 63 bits."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*name: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator on ``device`` whose stream depends on the name alone."""
    return torch.Generator(device).manual_seed(seed_of(*name))


class SampleStreams(torch.Generator):
    """One stream of noise for each sample of a batch: sample ``i`` is f(seed, i), whatever the batch size.

    The helpers ``randn``, ``rand`` and ``randint`` of this module draw row ``j`` of a batch from the stream of sample
    ``indices[j]``. To anything else it is an ordinary generator, seeded by the first index.

    Args:
        seed: the seed of the whole set of samples.
        indices: which samples this batch holds, one for each row.
        device: where the noise is drawn and returned.
    """

    BLOCK = (
        1024  # numbers drawn at once by a row, so that 2-D samplers of a thousand steps do not make a thousand calls
    )

    def __new__(cls, seed: int, indices: Sequence[int], device: torch.device | str = "cpu") -> SampleStreams:
        return super().__new__(cls, device=device)  # type: ignore[call-arg]

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str = "cpu"):
        self.indices = list(indices)
        self.manual_seed(seed_of("samples", seed, *self.indices[:1]))
        self._rows = {
            kind: [generator(kind, seed, i, device=device) for i in self.indices] for kind in ("normal", "uniform")
        }
        self._buffers: dict[str, Tensor] = {}

    def draw(self, kind: str, shape: Sequence[int]) -> Tensor:
        """Draw ``shape`` float32 numbers, row by row; ``shape[0]`` must be the number of samples."""
        if shape[0] != len(self.indices):
            raise ValueError(f"this noise is for {len(self.indices)} samples, not {shape[0]}")
        count = int(torch.Size(shape[1:]).numel())
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.shape[1] < count:
            fill = torch.randn if kind == "normal" else torch.rand
            block = max(count, self.BLOCK)
            buffer = torch.stack([fill(block, generator=row, device=self.device) for row in self._rows[kind]])
        self._buffers[kind] = buffer[:, count:]
        return buffer[:, :count].reshape(tuple(shape))


def _draw(
    kind: str,
    shape: Sequence[int],
    rng: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> Tensor:
    if isinstance(rng, SampleStreams):
        return rng.draw(kind, shape).to(device=device, dtype=dtype)
    fill = torch.randn if kind == "normal" else torch.rand
    source = device if rng is None else rng.device  # a generator draws only on its own device
    return fill(tuple(shape), generator=rng, device=source, dtype=dtype).to(device)


def randn(
    shape: Sequence[int],
    *,
    rng: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise; the first dimension counts samples."""
    return _draw("normal", shape, rng, device, dtype)


def rand(
    shape: Sequence[int],
    *,
    rng: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw uniform noise on [0, 1); the first dimension counts samples."""
    return _draw("uniform", shape, rng, device, dtype)


def dither(
    shape: Sequence[int], *, rng: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw uniform noise of 16 bits, the middles of 2^16 intervals of [0, 1), in a third of the time of ``rand``: float32.

    Its mean is that of the uniform law, its variance smaller by a share of 2^-32. Rows of ``SampleStreams`` have all bits.
    """
    if isinstance(rng, SampleStreams):
        return rand(shape, rng=rng, device=device)
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device if rng is None else rng.device)
    signed = words.random_(-(2**63), None, generator=rng).view(torch.int16)[:count].view(tuple(shape))
    return signed.to(torch.float32).add_(2.0**15 + 0.5).mul_(2.0**-16).to(device)


def randint(
    high: int, shape: Sequence[int], *, rng: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw integers uniformly from 0..high-1, int64; the first dimension counts samples."""
    return (rand(shape, rng=rng, device=device, dtype=torch.float32) * high).long().clamp_(max=high - 1)


def choose(
    high: int, n: int, *, rng: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw ``n`` integers uniformly from 0..high-1 that belong to no sample, int64; of ``SampleStreams`` the first draws."""
    source = device if rng is None else rng.device
    return (torch.rand(n, generator=rng, device=source).to(device) * high).long().clamp_(max=high - 1)


def categorical(probs: Tensor, n: int, *, rng: torch.Generator | None = None) -> Tensor:
    """Draw ``n`` class indices with the given probabilities, by inversion of their cumulative sum: int64, (n,)."""
    cdf = cumulative_sum(probs.double(), 0)
    u = rand((n,), rng=rng, device=probs.device).double() * cdf[-1]
    return torch.searchsorted(cdf, u, right=True).clamp_(max=len(probs) - 1)
