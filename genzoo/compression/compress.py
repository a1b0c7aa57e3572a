"""Lossless compression of images with levels by a trained model, and back, to the bit.

The size of the file in bits is the negative log likelihood of its events, or its bound, plus a header and the bits that bits
back takes for its first event. The classes of a conditional model are coded by their frequencies in training.

Encoder and decoder evaluate the same functions of the same numbers: a copy of the model in float64, in batches of the same size
(stored), with the same number of threads (stored), deterministic kernels, and rounded results (``genzoo.compression.streams``).
A difference that remains, of another processor or library, is not silent: the events have a CRC-32, and the stack of bits back
must end as it began.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from genzoo.compression.codes import Code, check_compressible, code_of
from genzoo.compression.container import Container
from genzoo.compression.streams import Queue, Stack, require_constriction
from genzoo.conditions import ClassLabels
from genzoo.distributions.discretization import bin_center, quantize
from genzoo.errors import UsageError
from genzoo.model import AbilityError, Compressible

Model = TypeVar("Model", bound=Compressible)
WHOLE = 255  # growth of a stream without bits back: every batch has the full size


class Compressed(NamedTuple):
    """Compressed events.

    Attributes:
        data: the file.
        n: number of events.
        bits_per_dim: size of the file.
        label_bits: bits of the classes of a conditional model, part of the file.
        initial_bits: pseudo-random bits that bits back started from, part of the file.
    """

    data: bytes
    n: int
    bits_per_dim: float
    label_bits: float
    initial_bits: int


class Decompressed(NamedTuple):
    """Decompressed events."""

    x: Tensor  # (N, *shape), at the centres of bins
    y: Tensor | None  # classes of a conditional model, (N,)


def model_digest(model: Compressible) -> bytes:
    """Return the first 4 bytes of the SHA-256 of a model: its class, event, condition, and all weights and buffers."""
    found = hashlib.sha256(repr((type(model).__qualname__, model.event, model.condition)).encode())
    for name, value in sorted(model.state_dict().items()):
        found.update(repr((name, value.dtype, tuple(value.shape))).encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.digest()[:4]


def fits(model: Compressible, file: Container) -> bool:
    """Whether a model is the one that compressed a file."""
    return model_digest(model) == file.digest


def batch_sizes(n: int, batch_size: int, growth: int) -> Iterator[int]:
    """Return the sizes of successive batches of n events.

    The stack must hold the latents of a batch before it holds their events. After m events the size is at most ``m/2^growth``,
    and at least 1, or ``batch_size`` throughout where growth is ``WHOLE``.
    """
    done = 0
    while done < n:
        most = batch_size if growth == WHOLE else min(batch_size, max(1, done >> growth))
        size = min(most, n - done)
        yield size
        done += size


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Compute with a number of threads and deterministic kernels in this context, without gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(before)


def _double(model: Model) -> Model:
    return copy.deepcopy(model).double().eval()


def _checksum(k: Tensor, y: Tensor | None) -> int:
    """Return the CRC-32 of levels and classes."""
    found = zlib.crc32(k.cpu().numpy().astype("<i4").tobytes())
    return found if y is None else zlib.crc32(y.cpu().numpy().astype("<i4").tobytes(), found)


def _classes(model: Compressible) -> int:
    """Return the number of classes, 0 of an unconditional model.

    Raises:
        AbilityError: for other conditions.
    """
    if model.condition is None:
        return 0
    if not isinstance(model.condition, ClassLabels):
        raise AbilityError(
            f"{type(model).__name__} has the condition {model.condition}, whose values are not compressed: "
            "choose a model that is unconditional or has classes"
        )
    return model.condition.n


def _label_log_probs(model: Compressible, n: int) -> Tensor:
    return model.conditioner.probs.double().log().clamp(min=-1e4).expand(n, -1)


def check(model: object) -> Compressible:
    """Return a model, after checking that it has a lossless code and that the package of the coders is installed.

    Raises:
        AbilityError: for a model without one.
        UsageError: for a missing package.
    """
    check_compressible(model)
    assert isinstance(model, Compressible)
    _classes(model)
    require_constriction()
    return model


def compress(model: Compressible, x: Tensor, y: Tensor | None = None, *, batch_size: int = 64) -> Compressed:
    """Compress events without loss of their levels.

    Args:
        model: with a lossless code.
        x: images on [-1, 1], (N, *shape).
        y: classes of a conditional model, (N,).
        batch_size: events coded at once, at most; more are faster, and may change the size by a few bytes.

    Raises:
        AbilityError: for a model without a lossless code.
        UsageError: for no events, a missing package, and a model whose probabilities are not finite.
    """
    check(model)
    classes, threads = _classes(model), min(torch.get_num_threads(), 255)
    if not len(x):
        raise UsageError("there are no examples to compress")
    model.conditioner.check(y, len(x), synchronize=True)
    assert model.levels is not None
    twin = _double(model)
    k = quantize(x.to(twin.device), model.levels)
    y = None if y is None else y.to(twin.device)
    with reproducible(threads):
        code = code_of(twin)
        stream, growth, done = code.stream(), WHOLE, 0
        if isinstance(stream, Stack):
            growth = 0 if len(k) < 2 else _growth(twin, code, k, y)
        for size in batch_sizes(len(k), batch_size, growth):
            _encode(twin, code, stream, k[done : done + size], None if y is None else y[done : done + size], done)
            done += size
    container = Container(
        model_digest(model), _checksum(k, y), growth, threads, model.shape, model.levels, classes, batch_size, len(k),
        stream.words(),
    )  # fmt: skip
    data = container.to_bytes()
    label_bits = 0.0
    if y is not None:
        label_bits = -float(_label_log_probs(twin, len(y)).gather(1, y[:, None]).sum()) / math.log(2)
    initial_bits = stream.initial_bits if isinstance(stream, Stack) else 0
    return Compressed(data, len(k), 8 * len(data) / (len(k) * model.dim), label_bits, initial_bits)


def _growth(model: Compressible, code: Code, k: Tensor, y: Tensor | None) -> int:
    """Choose the growth of batches from the bits that the first event takes from a stack, and those that it adds."""
    stream = Stack()
    _encode(model, code, stream, k[:1], None if y is None else y[:1], 0)
    gain = max(stream.bits - stream.initial_bits, 1)
    return min(max(math.ceil(math.log2(1.25 * stream.initial_bits / gain)), 0), WHOLE - 1)


def _encode(model: Compressible, code: Code, stream: Queue | Stack, k: Tensor, y: Tensor | None, index: int) -> None:
    """Encode a batch and its classes; a decoder reads the classes first."""
    if y is not None and isinstance(stream, Queue):
        stream.push_levels(y, _label_log_probs(model, len(y)))
    try:
        code.encode(stream, k, y, index)
    except ValueError as error:
        raise UsageError(f"{type(model).__name__} cannot compress these examples: {error}") from error
    if y is not None and isinstance(stream, Stack):
        stream.push_levels(y, _label_log_probs(model, len(y)))


def decompress(model: Compressible, data: bytes, name: str = "data") -> Decompressed:
    """Restore compressed events.

    Args:
        model: by which they were compressed.
        data: of ``compress``.
        name: of the file, for messages.

    Raises:
        AbilityError: for a model without a lossless code.
        UsageError: for another model, a damaged file, a missing package, and another processor or library whose results differ.
    """
    file = Container.from_bytes(data, name)
    check(model)
    if not fits(model, file):
        raise UsageError(f"{name}: was compressed by another model, not by these weights of {type(model).__name__}")
    if (file.shape, file.levels, file.classes) != (model.shape, model.levels, _classes(model)):
        raise UsageError(f"{name}: has an invalid header")
    differs = UsageError(
        f"{name}: cannot be restored here: this processor, PyTorch or constriction computes other probabilities than the one "
        "that compressed it"
    )
    twin = _double(model)
    with reproducible(file.threads):
        code = code_of(twin)
        stream = code.stream(file.words)
        sizes = list(batch_sizes(file.n, file.batch_size, file.growth))
        first = isinstance(stream, Queue)
        done = 0 if first else file.n
        parts: list[tuple[Tensor, Tensor | None]] = []
        for size in sizes if first else reversed(sizes):
            done -= 0 if first else size
            try:
                y = stream.pop_levels(_label_log_probs(twin, size)) if file.classes else None
                parts.append((code.decode(stream, size, y, done), y))
            except (ValueError, AssertionError, LookupError) as error:  # LookupError: of a point outside its window
                raise differs from error
            done += size if first else 0
    parts = parts if first else parts[::-1]
    k = torch.cat([part for part, _ in parts])
    y = torch.cat([labels for _, labels in parts if labels is not None]) if file.classes else None
    if _checksum(k, y) != file.checksum or (isinstance(stream, Stack) and not stream.is_initial()):
        raise differs
    return Decompressed(bin_center(k, file.levels, model.dtype).cpu(), None if y is None else y.cpu())
