r"""Flows of couplings: the layers and the multi-scale architecture that RealNVP and the neural spline flow share.

A coupling splits its input into ``a`` and ``b`` and transforms ``b`` element by element given ``a``:

    b <- f(b; theta(a)),        log |det| = sum log f'(b; theta(a))

Images on [-1, 1] are first mapped to [.05, .95] and through a logit. Then, at each scale: 2x2 blocks are squeezed into
channels; couplings with alternating checkerboard masks; couplings with alternating channel masks; half of the channels are
factored out as latents, and the next scale transforms the rest. After the squeeze, the colours of a checkerboard are channels
{0, 3} and {1, 2}, so that every coupling is a channel split on a quarter of the pixels.

Vectors have couplings with alternating halves of the coordinates.

References:
    Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, https://arxiv.org/abs/1605.08803 (eq. 4-8,
    section 3.6 for the multi-scale architecture, section 4.1 for the logit).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.transforms import BatchNorm, Logit
from genzoo.event import EventSpec
from genzoo.families.flow import Flow
from genzoo.model import Continuous
from genzoo.nn.coupling import FullResolution


class Coupling(nn.Module, ABC):
    """A coupling over dimension 1: the elements ``moved`` are transformed with parameters from a network of the others.

    Args:
        network: factory of the network, called as ``network(in_shape, out_shape, condition)``; zero-initialised for a coupling
            initialised as the identity.
        shape: input shape, (C, ...).
        moved: indices of the transformed elements.
        condition: of the network.
        batch_norm: whether to batch-normalise the transformed elements.
        num_params: parameters of a transformed element; the first of all elements comes first.
    """

    order: Tensor | None

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        moved: Sequence[int],
        condition: Condition | None,
        batch_norm: bool = False,
        *,
        num_params: int,
    ):
        super().__init__()
        kept = [i for i in range(shape[0]) if i not in set(moved)]
        self.sizes = len(kept), len(moved)
        # Contiguous parts are split and concatenated, which is faster than a gather.
        every = list(range(shape[0]))
        self.moved_first = [*moved, *kept] == every
        in_order = self.moved_first or [*kept, *moved] == every
        self.register_buffer("order", None if in_order else torch.tensor([*kept, *moved]), persistent=False)
        self.net = network((len(kept), *shape[1:]), (num_params * len(moved), *shape[1:]), condition)
        self.norm = BatchNorm(len(moved)) if batch_norm else None

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split into unchanged and transformed elements."""
        if self.moved_first:
            b, a = x.split(self.sizes[::-1], dim=1)
        else:
            a, b = (x if self.order is None else x.index_select(1, self.order)).split(self.sizes, dim=1)
        return a, b

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        if self.moved_first:
            return torch.cat([b, a], dim=1)
        x = torch.cat([a, b], dim=1)
        return x if self.order is None else x.index_select(1, self.order.argsort())

    def _params(self, a: Tensor, y: Tensor | None) -> Tensor:
        # Log-determinants are sums over many couplings: not in bfloat16.
        return self.net(a, y).to(a.dtype)

    @abstractmethod
    def transform(self, b: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Transform elements, (B, C, ...), with parameters, (B, num_params * C, ...); return the log-determinant too, (B,)."""

    @abstractmethod
    def inverse_transform(self, b: Tensor, params: Tensor) -> Tensor:
        """Invert ``transform``."""

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = self._cut(x)
        b, log_det = self.transform(b, self._params(a, y))
        if self.norm is not None:
            b, ladj = self.norm(b)
            log_det = log_det + ladj
        return self._join(a, b), log_det

    def inverse(self, z: Tensor, y: Tensor | None) -> Tensor:
        a, b = self._cut(z)
        if self.norm is not None:
            b = self.norm.inverse(b)
        return self._join(a, self.inverse_transform(b, self._params(a, y)))


class Scale(nn.Module):
    """One scale of an image flow: squeeze, checkerboard couplings, channel couplings.

    Args:
        coupling: factory of a coupling, called as ``coupling(network, shape, moved, condition)``.
        network, condition: of the couplings.
        shape: input shape, (C, H, W).
        checkerboards, halves: number of checkerboard and of channel couplings.
        full_resolution: whether checkerboard couplings work on full-resolution images; output channels are then ordered by
            position in the block, diagonal first, and otherwise by input channel.
    """

    order: Tensor | None

    def __init__(
        self,
        coupling: Callable[..., Coupling],
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        checkerboards: int,
        halves: int,
        condition: Condition | None,
        full_resolution: bool = False,
    ):
        super().__init__()
        C, H, W = shape
        self.out_shape = (4 * C, H // 2, W // 2)
        white = [4 * c + i for c in range(C) for i in (0, 3)]
        black = [4 * c + i for c in range(C) for i in (1, 2)]
        half = list(range(2 * C)), list(range(2 * C, 4 * C))

        chain = []
        for moved in [(black, white)[i % 2] for i in range(checkerboards)]:
            net = functools.partial(FullResolution, network, shape, moved) if full_resolution else network
            chain.append(coupling(net, self.out_shape, moved, condition))
        for moved in [half[(i + 1) % 2] for i in range(halves)]:
            chain.append(coupling(network, self.out_shape, moved, condition))
        self.couplings: Sequence[Coupling] = nn.ModuleList(chain)  # type: ignore[assignment]
        diagonal_first = torch.tensor([4 * c + i for i in (0, 3, 1, 2) for c in range(C)])
        self.register_buffer("order", diagonal_first if full_resolution else None, persistent=False)

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x = F.pixel_unshuffle(x, 2)
        log_det = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, ladj = coupling(x, y)
            log_det = log_det + ladj
        return x if self.order is None else x.index_select(1, self.order), log_det

    def inverse(self, z: Tensor, y: Tensor | None) -> Tensor:
        if self.order is not None:
            z = z.index_select(1, self.order.argsort())
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z, y)
        return F.pixel_shuffle(z, 2)


class CouplingFlow(Flow):
    """A flow of couplings, multi-scale for images.

    Args:
        event, condition: as in ``GenerativeModel``.
        coupling: factory of a coupling, called as ``coupling(network, shape, moved, condition)``.
        network: factory of a coupling's network, called as ``network(in_shape, out_shape, condition)``, for ``(x, y)``.
        scales: number of scales of an image; each halves the sides.
        couplings: couplings of each kind per scale; for vectors, the total number.
        full_resolution: whether checkerboard couplings work on full-resolution images; the last scale then has one more
            checkerboard coupling and no channel couplings.
        scaled: whether the latents are finally multiplied by learned scales.

    Raises:
        ValueError: for images whose sides are not divisible by ``2**scales``, and for vectors of one element.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None,
        *,
        coupling: Callable[..., Coupling],
        network: Callable[..., nn.Module],
        scales: int,
        couplings: int,
        full_resolution: bool = False,
        scaled: bool = False,
    ):
        super().__init__(event, condition)
        if scales < 1 or couplings < 1:
            raise ValueError(f"scales and couplings must be at least 1, not {scales} and {couplings}")
        self.latent = Continuous((self.dim,))
        self.logit = Logit() if event.levels is not None else None
        if len(self.shape) == 3:
            C, H, W = self.shape
            if H % 2**scales or W % 2**scales:
                raise ValueError(f"scales={scales} needs sides divisible by {2**scales}, not {H}x{W}")
            blocks: list[Scale | Coupling] = []
            for i in range(scales):
                last = full_resolution and i == scales - 1
                count = (couplings + 1, 0) if last else (couplings, couplings)
                blocks.append(Scale(coupling, network, (C, H, W), *count, condition, full_resolution))
                C, H, W = 2 * C, H // 2, W // 2  # four times the channels, half of them factored out
        else:
            if self.dim < 2:
                raise ValueError("a coupling needs at least two dimensions")
            parts = list(range(self.dim // 2)), list(range(self.dim // 2, self.dim))
            moved = [parts[(i + 1) % 2] for i in range(couplings)]
            blocks = [coupling(network, self.shape, part, condition) for part in moved]
        self.blocks: Sequence[Scale | Coupling] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.log_scale = nn.Parameter(torch.zeros(self.dim)) if scaled else None

    def _forward_and_log_det(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        if self.logit is not None:
            x, log_det = self.logit(x)
        latents = []
        for i, block in enumerate(self.blocks):
            x, ladj = block(x, y)
            log_det = log_det + ladj
            if isinstance(block, Scale) and i < len(self.blocks) - 1:
                x, z = x.chunk(2, dim=1)
                latents.append(z.flatten(1))
        z = torch.cat([*latents, x.flatten(1)], dim=1)
        return (z, log_det) if self.log_scale is None else (z * self.log_scale.exp(), log_det + self.log_scale.sum())

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        z = z if self.log_scale is None else z * torch.exp(-self.log_scale)
        x = z
        for i, block in reversed(list(enumerate(self.blocks))):
            if isinstance(block, Scale):
                # Half of the output of a scale was factored out, all of it at the last scale.
                last = i == len(self.blocks) - 1
                size = math.prod(block.out_shape) // (1 if last else 2)
                z, latent = z.split([z.shape[1] - size, size], dim=1)
                x = latent.reshape(-1, *block.out_shape) if last else torch.cat([x, latent.reshape(x.shape)], dim=1)
            x = block.inverse(x, y)
        return x if self.logit is None else self.logit.inverse(x)
