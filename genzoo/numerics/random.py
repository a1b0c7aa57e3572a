r"""Randomness by name: every draw is a function of what it is for, never of what ran before.

A run's order of data is f(seed, epoch), the noise of example ``j`` of a batch f(seed, step, j), and the noise of sample
``i`` f(seed, i) whatever the batch size. Nothing is saved and nothing drifts: a resumed run draws what the first one would
have drawn. ``seed_of`` hashes such a name into a seed; three kinds of ``torch.Generator`` draw from it:

``generator``
    An ordinary stream. On accelerators torch's own is counter-based and takes seeds of 64 bits. On a CPU it is the Mersenne
    Twister, of whose seed ``manual_seed`` takes the lower 32 bits alone; its whole state, 624 words, is therefore hashed
    from the name, see ``reseed``.
``ShardGenerator``
    The same stream where several processes share a batch: each draws the noise of the whole batch and takes the rows of
    its own examples, so that W processes train on the noise of one.
``SampleStreams``
    A stream for each sample, by the counter-based generator Philox4x32-10. With the key k = hash(law, seed), number ``p``
    of sample ``i`` is word ``p mod 4`` of

        Philox_k(p div 4 mod 2^32, p div 2^34, i mod 2^32, i div 2^32),

    where Philox_k permutes the 2^128 counters: no two samples of a seed share a block of four words. It is arithmetic on
    integers alone, without a loop over samples; uniform numbers have the same bits on every device, normal ones
    (Box-Muller) differ in their last.

References:
    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, https://doi.org/10.1145/2063384.2063405
    (section 3.3, Philox).
    Matsumoto, Nishimura, "Mersenne Twister", 1998, https://doi.org/10.1145/272991.272995.
    Box, Muller, "A Note on the Generation of Random Normal Deviates", 1958, https://doi.org/10.1214/aoms/1177706645.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genzoo.numerics import distributed
from genzoo.numerics.precision import cumulative_sum

_WORD = 2**32 - 1  # the lower 32 bits
# Where torch's state of a CPU generator holds the 624 words of a Mersenne Twister, 64 bits of which the lower 32 count.
_TWISTER = slice(24, 24 + 8 * 624)


def seed_of(*name: int | str) -> int:
    """Hash a name such as ``("noise", seed, step)`` into a seed of 63 bits."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@functools.lru_cache(maxsize=64)
def _words(*name: int | str) -> np.ndarray:
    """Hash a name into the state of a Mersenne Twister, (624,) int64."""
    return np.frombuffer(hashlib.shake_128(repr(name).encode()).digest(4 * 624), "<u4").astype(np.int64)


def reseed(rng: torch.Generator, *name: int | str) -> None:
    """Set a generator to the beginning of the stream of a name.

    A CPU's Mersenne Twister has the state

        SHAKE-128(name before its last integer n, n div 2^32) + init_genrand(n mod 2^32)    (mod 2^32, word by word),

    all of it hashed from the name but for a counter of 32 bits, so that the steps of a run, whose names differ in their
    last integer, are seeded in microseconds, and no two of them alike.
    """
    if rng.device.type != "cpu":
        rng.manual_seed(seed_of(*name))
        return
    *rest, last = name
    key, counter = ((*rest, last >> 32), last & _WORD) if isinstance(last, int) else (name, 0)
    state = rng.manual_seed(counter).get_state()
    words = state.numpy()[_TWISTER].view(np.int64)
    words += _words(*key)
    rng.set_state(state)


