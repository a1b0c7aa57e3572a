r"""Vector quantisation with a codebook of moving averages. Shapes: B batch, D embedding, H height, W width, N tokens, K codes.

A vector is replaced by the nearest of K codes, ``k = argmin_j |z - e_j|``. The codes are no parameters: each is the mean of
the vectors that it stands for, kept as moving averages of their count and of their sum,

    N_k <- d N_k + (1 - d) n_k,      m_k <- d m_k + (1 - d) sum_{z -> k} z,      e_k = m_k / N_k

which is online k-means: no gradient reaches the codebook, and no learning rate moves it. In ``e_k`` the counts are smoothed,
``N_k <- (N_k + eps)/(N + K eps) N`` with ``N = sum_k N_k``, so that no code is divided by zero. Counts begin as one and sums
as the codes themselves: from zero, the first code that is missed would be thrown far away.

A code that nothing is near to never moves again. Codes that are used less than a share ``revival`` of the mean are therefore
replaced by vectors of the present batch; the first batch replaces them all, which places the codebook where the data are.

The gradient of what follows passes to the vector as if it had not been rounded (``straight_through``).

References:
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, https://arxiv.org/abs/1711.00937
    (section 3.2, appendix A.1).
    Razavi, van den Oord, Vinyals, "Generating Diverse High-Fidelity Images with VQ-VAE-2", 2019,
    https://arxiv.org/abs/1906.00446 (section 2.1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.numerics import distributed
from genzoo.numerics.random import choose


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """Return the value of ``e`` with the gradient of ``z``."""
    return z + (e - z).detach()


def _argmin(x_NK: Tensor) -> Tensor:
    """Return the place of the first least element of each row, (N,).

    On a CPU numpy's ``argmin``, which compares many numbers at once, takes an eighth of the time of torch's.
    """
    # Numpy knows neither other devices nor bfloat16 nor subclasses of tensors, as those that only have a shape.
    if x_NK.device.type != "cpu" or x_NK.dtype == torch.bfloat16 or type(x_NK) is not Tensor:
        return x_NK.argmin(1)
    return torch.from_numpy(x_NK.numpy().argmin(1))


class VectorQuantizer(nn.Module):
    """A codebook of K codes in D dimensions.

    Args:
        codebook_size: K.
        embedding_dim: D.
        decay: d of the moving averages.
        eps: of the smoothed counts.
        revival: codes used less than this share of the mean are replaced; 0 for never.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    placed: Tensor

    def __init__(
        self, codebook_size: int, embedding_dim: int, decay: float = 0.99, eps: float = 1e-5, revival: float = 0.1
    ):
        super().__init__()
        if codebook_size < 2 or embedding_dim < 1:
            raise ValueError(
                f"a codebook needs at least 2 codes of 1 dimension, not {codebook_size} of {embedding_dim}"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        if not 0 <= revival < 1:
            raise ValueError(f"revival must be in [0, 1), not {revival}")
        if eps <= 0:
            raise ValueError(f"eps must be positive, not {eps}")
        self.codebook_size, self.decay, self.eps, self.revival = codebook_size, decay, eps, revival
        side = math.sqrt(3 / embedding_dim)  # codes of about unit length
        codes = torch.empty(codebook_size, embedding_dim).uniform_(-side, side)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", codes.clone())
        self.register_buffer("placed", torch.tensor(revival == 0))  # whether a first batch has placed the codes

    @property
    def probs(self) -> Tensor:
        """How often each code is used, (K,)."""
        return self.counts / self.counts.sum()

    @torch.no_grad()
    def nearest(self, z_BDHW: Tensor) -> Tensor:
        """Return the index of the nearest code at each place, (B, H, W) int64."""
        with torch.autocast(z_BDHW.device.type, enabled=False):  # a difference of squares, too coarse in bfloat16
            z_ND = z_BDHW.movedim(1, -1).flatten(0, -2)
            # |z - e|^2 without |z|^2, which is the same for every code: one matrix product.
            squares_K, codes_DK = self.codes.square().sum(1), self.codes.T
            # Of as many vectors at a time as leave their distances in a processor's cache.
            blocks = z_ND.split(1024 if z_ND.device.type == "cpu" else len(z_ND))
            k_N = torch.cat([_argmin(torch.addmm(squares_K, block, codes_DK, alpha=-2)) for block in blocks])
        return k_N.view(z_BDHW.movedim(1, -1).shape[:-1])

    def lookup(self, k_BHW: Tensor) -> Tensor:
        """Return the code of each index, (B, D, H, W)."""
        # In the vectors' own layout: arithmetic with both in two layouts takes four times as long.
        return F.embedding(k_BHW, self.codes).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def update(self, z_BDHW: Tensor, k_BHW: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Move the codes towards the vectors that they stand for, and revive the dead ones; for training alone.

        Where ranks share a batch the vectors of all of them count, and the codebook stays the same on all.

        Args:
            z_BDHW: vectors.
            k_BHW: the index of each, from ``nearest``.
            rng: chooses the vectors that revive codes.

        Returns:
            How many codes were dead, ().
        """
        z_ND, k_N = z_BDHW.movedim(1, -1).flatten(0, -2).to(self.codes.dtype), k_BHW.flatten()
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        counts.index_add_(0, k_N, torch.ones_like(k_N, dtype=counts.dtype))
        sums.index_add_(0, k_N, z_ND)
        self.counts.lerp_(distributed.all_reduce_sum(counts), 1 - self.decay)
        self.sums.lerp_(distributed.all_reduce_sum(sums), 1 - self.decay)
        dead = self._revive(z_ND, rng) if self.revival else k_N.new_zeros(())
        total = self.counts.sum()
        smoothed = (self.counts + self.eps) / (total + self.codebook_size * self.eps) * total
        self.codes.copy_(self.sums / smoothed[:, None])
        return dead

    def _revive(self, z_ND: Tensor, rng: torch.Generator | None) -> Tensor:
        """Put vectors of the batch in the place of codes that are hardly used, or of all before the first; count them, ()."""
        spare = self._spare(z_ND, rng)
        mean = self.counts.sum() / self.codebook_size
        dead = (self.counts < self.revival * mean) | ~self.placed
        self.counts.copy_(torch.where(dead, mean, self.counts))
        self.sums.copy_(torch.where(dead[:, None], mean * spare, self.sums))
        self.placed.fill_(True)
        return dead.sum()

    def _spare(self, z_ND: Tensor, rng: torch.Generator | None) -> Tensor:
        """Draw vectors of the batch, wherever they are, (K, D).

        As many as there are codes, whether they are needed or not: looking would stall an accelerator.
        """
        N, device = len(z_ND), z_ND.device
        place_K = distributed.broadcast(
            choose(distributed.world_size() * N, self.codebook_size, rng=rng, device=device)
        )
        mine_K1 = (place_K // N == distributed.rank())[:, None]
        return distributed.all_reduce_sum(torch.where(mine_K1, z_ND.index_select(0, place_K % N), 0))


def perplexity(k: Tensor, codebook_size: int, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Say how many codes a batch uses: the exponential of their entropy, and the share of the codes that occur at all.

    Args:
        k: indices of codes, (B, ...) int64.
        codebook_size: K.
        shared: whether ``k`` is one rank's share of the batch.
    """
    counts = torch.zeros(codebook_size, device=k.device).index_add_(
        0, k.flatten(), torch.ones(k.numel(), device=k.device)
    )
    p = (distributed.all_reduce_mean(counts) if shared else counts) / k.numel()
    return torch.exp(-torch.xlogy(p, p).sum()), (p > 0).float().mean()
