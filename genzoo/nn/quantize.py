r"""Quantisation of vectors. Shapes: B batch, D embedding, H height, W width, N tokens, K codes, L codes of a position.

**Vector quantisation.** A vector is replaced by the nearest of K codes, ``k = argmin_j |z - e_j|``. A code is the mean of the
vectors assigned to it, by exponential moving averages of their count and sum,

    N_k <- d N_k + (1 - d) n_k,      m_k <- d m_k + (1 - d) sum_{z -> k} z,      e_k = m_k / N_k

which is online k-means, without gradients. The counts in ``e_k`` are smoothed, ``N_k <- (N_k + eps)/(N + K eps) N`` with
``N = sum_k N_k``, which avoids division by zero. Counts are initialised as 1 and sums as the codes.

Unused codes would never move again. Codes used less than a fraction ``revival`` of the mean are therefore replaced by vectors
of the current batch; the first batch replaces all of them, which initialises the codebook by data.

**Residual quantisation.** L codebooks in turn, each of what the ones before it have left,

    r_0 = z,      k_l = argmin_j |r_(l-1) - e_(l, j)|,      r_l = r_(l-1) - e_(l, k_l)

so that ``z ~ sum_l e_(l, k_l)`` has K^L values from L K vectors. Each codebook is the moving average of its residuals. The L
codes of a position are adjacent columns of the grid of codes: in raster order, an autoregressive prior predicts each given the
ones before it at its position, and all of earlier positions. One codebook is vector quantisation.

**Finite scalar quantisation.** Each of a few dimensions is bounded and rounded to one of L_d integers,

    f(z) = (L_d - 1)/2 tanh(z + s) - o,      o = 0 for odd L_d, 1/2 for even L_d,      tanh(s) (L_d - 1)/2 = o

so that f(0) = 0; the grid of all K = prod L_d integer vectors replaces the codebook. Codes are divided by floor(L_d/2), which
maps them to [-1, 1].

Gradients pass to the vector by the straight-through estimator.

References:
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, https://arxiv.org/abs/1711.00937
    (section 3.2, appendix A.1).
    Razavi, van den Oord, Vinyals, "Generating Diverse High-Fidelity Images with VQ-VAE-2", 2019,
    https://arxiv.org/abs/1906.00446 (section 2.1).
    Lee, Kim, Kim, Cho, Han, "Autoregressive Image Generation using Residual Quantization", 2022,
    https://arxiv.org/abs/2203.01941 (section 3.1: eq. 2 and 3, the commitment loss of eq. 8).
    Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple", 2023,
    https://arxiv.org/abs/2309.15505 (section 3.1, appendix A.1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.numerics import distributed
from genzoo.numerics.constants import Constant
from genzoo.numerics.random import randint_shared


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """Straight-through estimator: the value of ``e`` with the gradient of ``z``."""
    return z + (e - z).detach()


def _argmin(x_NK: Tensor) -> Tensor:
    """Argmin of each row, (N,); on a CPU by numpy, whose vectorised ``argmin`` is eight times as fast."""
    # numpy supports neither other devices nor bfloat16 nor tensor subclasses such as fake tensors.
    if x_NK.device.type != "cpu" or x_NK.dtype == torch.bfloat16 or type(x_NK) is not Tensor:
        return x_NK.argmin(1)
    return torch.from_numpy(x_NK.numpy().argmin(1))


class Quantization(NamedTuple):
    """The codes of vectors."""

    e: Tensor  # (B, D, H, W), their vectors, with the straight-through gradient
    k: Tensor  # (B, H, W L) int64, their indices
    commitment: Tensor  # (), mean squared distance of the vectors from learned codes; 0 for a fixed grid
    z: Tensor  # the vectors, for ``update``


class Quantizer(nn.Module, ABC):
    """A map from vectors in D dimensions to L of K codes each.

    Args:
        codebook_size: K.
        in_dim: D.
        depth: L; the codes of a position are adjacent columns of the grid of codes.

    Attributes:
        out_dim: dimension of the vectors that codes are looked up as.
        learned: whether the codes follow the vectors; otherwise they are a fixed grid.
    """

    learned: bool = True

    def __init__(self, codebook_size: int, in_dim: int, depth: int = 1):
        super().__init__()
        self.codebook_size, self.depth, self.in_dim, self.out_dim = codebook_size, depth, in_dim, in_dim

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the codes of a grid of vectors, (H, W) -> (H, W L)."""
        return grid[0], grid[1] * self.depth

    def split(self, k_BHW: Tensor) -> tuple[Tensor, ...]:
        """Split the codes by their codebooks, (B, H, W L) -> L of (B, H, W), or other numbers of each code alike."""
        return k_BHW.unflatten(2, (-1, self.depth)).unbind(3)

    def join(self, columns: Sequence[Tensor]) -> Tensor:
        """Invert ``split``."""
        return torch.stack(list(columns), 3).flatten(2)

    @property
    @abstractmethod
    def marginals(self) -> Tensor:
        """Empirical distribution of each of the codes of a position, (L, K)."""

    @abstractmethod
    def forward(self, z_BDHW: Tensor) -> Quantization:
        """Quantise vectors, for training."""

    @abstractmethod
    def nearest(self, z_BDHW: Tensor) -> Tensor:
        """Return the indices of the codes at each position, (B, H, W L) int64."""

    @abstractmethod
    def lookup(self, k_BHW: Tensor) -> Tensor:
        """Return the vector of the codes at each position, (B, H, W L) -> (B, D, H, W)."""

    @abstractmethod
    def update(self, z_BDHW: Tensor, k_BHW: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Update the moving averages, in training; in distributed training by the vectors of all ranks.

        Args:
            z_BDHW: vectors, ``Quantization.z``.
            k_BHW: their indices.
            rng: source of randomness.

        Returns:
            Number of replaced codes, ().
        """


class Codebook(Quantizer):
    """A quantiser with one code for each position, and moving averages of the frequencies of the codes.

    Args:
        codebook_size: K.
        in_dim: D.
        decay: of the moving averages.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    counts: Tensor

    def __init__(self, codebook_size: int, in_dim: int, decay: float):
        super().__init__(codebook_size, in_dim)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.register_buffer("counts", torch.ones(codebook_size))

    @property
    def probs(self) -> Tensor:
        """Empirical distribution of the codes, (K,)."""
        return self.counts / self.counts.sum()

    @property
    def marginals(self) -> Tensor:
        return self.probs[None]

    def _count(self, k_N: Tensor) -> None:
        """Update the moving averages of the frequencies, by the codes of all ranks."""
        counts = torch.zeros_like(self.counts).index_add_(0, k_N, torch.ones_like(k_N, dtype=self.counts.dtype))
        self.counts.lerp_(distributed.all_reduce_sum(counts), 1 - self.decay)


class VectorQuantizer(Codebook):
    """An EMA codebook of K codes in D dimensions.

    Args:
        codebook_size: K.
        embedding_dim: D.
        decay: d of the moving averages.
        eps: smoothing of the counts.
        revival: codes used less than this fraction of the mean are replaced; 0 for never.
    """

    codes: Tensor
    sums: Tensor
    placed: Tensor

    def __init__(
        self, codebook_size: int, embedding_dim: int, decay: float = 0.99, eps: float = 1e-5, revival: float = 0.1
    ):
        super().__init__(codebook_size, embedding_dim, decay)
        if codebook_size < 2 or embedding_dim < 1:
            raise ValueError(
                f"a codebook needs at least 2 codes of at least 1 dimension, not {codebook_size} of {embedding_dim}"
            )
        if not 0 <= revival < 1:
            raise ValueError(f"revival must be in [0, 1), not {revival}")
        if eps <= 0:
            raise ValueError(f"eps must be positive, not {eps}")
        self.eps, self.revival = eps, revival
        side = math.sqrt(3 / embedding_dim)  # codes of about unit norm
        codes = torch.empty(codebook_size, embedding_dim).uniform_(-side, side)
        self.register_buffer("codes", codes)
        self.register_buffer("sums", codes.clone())
        self.register_buffer("placed", torch.tensor(revival == 0))  # whether the codebook is initialised

    def forward(self, z_BDHW: Tensor) -> Quantization:
        k_BHW = self.nearest(z_BDHW)
        e_BDHW = self.lookup(k_BHW)
        commitment = (z_BDHW - e_BDHW).square().mean()
        return Quantization(straight_through(z_BDHW, e_BDHW), k_BHW, commitment, z_BDHW)

    @torch.no_grad()
    def nearest(self, z_BDHW: Tensor) -> Tensor:
        """Return the index of the nearest code at each position, (B, H, W) int64."""
        with torch.autocast(z_BDHW.device.type, enabled=False):  # cancellation in bfloat16
            z_ND = z_BDHW.movedim(1, -1).flatten(0, -2)
            # |z - e|^2 up to the constant |z|^2: one matrix product.
            squares_K, codes_DK = self.codes.square().sum(1), self.codes.T
            # Blocks whose distances fit in a CPU cache.
            blocks = z_ND.split(1024 if z_ND.device.type == "cpu" else len(z_ND))
            k_N = torch.cat([_argmin(torch.addmm(squares_K, block, codes_DK, alpha=-2)) for block in blocks])
        return k_N.view(z_BDHW.movedim(1, -1).shape[:-1])

    def lookup(self, k_BHW: Tensor) -> Tensor:
        """Return the code of each index, (B, D, H, W)."""
        # In the memory format of the vectors: mixed formats take four times as long.
        return F.embedding(k_BHW, self.codes).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def update(self, z_BDHW: Tensor, k_BHW: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Update the moving averages and revive dead codes, in training, see ``Quantizer.update``.

        In distributed training the vectors of all ranks are used, and all ranks have the same codebook.
        """
        z_ND, k_N = z_BDHW.movedim(1, -1).flatten(0, -2).to(self.codes.dtype), k_BHW.flatten()
        sums = torch.zeros_like(self.sums).index_add_(0, k_N, z_ND)
        self._count(k_N)
        self.sums.lerp_(distributed.all_reduce_sum(sums), 1 - self.decay)
        dead = self._revive(z_ND, rng) if self.revival else k_N.new_zeros(())
        total = self.counts.sum()
        smoothed = (self.counts + self.eps) / (total + self.codebook_size * self.eps) * total
        self.codes.copy_(self.sums / smoothed[:, None])
        return dead

    def _revive(self, z_ND: Tensor, rng: torch.Generator | None) -> Tensor:
        """Replace rarely used codes, initially all, by vectors of the batch; return their number, ()."""
        replacements = self._replacements(z_ND, rng)
        mean = self.counts.sum() / self.codebook_size
        dead = (self.counts < self.revival * mean) | ~self.placed
        self.counts.copy_(torch.where(dead, mean, self.counts))
        self.sums.copy_(torch.where(dead[:, None], mean * replacements, self.sums))
        self.placed.fill_(True)
        return dead.sum()

    def _replacements(self, z_ND: Tensor, rng: torch.Generator | None) -> Tensor:
        """Draw vectors of the global batch, (K, D).

        Always K, since their required number would need a device synchronisation.
        """
        N, device = len(z_ND), z_ND.device
        place_K = distributed.broadcast(
            randint_shared(distributed.world_size() * N, self.codebook_size, rng=rng, device=device)
        )
        mine_K1 = (place_K // N == distributed.rank())[:, None]
        return distributed.all_reduce_sum(torch.where(mine_K1, z_ND.index_select(0, place_K % N), 0))


class FiniteScalarQuantizer(Codebook):
    """A grid of K codes with L_d values in dimension d, which has no weights.

    Args:
        code_levels: L_1, ..., L_D.
        decay: of the moving averages of the frequencies.

    Raises:
        ValueError: for less than 3 values in a dimension; with 2, the bound is nearly flat at 0.
    """

    MARGIN = 1e-3  # relative, of the bound: the outermost codes are reached

    def __init__(self, code_levels: Sequence[int], decay: float = 0.99):
        if not code_levels or min(code_levels) < 3:
            raise ValueError(f"code_levels must be at least 3 in each dimension, not {list(code_levels)}")
        super().__init__(math.prod(code_levels), len(code_levels), decay)
        levels = torch.tensor(code_levels)
        self._levels = Constant(levels)
        self._strides = Constant(levels.cumprod(0) // levels)  # the first dimension varies fastest
        self._half = Constant(levels // 2)

    def bound(self, z_BDHW: Tensor) -> Tensor:
        """Map vectors into the grid, f(z)/floor(L_d/2), (B, D, H, W)."""
        z = z_BDHW.movedim(1, -1)
        levels = self._levels.on(z.device)
        radius = (levels - 1).to(z.dtype) * (0.5 * (1 + self.MARGIN))
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        bounded = radius * torch.tanh(z + torch.atanh(offset / radius)) - offset
        return (bounded / self._half.on(z.device)).movedim(-1, 1)

    def forward(self, z_BDHW: Tensor) -> Quantization:
        k_BHW = self.nearest(z_BDHW)
        e_BDHW = straight_through(self.bound(z_BDHW), self.lookup(k_BHW))
        return Quantization(e_BDHW, k_BHW, z_BDHW.new_zeros(()), z_BDHW)

    @torch.no_grad()
    def nearest(self, z_BDHW: Tensor) -> Tensor:
        """Return the index of the code that each vector is rounded to, (B, H, W) int64."""
        return self.index(self.bound(z_BDHW))

    def index(self, e_BDHW: Tensor) -> Tensor:
        """Return the index of the code next to each bounded vector, (B, H, W) int64; the inverse of ``lookup``."""
        half = self._half.on(e_BDHW.device)
        digits = (e_BDHW.movedim(1, -1) * half).round().long() + half
        return (digits * self._strides.on(e_BDHW.device)).sum(-1)

    def lookup(self, k_BHW: Tensor) -> Tensor:
        """Return the code of each index on [-1, 1], (B, D, H, W)."""
        device = k_BHW.device
        half = self._half.on(device)
        digits = k_BHW[..., None] // self._strides.on(device) % self._levels.on(device)
        return ((digits - half).to(self.counts.dtype) / half).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def update(self, z_BDHW: Tensor, k_BHW: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Update the moving averages of the frequencies, see ``Quantizer.update``; no code is replaced."""
        self._count(k_BHW.flatten())
        return k_BHW.new_zeros(())


class ResidualQuantizer(Quantizer):
    """L codebooks, each of the residuals of the ones before it.

    The commitment loss sums the mean squared residuals ``|z - sg[e_1 + ... + e_l]|^2`` of all l (Lee et al. 2022, eq. 8).

    Args:
        codebook_size: K, of each codebook.
        embedding_dim: D.
        depth: L.
        decay, eps, revival: as in ``VectorQuantizer``.

    Raises:
        ValueError: for less than one codebook.
    """

    def __init__(
        self,
        codebook_size: int,
        embedding_dim: int,
        depth: int = 4,
        decay: float = 0.99,
        eps: float = 1e-5,
        revival: float = 0.1,
    ):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        super().__init__(codebook_size, embedding_dim, depth)
        self.codebooks: Sequence[VectorQuantizer] = nn.ModuleList(  # type: ignore[assignment]
            VectorQuantizer(codebook_size, embedding_dim, decay, eps, revival) for _ in range(depth)
        )

    @property
    def marginals(self) -> Tensor:
        return torch.cat([codebook.marginals for codebook in self.codebooks])

    def _residuals(self, z_BDHW: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the residual that each codebook quantises, its codes, and their vectors."""
        residuals: list[Tensor] = []
        indices: list[Tensor] = []
        vectors: list[Tensor] = []
        for codebook in self.codebooks:
            residuals.append(z_BDHW)
            indices.append(codebook.nearest(z_BDHW))
            vectors.append(codebook.lookup(indices[-1]))
            z_BDHW = z_BDHW - vectors[-1]
        return residuals, indices, vectors

    def forward(self, z_BDHW: Tensor) -> Quantization:
        residuals, indices, vectors = self._residuals(z_BDHW)
        squares = [(r - e).square().mean() for r, e in zip(residuals, vectors, strict=True)]
        e_BDHW, commitment = _total(vectors), _total(squares)
        return Quantization(straight_through(z_BDHW, e_BDHW), self.join(indices), commitment, z_BDHW)

    @torch.no_grad()
    def nearest(self, z_BDHW: Tensor) -> Tensor:
        """Return the indices of the nearest codes of each residual, (B, H, W L) int64."""
        return self.join(self._residuals(z_BDHW)[1])

    def lookup(self, k_BHW: Tensor) -> Tensor:
        """Return the sum of the codes at each position, (B, D, H, W)."""
        return _total([book.lookup(k) for book, k in zip(self.codebooks, self.split(k_BHW), strict=True)])

    @torch.no_grad()
    def update(self, z_BDHW: Tensor, k_BHW: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Update each codebook by its residuals, see ``Quantizer.update``."""
        residuals: list[Tensor] = []
        indices = self.split(k_BHW)
        for codebook, k in zip(self.codebooks, indices, strict=True):  # all of them before a codebook moves
            residuals.append(z_BDHW)
            z_BDHW = z_BDHW - codebook.lookup(k)
        triples = zip(self.codebooks, residuals, indices, strict=True)
        return _total([codebook.update(r, k, rng) for codebook, r, k in triples])


def _total(terms: Sequence[Tensor]) -> Tensor:
    """Sum tensors; a single one is returned as it is."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def perplexity(k: Tensor, codebook_size: int, all_ranks: bool = False) -> tuple[Tensor, Tensor]:
    """Return the perplexity of the codes of a batch, and the fraction of codes used.

    Args:
        k: indices of codes, (B, ...) int64.
        codebook_size: K.
        all_ranks: whether to average over ranks.
    """
    counts = torch.zeros(codebook_size, device=k.device).index_add_(
        0, k.flatten(), torch.ones(k.numel(), device=k.device)
    )
    p = (distributed.all_reduce_mean(counts) if all_ranks else counts) / k.numel()
    return torch.exp(-torch.xlogy(p, p).sum()), (p > 0).float().mean()
