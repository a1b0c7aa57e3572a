r"""Named random streams: every draw is a function of its purpose, independent of execution history.

The data order of a run is f(seed, epoch), the noise of example ``j`` of a batch f(seed, step, j), and the noise of sample ``i``
f(seed, i) for any batch size. No generator state is saved: a resumed run draws the same numbers. ``seed_of`` hashes a name into
a seed for three kinds of ``torch.Generator``:

``generator``
    A single stream. On accelerators torch's generator is counter-based with 64-bit seeds. On a CPU it is the Mersenne Twister,
    of whose seed ``manual_seed`` uses only the lower 32 bits; its full state of 624 words is therefore hashed from the name,
    see ``reseed``.
``ShardGenerator``
    The same stream in distributed training: each rank draws the noise of the global batch and takes the rows of its examples,
    so that W processes use the noise of one.
``SampleStreams``
    A stream per sample, by the counter-based generator Philox4x32-10. With the key k = hash(kind, seed), number ``p`` of sample
    ``i`` is word ``p mod 4`` of

        Philox_k(p div 4 mod 2^32, p div 2^34, i mod 2^32, i div 2^32),

    where Philox_k is a permutation of the 2^128 counters, so that the samples of a seed have disjoint blocks. It is vectorised
    integer arithmetic; uniform numbers are bitwise equal on all devices, normal ones (Box-Muller) up to rounding.

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
# The 624 words of the Mersenne Twister in the state of torch's CPU generator, 64 bits each with 32 used.
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
    """Set a generator to the start of the stream of a name.

    The state of the Mersenne Twister on a CPU is

        SHAKE-128(name before its last integer n, n div 2^32) + init_genrand(n mod 2^32)    (mod 2^32, word by word).

    Only the hash is expensive, and cached: the steps of a run, whose names differ in the last integer, are seeded in
    microseconds, with distinct states.
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
    """Return a generator on ``device`` with the stream of a name."""
    rng = torch.Generator(device)
    reseed(rng, *name)
    return rng


class ShardGenerator(torch.Generator):
    """The stream of a name in distributed training, of which each rank takes the rows of its examples.

    ``randn``, ``rand``, ``dither``, ``randint`` and ``choice`` of this module draw noise for the global batch, split equally in
    rank order, and return the rows of this rank. ``randint_shared`` returns the same numbers on all ranks, as do torch's own
    functions.

    Args:
        name: of the stream, as for ``generator``.
        device: of the generator.
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

    def global_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the noise of the global batch."""
        return self.world * shape[0], *shape[1:]

    def local_rows(self, noise: Tensor) -> Tensor:
        """Return the rows of this rank."""
        n = len(noise) // self.world
        return noise[self.rank * n : (self.rank + 1) * n]


