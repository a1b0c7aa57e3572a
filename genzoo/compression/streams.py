r"""Entropy coding of levels and of lattice points under tabulated distributions, by the range and ANS coders of constriction.

``Queue`` is an arithmetic (range) coder: first in, first out. ``Stack`` is an asymmetric numeral system: last in, first out.
Popping a symbol from a stack that holds random bits draws it from the distribution by which it is decoded, and takes
``-log2 P`` bits; pushing it again restores the stack. This is bits back.

**Agreement of encoder and decoder.** A symbol is lost if the two compute probabilities that differ at all. Outputs of networks
differ in their last bits with the batch size, the number of threads and the processor. They are rounded here, from float64 with
errors of about 1e-14 to multiples of 2^-10, before a probability is computed from them. The relative change of a
probability costs less than 1e-6 bits per symbol.

A probability is at least 2^-24.

References:
    Martin, "Range encoding: an algorithm for removing redundancy from a digitised message", 1979.
    Duda, "Asymmetric numeral systems", 2013, https://arxiv.org/abs/1311.2540.
    Bamler, "Understanding Entropy Coding With Asymmetric Numeral Systems (ANS): a Statistician's Perspective", 2022,
    https://arxiv.org/abs/2201.01741 (and https://bamler-lab.github.io/constriction).
    Townsend, Bird, Barber, "Practical Lossless Compression with Latent Variables using Bits Back Coding", 2019,
    https://arxiv.org/abs/1901.04866.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genzoo.errors import UsageError

try:
    import constriction
except ImportError:  # an optional package
    constriction = None

LOG_PROB_GRID = 2.0**10  # log probabilities are multiples of 2^-10, which costs 1e-7 bits a level
MOMENT_GRID = 2.0**10  # means and log standard deviations of lattice points are multiples of 2^-10
TAIL = 6.0  # standard deviations of a window of lattice points; points outside are escaped
FAR = 2**22  # bound of an escaped point, relative to the centre of the window
MAX_LOG_STD = 11.0  # in lattice units; wider windows would not fit into 24 bits


def require_constriction() -> None:
    """Check that the package is installed.

    Raises:
        UsageError: otherwise.
    """
    if constriction is None:
        raise UsageError("compression requires the package constriction: pip install 'genzoo[compress]'")


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _symbols(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(_array(x.reshape(-1)), dtype=np.int32)


def _probabilities(log_probs: Tensor) -> np.ndarray:
    """Tabulate rounded probabilities, (m, K) float64, up to normalisation.

    Raises:
        ValueError: for probabilities that are not numbers.
    """
    log_p = log_probs.double()
    if not bool((log_p < math.inf).all()):
        raise ValueError("the model has probabilities that are NaN or infinite")
    # constriction reads memory in row-major order, whatever the strides.
    return np.exp(np.ascontiguousarray(_array(torch.round(log_p * LOG_PROB_GRID) / LOG_PROB_GRID)))


class Queue:
    """A range coder, first in, first out.

    Args:
        words: to decode, uint32; None to encode.
    """

    def __init__(self, words: np.ndarray | None = None):
        queue = constriction.stream.queue
        self._coder: Any = queue.RangeEncoder() if words is None else queue.RangeDecoder(words)
        self._levels = constriction.stream.model.Categorical(perfect=False)

    def push_levels(self, k: Tensor, log_probs: Tensor) -> None:
        """Encode levels, (m,), by their log probabilities, (m, K)."""
        self._coder.encode(_symbols(k), self._levels, _probabilities(log_probs))

    def pop_levels(self, log_probs: Tensor) -> Tensor:
        """Decode levels, (m,) int64, by their log probabilities, (m, K)."""
        found = self._coder.decode(self._levels, _probabilities(log_probs))
        return torch.from_numpy(found.astype(np.int64)).to(log_probs.device)

    def words(self) -> np.ndarray:
        """Return the encoded words, uint32."""
        return self._coder.get_compressed()


def initial_words(n: int) -> np.ndarray:
    """Return the words below those of the first event, pseudo-random, of which more lie deeper, (n,) uint32."""
    words = np.random.PCG64(0).random_raw(n).astype(np.uint32)
    words[:1] |= 1  # the top of a stack is not zero
    return words[::-1].copy()


class Stack:
    """An asymmetric numeral system, last in, first out.

    A new stack holds as few pseudo-random words as its pops need: they are put beneath it on demand.

    Args:
        words: to decode, uint32, the top last; None to encode.
    """

    LEAST = 2  # words of the state of the coder

    def __init__(self, words: np.ndarray | None = None):
        self._initial = self.LEAST
        self._coder: Any = self._open(initial_words(self.LEAST) if words is None else words)
        self._growing = words is None
        self._levels = constriction.stream.model.Categorical(perfect=False)
        self._uniform = constriction.stream.model.Uniform(2 * FAR)

    @staticmethod
    def _open(words: np.ndarray) -> Any:
        return constriction.stream.stack.AnsCoder(words)

    @property
    def bits(self) -> int:
        """Bits on the stack, in whole words."""
        return self._coder.num_bits()

    @property
    def initial_bits(self) -> int:
        """Bits of the pseudo-random words beneath a new stack."""
        return 32 * self._initial

    def words(self) -> np.ndarray:
        """Return the words on the stack, uint32, the top last."""
        return self._coder.get_compressed()

    def is_initial(self) -> bool:
        """Whether nothing is left but the pseudo-random words that encoding started from."""
        words = self.words()
        return len(words) >= self.LEAST and np.array_equal(words, initial_words(len(words)))

    def _pop(self, decode: Callable[[Any], np.ndarray], m: int) -> np.ndarray:
        """Decode, with more pseudo-random words beneath a growing stack that runs empty."""
        if not self._growing:
            return decode(self._coder)
        while True:
            coder = self._coder.clone()
            found = decode(coder)
            if coder.num_words() >= self.LEAST:
                self._coder = coder
                return found
            more = max(1, m // 64)
            words = initial_words(self._initial + more)[:more]
            self._coder = self._open(np.concatenate([words, self.words()]))
            self._initial += more

    def push_levels(self, k: Tensor, log_probs: Tensor) -> None:
        """Encode levels, (m,), by their log probabilities, (m, K)."""
        self._coder.encode_reverse(_symbols(k), self._levels, _probabilities(log_probs))

    def pop_levels(self, log_probs: Tensor) -> Tensor:
        """Decode levels, (m,) int64, by their log probabilities, (m, K)."""
        probs = _probabilities(log_probs)
        found = self._pop(lambda coder: coder.decode(self._levels, probs), len(probs))
        return torch.from_numpy(found.astype(np.int64)).to(log_probs.device)

    @staticmethod
    def _window(mean: Tensor, std: Tensor) -> tuple[np.ndarray, int, tuple[np.ndarray, np.ndarray]]:
        """Return the centre of each window of lattice points, (m,), half its width, and the moments relative to the centre.

        Args:
            mean, std: of a normal distribution of each point, in lattice units, (m,).

        Raises:
            ValueError: for moments that are not finite.
        """
        log_std = std.double().log()
        if not bool(mean.isfinite().all()) or not bool((log_std < math.inf).all()):
            raise ValueError("the model has means or standard deviations that are NaN or infinite")
        m = _array(torch.round(mean.double() * MOMENT_GRID)) / MOMENT_GRID
        s = np.exp(_array(torch.round(log_std.clamp(-MAX_LOG_STD, MAX_LOG_STD) * MOMENT_GRID)) / MOMENT_GRID)
        centre = np.floor(m + 0.5)
        return centre, math.ceil(TAIL * float(s.max())) + 1, (m - centre, s)

    @staticmethod
    def _gaussian(width: int) -> Any:
        return constriction.stream.model.QuantizedGaussian(-width, width)

    def push_normal(self, j: Tensor, mean: Tensor, std: Tensor, *, escapes: bool) -> None:
        """Encode lattice points by the probability of their cells under a normal distribution.

        Args:
            j: int64, (m,).
            mean, std: in lattice units, (m,).
            escapes: whether points may lie outside the window; those that were popped without escapes do not.

        Raises:
            ValueError: for a point that is further than 2^22 from its mean.
        """
        if not len(j):
            return
        centre, width, moments = self._window(mean, std)
        offset = _array(j) - centre.astype(np.int64)
        if escapes:
            width += 1  # the outermost points are escapes
            far = np.abs(offset) >= width
            if far.any():
                raw = offset[far] + FAR
                if raw.min() < 0 or raw.max() >= 2 * FAR:
                    raise ValueError("the model has a step too far from its mean to be coded")
                self._coder.encode_reverse(raw.astype(np.int32), self._uniform)
            offset = offset.clip(-width, width)
        self._coder.encode_reverse(offset.astype(np.int32), self._gaussian(width), *moments)

    def pop_normal(self, mean: Tensor, std: Tensor, *, escapes: bool) -> Tensor:
        """Decode lattice points, (m,) int64; the inverse of ``push_normal``."""
        if not len(mean):
            return torch.zeros(0, dtype=torch.int64, device=mean.device)
        centre, width, moments = self._window(mean, std)
        width += escapes
        family = self._gaussian(width)
        offset = self._pop(lambda coder: coder.decode(family, *moments), len(centre)).astype(np.int64)
        if escapes and (far := np.abs(offset) == width).any():
            count = int(far.sum())
            offset[far] = self._pop(lambda coder: coder.decode(self._uniform, count), count).astype(np.int64) - FAR
        return torch.from_numpy(centre.astype(np.int64) + offset).to(mean.device)