def generator(*name: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator on ``device`` whose stream depends on the name alone."""
    rng = torch.Generator(device)
    reseed(rng, *name)
    return rng


class ShardGenerator(torch.Generator):
    """The stream of a name where several processes share a batch: each takes the rows of its own examples.

    The helpers ``randn``, ``rand``, ``dither`` and ``randint`` of this module draw noise for the examples of all ranks,
    which have equal shares of the batch in the order of their ranks, and return the rows of this one. What belongs to no
    example, ``choose``, is the same on all ranks. To anything else it is an ordinary generator, the same on all ranks too.

    Args:
        name: of the stream, as for ``generator``.
        device: where the noise is drawn.
    """

    def __new__(cls, *name: int | str, device: torch.device | str = "cpu") -> ShardGenerator:
        return super().__new__(cls, device=device)  # type: ignore[call-arg]

    def __init__(self, *name: int | str, device: torch.device | str = "cpu"):
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.name = name
        reseed(self, *name)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardGenerator:
        twin = ShardGenerator(*self.name, device=self.device)
        twin.set_state(self.get_state())
        return twin

    def of_all(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the noise of the whole batch."""
        return self.world * shape[0], *shape[1:]

    def own(self, noise: Tensor) -> Tensor:
        """Return the rows of this rank's examples."""
        share = len(noise) // self.world
        return noise[self.rank * share : (self.rank + 1) * share]


def batch_generator(*name: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator of noise for a batch that all ranks share: row ``j`` depends on the name and on ``j`` alone."""
    return generator(*name, device=device) if distributed.world_size() == 1 else ShardGenerator(*name, device=device)


def philox(counter: Sequence[Any], key: tuple[int, int]) -> list[Any]:
    """Permute counters of 128 bits by Philox4x32-10.

    Args:
        counter: four int64 tensors that broadcast, or arrays of numpy, of words in 0..2^32-1; at least one dimension.
        key: two such words.

    Returns:
        Four words of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for number in range(10):
        # Products of two words fill 64 bits: int64 wraps, and its lower 64 bits are right. Words 1 and 3 are only XORed
        # before they are masked, so that they may carry more than 32 bits.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        if number < 4:  # where some words still broadcast, or are the caller's
            c1, c3 = (p1 >> 32) ^ (c1 ^ k0), (p0 >> 32) ^ (c3 ^ k1)
        else:  # fresh memory costs as much as the arithmetic
            c1 ^= k0
            c1 ^= p1 >> 32
            c3 ^= k1
            c3 ^= p0 >> 32
        c1 &= _WORD
        c3 &= _WORD
        c0, c1, c2, c3 = c1, p1, c3, p0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1 & _WORD, c2, c3 & _WORD]


def _fill_uniform(words: list[Tensor], out: Tensor) -> None:
    for lane, word in enumerate(words):
        torch.mul(word >> 8, 2.0**-24, out=out[..., lane])  # the 24 bits that float32 holds


def _fill_normal(words: list[Tensor], out: Tensor) -> None:
    for lane in (0, 2):
        # In (0, 1], whose logarithm is finite: the longest radius is 6.7.
        radius = words[lane].float().add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[lane + 1].float().mul_(2 * math.pi * 2.0**-32)
        torch.mul(radius, angle.cos(), out=out[..., lane])
        torch.mul(radius, angle.sin_(), out=out[..., lane + 1])


class SampleStreams(torch.Generator):
    """One stream of noise for each sample of a batch: sample ``i`` is f(seed, i), whatever the batch size.

    The helpers ``randn``, ``rand``, ``dither`` and ``randint`` of this module draw row ``j`` of a batch from the stream of
    sample ``indices[j]``. To anything else it is an ordinary generator, seeded by the first index.

    Args:
        seed: the seed of the whole set of samples.
        indices: which samples this batch holds, one for each row, from 0..2^63-1.
        device: where the noise is drawn and returned.
    """

    AHEAD = 1024  # numbers that a row draws in advance on a CPU, so that samplers of points do not draw at every step
    HELD = 2**21  # numbers that all rows may; four times as many on accelerators, whose launches cost more than memory
    TILE = 2**14  # counters permuted at once on a CPU, whose words then stay in its cache

    def __new__(cls, seed: int, indices: Sequence[int], device: torch.device | str = "cpu") -> SampleStreams:
        return super().__new__(cls, device=device)  # type: ignore[call-arg]

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str = "cpu"):
        self.indices = list(indices)
        self._seed = seed
        reseed(self, "samples", seed, *self.indices[:1])
        self._index = torch.tensor(self.indices, dtype=torch.int64, device=self.device)[:, None]
        self._buffers: dict[str, Tensor] = {}
        self._made: dict[str, int] = {}  # numbers of each row's stream that were computed so far, a multiple of 4

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleStreams:
        twin = SampleStreams(self._seed, self.indices, self.device)
        twin.set_state(self.get_state())
        twin._made, twin._buffers = dict(self._made), {kind: held.clone() for kind, held in self._buffers.items()}
        return twin

    def draw(self, kind: str, shape: Sequence[int]) -> Tensor:
        """Draw ``shape`` float32 numbers, "normal" or "uniform"; ``shape[0]`` must be the number of samples."""
        if shape[0] != len(self.indices):
            raise ValueError(f"this noise is for {len(self.indices)} samples, not {shape[0]}")
        count = int(torch.Size(shape[1:]).numel())
        buffer = self._buffers.get(kind)
        held = 0 if buffer is None else buffer.shape[1]
        if buffer is None or held < count:
            more = self._compute(kind, count - held)
            buffer = torch.cat([buffer, more], dim=1) if buffer is not None and held else more
        self._buffers[kind] = buffer[:, count:]
        return buffer[:, :count].reshape(tuple(shape))

    def _compute(self, kind: str, count: int) -> Tensor:
        """Compute the next numbers of each stream, at least ``count``: (n, numbers)."""
        n, made, cpu = len(self.indices), self._made.get(kind, 0), self.device.type == "cpu"
        most = min(self.AHEAD, self.HELD // max(n, 1)) if cpu else 4 * self.HELD // max(n, 1)
        ahead = min(4 * made, most)  # none at first, since most draw but once
        blocks = -(-max(count, ahead, 1) // 4)
        self._made[kind] = made + 4 * blocks
        name = repr((kind, self._seed)).encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        fill = _fill_normal if kind == "normal" else _fill_uniform
        out = torch.empty((n, blocks, 4), device=self.device)
        place = torch.arange(made // 4, made // 4 + blocks, device=self.device)
        counter = place & _WORD, place >> 32, self._index & _WORD, self._index >> 32
        width = min(blocks, self.TILE) if cpu else blocks
        height = self.TILE // width if cpu else max(n, 1)
        for i, j in itertools.product(range(0, n, height), range(0, blocks, width)):
            rows, columns = slice(i, i + height), slice(j, j + width)
            words = [*(c[columns] for c in counter[:2]), *(c[rows] for c in counter[2:])]
            if cpu:  # numpy takes two thirds of the time of torch here
                permuted = philox([c.numpy() for c in words], (key & _WORD, key >> 32))
                words = [torch.from_numpy(word) for word in permuted]
            else:
                words = philox(words, (key & _WORD, key >> 32))
            fill(words, out[rows, columns])
        return out.flatten(1)


def _draw(
    kind: str,
    shape: Sequence[int],
    rng: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> Tensor:
    if isinstance(rng, SampleStreams):
        return rng.draw(kind, shape).to(device=device, dtype=dtype)
    if isinstance(rng, ShardGenerator):
        shape = rng.of_all(shape)
    fill = torch.randn if kind == "normal" else torch.rand
    source = device if rng is None else rng.device  # a generator draws only on its own device
    drawn = fill(tuple(shape), generator=rng, device=source, dtype=dtype).to(device)
    return rng.own(drawn) if isinstance(rng, ShardGenerator) else drawn


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
    if isinstance(rng, ShardGenerator):
        shape = rng.of_all(shape)
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device if rng is None else rng.device)
    signed = words.random_(-(2**63), None, generator=rng).view(torch.int16)[:count].view(tuple(shape))
    if isinstance(rng, ShardGenerator):
        signed = rng.own(signed)
    return signed.to(torch.float32).add_(2.0**15 + 0.5).mul_(2.0**-16).to(device)


def randint(
    high: int, shape: Sequence[int], *, rng: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw integers uniformly from 0..high-1, int64; the first dimension counts samples."""
    return (rand(shape, rng=rng, device=device, dtype=torch.float32) * high).long().clamp_(max=high - 1)


def choose(
    high: int, n: int, *, rng: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw ``n`` integers uniformly from 0..high-1 that belong to no sample, int64: the same on all ranks.

    Of ``SampleStreams`` the first sample draws.
    """
    source = device if rng is None else rng.device
    return (torch.rand(n, generator=rng, device=source).to(device) * high).long().clamp_(max=high - 1)


def categorical(probs: Tensor, n: int, *, rng: torch.Generator | None = None) -> Tensor:
    """Draw ``n`` class indices with the given probabilities, by inversion of their cumulative sum: int64, (n,)."""
    cdf = cumulative_sum(probs.double(), 0)
    u = rand((n,), rng=rng, device=probs.device).double() * cdf[-1]
    return torch.searchsorted(cdf, u, right=True).clamp_(max=len(probs) - 1)