def batch_generator(*name: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator of noise for a global batch: row ``j`` depends on the name and on ``j`` alone."""
    return generator(*name, device=device) if distributed.world_size() == 1 else ShardGenerator(*name, device=device)


def philox(counter: Sequence[Any], key: tuple[int, int]) -> list[Any]:
    """Philox4x32-10, a keyed permutation of 128-bit counters.

    Args:
        counter: four 32-bit words, as int64 tensors or numpy arrays that broadcast, with at least one dimension.
        key: two 32-bit words.

    Returns:
        Four words of the same type.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for number in range(10):
        # Products of two words wrap in int64, with correct lower 64 bits. Words 1 and 3 are only XORed before they are masked,
        # and may exceed 32 bits.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        if number < 4:  # out of place: some words still broadcast, or belong to the caller
            c1, c3 = (p1 >> 32) ^ (c1 ^ k0), (p0 >> 32) ^ (c3 ^ k1)
        else:  # in place, since allocation takes as long as the arithmetic
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
        torch.mul(word >> 8, 2.0**-24, out=out[..., lane])  # the 24 bits of a float32 significand


def _fill_normal(words: list[Tensor], out: Tensor) -> None:
    for lane in (0, 2):
        # In (0, 1], with a finite logarithm: the largest radius is 6.7.
        radius = words[lane].float().add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[lane + 1].float().mul_(2 * math.pi * 2.0**-32)
        torch.mul(radius, angle.cos(), out=out[..., lane])
        torch.mul(radius, angle.sin_(), out=out[..., lane + 1])


class SampleStreams(torch.Generator):
    """A stream of noise per sample of a batch: sample ``i`` is f(seed, i) for any batch size.

    ``randn``, ``rand``, ``dither`` and ``randint`` of this module draw row ``j`` of a batch from the stream of sample
    ``indices[j]``. For torch's own functions it is a single generator, seeded by the first index.

    Args:
        seed: of the set of samples.
        indices: sample of each row, in 0..2^63-1.
        device: of the generator.
    """

    PREFETCH = 1024  # numbers per row drawn in advance on a CPU, to reduce calls for low-dimensional data
    MAX_PREFETCH = 2**21  # numbers drawn in advance for all rows; four times as many on accelerators
    TILE = 2**14  # counters permuted at once on a CPU, to fit in its cache

    def __new__(cls, seed: int, indices: Sequence[int], device: torch.device | str = "cpu") -> SampleStreams:
        return super().__new__(cls, device=device)  # type: ignore[call-arg]

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str = "cpu"):
        self.indices = list(indices)
        self._seed = seed
        reseed(self, "samples", seed, *self.indices[:1])
        self._index = torch.tensor(self.indices, dtype=torch.int64, device=self.device)[:, None]
        self._buffers: dict[str, Tensor] = {}
        self._made: dict[str, int] = {}  # numbers computed so far per row, a multiple of 4

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleStreams:
        twin = SampleStreams(self._seed, self.indices, self.device)
        twin.set_state(self.get_state())
        twin._made, twin._buffers = dict(self._made), {kind: held.clone() for kind, held in self._buffers.items()}
        return twin

    def draw(self, kind: str, shape: Sequence[int]) -> Tensor:
        """Draw float32 noise, "normal" or "uniform"; ``shape[0]`` must be the number of samples."""
        if shape[0] != len(self.indices):
            raise ValueError(f"the streams are of {len(self.indices)} samples, not {shape[0]}")
        count = int(torch.Size(shape[1:]).numel())
        buffer = self._buffers.get(kind)
        held = 0 if buffer is None else buffer.shape[1]
        if buffer is None or held < count:
            more = self._compute(kind, count - held)
            buffer = torch.cat([buffer, more], dim=1) if buffer is not None and held else more
        self._buffers[kind] = buffer[:, count:]
        return buffer[:, :count].reshape(tuple(shape))

    def _compute(self, kind: str, count: int) -> Tensor:
        """Compute at least the next ``count`` numbers of each stream, (n, >= count)."""
        n, made, cpu = len(self.indices), self._made.get(kind, 0), self.device.type == "cpu"
        most = min(self.PREFETCH, self.MAX_PREFETCH // max(n, 1)) if cpu else 4 * self.MAX_PREFETCH // max(n, 1)
        ahead = min(4 * made, most)  # none for the first draw, often the only one
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
            if cpu:  # numpy is 1.5 times as fast as torch here
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
        shape = rng.global_shape(shape)
    fill = torch.randn if kind == "normal" else torch.rand
    source = device if rng is None else rng.device  # a generator draws on its own device only
    drawn = fill(tuple(shape), generator=rng, device=source, dtype=dtype).to(device)
    return rng.local_rows(drawn) if isinstance(rng, ShardGenerator) else drawn


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
    """Draw 16-bit uniform noise, the centers of 2^16 intervals of [0, 1), float32; three times as fast as ``rand``.

    The mean is exact, the relative error of the variance 2^-32. For ``SampleStreams`` it is ``rand``.
    """
    if isinstance(rng, SampleStreams):
        return rand(shape, rng=rng, device=device)
    if isinstance(rng, ShardGenerator):
        shape = rng.global_shape(shape)
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device if rng is None else rng.device)
    signed = words.random_(-(2**63), None, generator=rng).view(torch.int16)[:count].view(tuple(shape))
    if isinstance(rng, ShardGenerator):
        signed = rng.local_rows(signed)
    return signed.to(torch.float32).add_(2.0**15 + 0.5).mul_(2.0**-16).to(device)


def randint(
    high: int, shape: Sequence[int], *, rng: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw integers uniformly from 0..high-1, int64; the first dimension counts samples."""
    return (rand(shape, rng=rng, device=device, dtype=torch.float32) * high).long().clamp_(max=high - 1)


def randint_shared(
    high: int, n: int, *, rng: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw ``n`` integers uniformly from 0..high-1, int64, not per sample: equal on all ranks.

    ``SampleStreams`` use the stream of the first index.
    """
    source = device if rng is None else rng.device
    return (torch.rand(n, generator=rng, device=source).to(device) * high).long().clamp_(max=high - 1)


def choice(
    high: int, n: int, *, rng: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw ``n`` different integers uniformly from 0..high-1, int64, different on all ranks of a global batch.

    ``SampleStreams`` use the stream of the first index.

    Raises:
        ValueError: for more integers than there are.
    """
    shard = rng if isinstance(rng, ShardGenerator) else None
    count = n if shard is None else shard.world * n
    if count > high:
        raise ValueError(f"{count} different integers of 0..{high - 1}: there are {high}")
    source = device if rng is None else rng.device
    drawn = torch.rand(high, generator=rng, device=source, dtype=torch.float64).argsort(stable=True)[:count].to(device)
    return drawn if shard is None else shard.local_rows(drawn)


def rand_systematic(n: int, *, rng: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
    """Draw ``n`` equidistant numbers with a common random shift, ``(i/N + u) mod 1``, float64, in (0, 1).

    Each number is uniform, and i = 0..N-1 is the index in the global batch. For ``SampleStreams``, in which a number depends
    on its sample alone, they are independent.
    """
    if isinstance(rng, SampleStreams):
        return rand((n,), rng=rng, device=device).double() + 2.0**-25
    shard = rng if isinstance(rng, ShardGenerator) else None
    count = n if shard is None else shard.world * n
    shift = (randint_shared(2**24, 1, rng=rng, device=device).double() + 0.5) * 2.0**-24
    drawn = (torch.arange(count, device=device).double() / max(count, 1) + shift) % 1.0
    return drawn if shard is None else shard.local_rows(drawn)


def categorical(probs: Tensor, n: int, *, rng: torch.Generator | None = None) -> Tensor:
    """Sample a categorical distribution by inversion of its CDF, (n,) int64."""
    cdf = cumulative_sum(probs.double(), 0)
    u = rand((n,), rng=rng, device=probs.device).double() * cdf[-1]
    return torch.searchsorted(cdf, u, right=True).clamp_(max=len(probs) - 1)
