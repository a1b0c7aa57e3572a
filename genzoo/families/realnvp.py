r"""RealNVP: normalising flows of affine couplings.

An invertible map ``f`` from data to noise, ``z = f(x)``, has the exact density, by the change of variables,

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

``f`` is a composition of affine couplings. Each splits its input into ``a`` and ``b`` and transforms ``b`` given ``a``:

    b <- b * exp(s(a)) + m(a),        log |det| = sum s(a)

Images on [-1, 1] are first mapped to [.05, .95] and through a logit. Then, at each scale: 2x2 blocks are squeezed into
channels; couplings with alternating checkerboard masks; couplings with alternating channel masks; half of the channels are
factored out as latents, and the next scale transforms the rest. After the squeeze, the colours of a checkerboard are channels
{0, 3} and {1, 2}, so that every coupling is a channel split on a quarter of the pixels. ``full_resolution`` follows the paper
at four times the cost: the network of a checkerboard coupling takes the full-resolution, masked image.

Vectors have couplings with alternating halves of the coordinates. The transformed elements may be batch-normalised.

References:
    Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, https://arxiv.org/abs/1605.08803 (eq. 4-8,
    section 3.6 for the multi-scale architecture, section 3.7 for batch normalisation, section 4.1 for the logit).
    The authors' code, ``research/real_nvp`` in https://github.com/tensorflow/models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.transforms import BatchNorm, Logit
from genzoo.event import EventSpec
from genzoo.families.flow import Flow
from genzoo.model import Continuous
from genzoo.nn import defaults
from genzoo.nn.coupling import FullResolution


class Coupling(nn.Module):
    """An affine coupling over dimension 1: the elements ``moved`` are scaled and shifted by a network of the others.

    Args:
        network: factory of the network, called as ``network(in_shape, out_shape, condition)``; zero-initialised for a coupling
            initialised as the identity.
        shape: input shape, (C, ...).
        moved: indices of the transformed elements.
        condition: of the network.
        batch_norm: whether to batch-normalise the transformed elements.
    """

    order: Tensor | None

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        moved: Sequence[int],
        condition: Condition | None,
        batch_norm: bool = False,
    ):
        super().__init__()
        kept = [i for i in range(shape[0]) if i not in set(moved)]
        self.sizes = len(kept), len(moved)
        # Contiguous parts are split and concatenated, which is faster than a gather.
        every = list(range(shape[0]))
        self.moved_first = [*moved, *kept] == every
        in_order = self.moved_first or [*kept, *moved] == every
        self.register_buffer("order", None if in_order else torch.tensor([*kept, *moved]), persistent=False)
        self.net = network((len(kept), *shape[1:]), (2 * len(moved), *shape[1:]), condition)
        # Learned bound of the log scale, a factor of its tanh (section 4.1).
        self.bound = nn.Parameter(torch.full((len(moved), *[1] * len(shape[1:])), 1.0))
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

    def _affine(self, a: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        # Log-determinants are sums over many couplings: not in bfloat16.
        log_scale, shift = self.net(a, y).to(a.dtype).chunk(2, dim=1)
        return self.bound * torch.tanh(log_scale), shift

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = self._cut(x)
        log_scale, shift = self._affine(a, y)
        b, log_det = b * log_scale.exp() + shift, log_scale.flatten(1).sum(1)
        if self.norm is not None:
            b, ladj = self.norm(b)
            log_det = log_det + ladj
        return self._join(a, b), log_det

    def inverse(self, z: Tensor, y: Tensor | None) -> Tensor:
        a, b = self._cut(z)
        log_scale, shift = self._affine(a, y)
        if self.norm is not None:
            b = self.norm.inverse(b)
        b = (b - shift) * torch.exp(-log_scale)
        return self._join(a, b)


class Scale(nn.Module):
    """One scale of an image flow: squeeze, checkerboard couplings, channel couplings.

    Args:
        network, condition, batch_norm: of the couplings.
        shape: input shape, (C, H, W).
        checkerboards, halves: number of checkerboard and of channel couplings.
        full_resolution: whether checkerboard couplings work on full-resolution images; output channels are then ordered by
            position in the block, diagonal first, and otherwise by input channel.
    """

    order: Tensor | None

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        checkerboards: int,
        halves: int,
        condition: Condition | None,
        full_resolution: bool = False,
        batch_norm: bool = False,
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
            chain.append(Coupling(net, self.out_shape, moved, condition, batch_norm))
        for moved in [half[(i + 1) % 2] for i in range(halves)]:
            chain.append(Coupling(network, self.out_shape, moved, condition, batch_norm))
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


class RealNVP(Flow):
    """A flow of affine couplings.

    Args:
        network: factory of a coupling's network, called as ``network(in_shape, out_shape, condition)``, for ``(x, y)``.
        event, condition: as in ``GenerativeModel``.
        scales: number of scales of an image; each halves the sides.
        couplings: couplings of each kind per scale; for vectors, the total number.
        full_resolution: whether checkerboard couplings work on full-resolution images, as in the paper; the last scale then has
            one more checkerboard coupling and no channel couplings.
        batch_norm: whether couplings have batch normalisation.
        scale_penalty: weight of an L2 penalty on the bounds of log scales and on the magnitudes of normalised weights.

    Raises:
        ValueError: for images whose sides are not divisible by ``2**scales``, and for vectors of one element.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.coupling,
        scales: int = 2,
        couplings: int = 3,
        full_resolution: bool = False,
        batch_norm: bool = False,
        scale_penalty: float = 0.0,
    ):
        super().__init__(event, condition)
        if scales < 1 or couplings < 1:
            raise ValueError(f"scales and couplings must be at least 1, not {scales} and {couplings}")
        if scale_penalty < 0:
            raise ValueError(f"scale_penalty must not be negative, not {scale_penalty}")
        self.latent = Continuous((self.dim,))
        self.scale_penalty = scale_penalty
        self.logit = Logit() if event.levels is not None else None
        if len(self.shape) == 3:
            C, H, W = self.shape
            if H % 2**scales or W % 2**scales:
                raise ValueError(f"scales={scales} needs sides divisible by {2**scales}, not {H}x{W}")
            blocks: list[Scale | Coupling] = []
            for i in range(scales):
                last = full_resolution and i == scales - 1
                count = (couplings + 1, 0) if last else (couplings, couplings)
                blocks.append(Scale(network, (C, H, W), *count, condition, full_resolution, batch_norm))
                C, H, W = 2 * C, H // 2, W // 2  # four times the channels, half of them factored out
        else:
            if self.dim < 2:
                raise ValueError("a coupling needs at least two dimensions")
            parts = list(range(self.dim // 2)), list(range(self.dim // 2, self.dim))
            moved = [parts[(i + 1) % 2] for i in range(couplings)]
            blocks = [Coupling(network, self.shape, part, condition, batch_norm) for part in moved]
        self.blocks: Sequence[Scale | Coupling] = nn.ModuleList(blocks)  # type: ignore[assignment]

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
        return torch.cat([*latents, x.flatten(1)], dim=1), log_det

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
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

    def _penalized(self, nll: Tensor) -> Tensor:
        if not self.scale_penalty:
            return nll
        scales = [p for name, p in self.named_parameters() if name.endswith(("bound", "magnitude"))]
        return nll + self.scale_penalty * torch.stack([p.square().sum() for p in scales]).sum()
