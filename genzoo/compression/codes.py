r"""Codes of events by the factors of a model: how a batch is encoded, and decoded in the reverse order.

**Arithmetic coding** of a product of conditional probabilities (autoregressive models; discrete diffusion in a random order of
each event): every level is coded by its probability given the levels coded before.

**Bits back** for latents (VAE, hierarchical VAE): pop z ~ q(z | x), push x by p(x | z), push z by p(z). The expected cost is
the negative ELBO, as the bits that q takes are those that the decoder, which knows x, gives back. The noise eps of a latent is
rounded to a lattice. Its spacing is a power of 2, at most a quarter of the standard deviation of the posterior, measured on
samples of the model itself, so that the decoder knows it too; noise whose posterior is the prior is 0 and costs nothing.

**Bits back along a chain** (diffusion), one state at a time (Bit-Swap), with the data x_0 and i from 0 to T - 1: pop
x_{i+1} ~ q(x_{i+1} | x_i), push x_i by p(x_i | x_{i+1}); finally push x_T by N(0, I). Only one state is held outside the stack,
so that the first event needs the bits of one state, not of T.

References:
    Shannon, "A Mathematical Theory of Communication", 1948; Rissanen, Langdon, "Arithmetic coding", 1979.
    Hinton, van Camp, "Keeping Neural Networks Simple by Minimizing the Description Length of the Weights", 1993.
    Townsend, Bird, Barber, "Practical Lossless Compression with Latent Variables using Bits Back Coding", 2019,
    https://arxiv.org/abs/1901.04866 (algorithm 1).
    Kingma, Abbeel, Ho, "Bit-Swap: Recursive Bits-Back Coding for Lossless Compression with Hierarchical Latent Variables",
    2019, https://arxiv.org/abs/1905.06845 (algorithm 1).
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (section 4.3).
    Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021, https://arxiv.org/abs/2107.00630 (appendix N: lossless
    compression).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from genzoo.compression.streams import Queue, Stack
from genzoo.distributions.discretization import bin_center
from genzoo.model import AbilityError, Compressible, Factorized, Hierarchical, Markov
from genzoo.numerics.random import SampleStreams, generator

Stream = TypeVar("Stream", Queue, Stack)
FINENESS = 4.0  # lattice points per standard deviation, at least
CALIBRATION = 64  # samples of a model from which the spacing of its latents is chosen
INACTIVE = 3e-3  # nats, mean KL of a latent below which its noise is 0


class Code(ABC, Generic[Stream]):
    """A code of batches of events by a model, in float64."""

    stream: type[Stream]

    @abstractmethod
    def encode(self, stream: Stream, k: Tensor, y: Tensor | None, index: int) -> None:
        """Encode levels, (n, *shape) int64, of the batch that starts with event ``index``."""

    @abstractmethod
    def decode(self, stream: Stream, n: int, y: Tensor | None, index: int) -> Tensor:
        """Decode levels, (n, *shape) int64."""


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1)


def _rows(log_probs: Tensor) -> Tensor:
    """Return the log probabilities of every pixel, (n, K, ...) -> (n * ..., K)."""
    return log_probs.movedim(1, -1).reshape(-1, log_probs.shape[1])


class ArithmeticCode(Code[Queue]):
    """A product of conditional probabilities."""

    stream = Queue

    def __init__(self, model: Factorized):
        self.model = model

    def encode(self, stream: Queue, k: Tensor, y: Tensor | None, index: int) -> None:
        flat = k.flatten(1)

        def draw(log_probs: Tensor, place: Tensor) -> Tensor:
            level = flat.gather(1, place[:, None])[:, 0]
            stream.push_levels(level, log_probs)
            return level

        self.model.factorize(len(k), y, draw, rng=self._rng(index))

    def decode(self, stream: Queue, n: int, y: Tensor | None, index: int) -> Tensor:
        k = torch.zeros(n, self.model.dim, dtype=torch.int64, device=self.model.device)

        def draw(log_probs: Tensor, place: Tensor) -> Tensor:
            level = stream.pop_levels(log_probs)
            k.scatter_(1, place[:, None], level[:, None])
            return level

        self.model.factorize(n, y, draw, rng=self._rng(index))
        return k.view(n, *self.model.shape)

    def _rng(self, index: int) -> torch.Generator:
        return generator("compression", index, device=self.model.device)


class LatentCode(Code[Stack]):
    """Bits back of a density with latents."""

    stream = Stack

    def __init__(self, model: Hierarchical):
        self.model = model
        self.spacings = _spacings(model)

    def _moments(self, layer: int, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moments of the active latents of a layer in lattice units, (n * active,)."""
        spacing, active = self._lattice(layer)
        return _flat(mean.flatten(1)[:, active] / spacing), _flat(log_std.exp().flatten(1)[:, active] / spacing)

    def _lattice(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the spacings of the active latents of a layer, (active,), and their indices."""
        active = self.spacings[layer].nonzero()[:, 0]
        return self.spacings[layer][active], active

    def _noise(self, layer: int, j: Tensor, like: Tensor) -> Tensor:
        """Return the noise of a layer at lattice points, like another tensor, (n, ...)."""
        spacing, active = self._lattice(layer)
        eps = torch.zeros_like(like).flatten(1)
        eps[:, active] = j.view(len(like), -1) * spacing
        return eps.view_as(like)

    def encode(self, stream: Stack, k: Tensor, y: Tensor | None, index: int) -> None:
        drawn: list[tuple[Tensor, Tensor]] = []  # lattice points and the standard deviations of their priors

        def draw(mean: Tensor, log_std: Tensor) -> Tensor:
            layer = len(drawn)
            j = stream.pop_normal(*self._moments(layer, mean, log_std), escapes=False)
            drawn.append((j, self._moments(layer, torch.zeros_like(mean), torch.zeros_like(mean))[1]))
            return self._noise(layer, j, mean)

        x = self._values(k)
        log_probs = self.model.descend(len(k), y, draw, x)
        tables = [log_probs(x[:, :c]) for c in range(x.shape[1])]
        for c in reversed(range(len(tables))):
            stream.push_levels(k[:, c], _rows(tables[c]))
        for j, std in reversed(drawn):
            stream.push_normal(j, torch.zeros_like(std), std, escapes=True)

    def decode(self, stream: Stack, n: int, y: Tensor | None, index: int) -> Tensor:
        points: list[Tensor] = []

        def draw(mean: Tensor, log_std: Tensor) -> Tensor:
            j = stream.pop_normal(*self._moments(len(points), mean, log_std), escapes=True)
            points.append(j)
            return self._noise(len(points) - 1, j, mean)

        log_probs = self.model.descend(n, y, draw)
        k = torch.zeros(n, 0, *self.model.shape[1:], dtype=torch.int64, device=self.model.device)
        for _ in range(self.model.shape[0]):
            table = log_probs(self._values(k))
            k = torch.cat([k, stream.pop_levels(_rows(table)).view(n, 1, *k.shape[2:])], dim=1)
        posteriors: list[tuple[Tensor, Tensor]] = []

        def replay(mean: Tensor, log_std: Tensor) -> Tensor:
            layer = len(posteriors)
            posteriors.append(self._moments(layer, mean, log_std))
            return self._noise(layer, points[layer], mean)

        self.model.descend(n, y, replay, self._values(k))
        for j, (mean, std) in zip(reversed(points), reversed(posteriors), strict=True):
            stream.push_normal(j, mean, std, escapes=False)
        return k

    def _values(self, k: Tensor) -> Tensor:
        assert self.model.levels is not None
        return bin_center(k, self.model.levels, self.model.dtype)


def _spacings(model: Hierarchical) -> list[Tensor]:
    """Choose the spacing of the noise of each layer, flattened; 0 where it is inactive."""
    rng = SampleStreams(0, range(CALIBRATION), device=model.device)
    y = model.conditioner.draw(CALIBRATION, None, rng)
    x = model.sample(CALIBRATION, y, rng=rng).x.to(model.dtype)
    spacings = []

    def draw(mean: Tensor, log_std: Tensor) -> Tensor:
        std = log_std.exp()
        kl = (0.5 * (mean.square() + std.square() - 1) - log_std).mean(0)
        spacing = torch.exp2(torch.floor(torch.log2(std.quantile(0.05, dim=0).clamp(2.0**-8, 1.0) / FINENESS)))
        spacings.append(torch.where(kl < INACTIVE, 0.0, spacing).flatten())
        return mean

    model.descend(CALIBRATION, y, draw, x)
    return spacings


class ChainCode(Code[Stack]):
    """Bits back along a chain, one state at a time."""

    stream = Stack

    def __init__(self, model: Markov):
        self.model = model
        self.forward = [model.forward_step(i) for i in range(model.chain_length)]
        self.spacings = [std / FINENESS for _, std in self.forward]  # of x_1, ..., x_T

    def _forward(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moments of q(x_{i+1} | x_i) in lattice units."""
        scale, std = self.forward[i]
        mean = _flat(x) * (scale / self.spacings[i])
        return mean, torch.full_like(mean, std / self.spacings[i])

    @torch.no_grad()
    def _backward(self, i: int, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the moments of p(x_i | x_{i+1}) in lattice units, of p(x_T) for i = T."""
        spacing = self.spacings[i - 1]
        if i == len(self.forward):
            return torch.zeros_like(_flat(x)), torch.full_like(_flat(x), 1 / spacing)
        mean, log_std = self.model.backward_step(i, x, y)
        return _flat(mean) / spacing, _flat(log_std.exp()) / spacing

    @torch.no_grad()
    def _table(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the log probabilities of the levels of every pixel given x_1, (n * D, K)."""
        return _rows(self.model.level_log_probs(x, y))

    def encode(self, stream: Stack, k: Tensor, y: Tensor | None, index: int) -> None:
        assert self.model.levels is not None
        x, j, T = bin_center(k, self.model.levels, self.model.dtype), k, len(self.forward)
        for i in range(T):
            after = stream.pop_normal(*self._forward(i, x), escapes=False)
            x = after.to(x.dtype).view_as(x) * self.spacings[i]
            if i == 0:
                stream.push_levels(j, self._table(x, y))
            else:
                stream.push_normal(j, *self._backward(i, x, y), escapes=True)
            j = after
        stream.push_normal(j, *self._backward(T, x, y), escapes=True)

    def decode(self, stream: Stack, n: int, y: Tensor | None, index: int) -> Tensor:
        assert self.model.levels is not None
        T = len(self.forward)
        x = torch.zeros(n, *self.model.shape, device=self.model.device, dtype=self.model.dtype)
        after = stream.pop_normal(*self._backward(T, x, y), escapes=True)
        for i in reversed(range(T)):
            x = after.to(x.dtype).view_as(x) * self.spacings[i]
            if i == 0:
                k = stream.pop_levels(self._table(x, y)).view_as(x)
                before, x = k, bin_center(k, self.model.levels, self.model.dtype)
            else:
                before = stream.pop_normal(*self._backward(i, x, y), escapes=True)
                x = before.to(x.dtype).view_as(x) * self.spacings[i - 1]
            stream.push_normal(after, *self._forward(i, x), escapes=False)
            after = before
        return k


CODES: dict[type, tuple[str, Callable[[Any], Code]]] = {
    Factorized: ("arithmetic", ArithmeticCode),
    Hierarchical: ("bits back", LatentCode),
    Markov: ("bits back", ChainCode),
}


def _entry(model: object) -> tuple[str, Callable[[Any], Code]] | None:
    return next((entry for ability, entry in CODES.items() if isinstance(model, ability)), None)


def kind_of_code(model: object) -> str:
    """Name the code of a family, "arithmetic" or "bits back"; "" if it has none."""
    entry = _entry(model)
    return entry[0] if entry else ""


def check_compressible(model: object) -> None:
    """Check that a model has a lossless code.

    Raises:
        AbilityError: for a family without one, and for options of a family and data that are no integers.
    """
    name = type(model).__name__
    if not isinstance(model, Compressible) or _entry(model) is None:
        raise AbilityError(
            f"{name} has no lossless code: choose autoregressive, masked_diffusion, vae, hvae or ddpm, whose densities are "
            "of integers"
        )
    if model.levels is None:
        raise AbilityError(f"{name}: real vectors have no lossless code: compress images, which have levels")
    try:
        model.check_compressible()
    except ValueError as error:
        raise AbilityError(f"{name} has no lossless code: {error}") from error


def code_of(model: Compressible) -> Code:
    """Return the code of a model, whose weights are float64."""
    check_compressible(model)
    entry = _entry(model)
    assert entry is not None
    return entry[1](model)
