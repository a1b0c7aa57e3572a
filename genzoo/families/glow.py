r"""Glow: a normalising flow of activation norms, invertible 1x1 convolutions and affine couplings.

An invertible map ``f`` from data to noise, ``z = f(x)``, has the exact density, by the change of variables,

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

A step of the flow has three layers, on a feature map of h x w pixels:

    activation norm       x <- (x + b) exp(s)                                    log |det| = h w sum s
    1x1 convolution       x <- W x,  W = P L (U + diag(sign exp d))              log |det| = h w sum d
    affine coupling       x = (a, b):  b <- (b + m(a)) sigmoid(r(a) + 2)         log |det| = sum log sigmoid(r(a) + 2)

P is a fixed permutation, L unit lower triangular and U strictly upper triangular. W is initialised as a random rotation; its
determinant and inverse are cheap. It generalises the fixed permutations between the couplings of RealNVP.

A scale squeezes 2x2 blocks into channels and applies a number of steps. Then half of the channels are factored out, with
the conditional prior N(mu, sigma^2) given the other half, mu and sigma from a zero-initialised convolution. The latent is
``(x - mu)/sigma``, so that z is standard normal; the prior of the last scale has a learned mu and sigma per channel and class.

Images on [-1, 1] first go through the logit of RealNVP, whose inverse bounds the samples; the paper has none. Vectors are
images of one pixel, with one scale.

References:
    Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018, https://arxiv.org/abs/1807.03039
    (table 1 for the three layers, section 3.2 for the decomposition of W), and the authors' code,
    https://github.com/openai/glow, for the sigmoid and the conditional priors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Condition
from genzoo.distributions.transforms import Logit
from genzoo.event import EventSpec
from genzoo.families.flow import Flow
from genzoo.model import Continuous
from genzoo.nn import defaults
from genzoo.nn.coupling import ActNorm, EdgeConv
from genzoo.nn.embeddings import embed


class InvertibleConv(nn.Module):
    """An invertible 1x1 convolution, parameterised by its PLU decomposition.

    Args:
        channels: C.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
        P, L, U = torch.linalg.lu(rotation)
        self.register_buffer("permutation", P.argmax(1))  # row i of W is row permutation[i] of L U
        self.register_buffer("sign", U.diag().sign().float())
        # L below the diagonal, U above it, and d on it.
        self.factors = nn.Parameter((L.tril(-1) + U.triu(1) + U.diag().abs().log().diag()).float())

    def _triangles(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(len(self.factors), dtype=self.factors.dtype, device=self.factors.device)
        diagonal = self.sign * self.factors.diag().exp()
        return self.factors.tril(-1) + eye, self.factors.triu(1) + diagonal.diag()

    def matrix(self) -> Tensor:
        """Return W, (C, C)."""
        L, U = self._triangles()
        return (L @ U)[self.permutation]

    def inverse_matrix(self) -> Tensor:
        """Return the inverse of W, (C, C), by two triangular solves in float64."""
        L, U = (factor.double() for factor in self._triangles())
        eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
        right = torch.linalg.solve_triangular(L, eye[self.permutation.argsort()], upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(U, right, upper=True).to(self.factors.dtype)

    @property
    def log_det(self) -> Tensor:
        """Log |det W|, ()."""
        return self.factors.diag().sum()


class FlowStep(nn.Module):
    """One step of the flow.

    Args:
        network: factory of the coupling's network, called as ``network(in_shape, out_shape, condition)``; zero-initialised.
        shape: input shape, (C, H, W).
        affine: whether the coupling is affine or additive.
        condition: of the network.
    """

    def __init__(
        self, network: Callable[..., nn.Module], shape: Sequence[int], affine: bool, condition: Condition | None
    ):
        super().__init__()
        C, *self.sides = shape
        self.kept, self.affine = C // 2, affine
        self.norm, self.mix = ActNorm(C), InvertibleConv(C)
        moved = (C - self.kept) * (2 if affine else 1)
        self.net = network((self.kept, *self.sides), (moved, *self.sides), condition)

    def _coupling(self, a: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        h = self.net(a, y).to(a.dtype)
        if not self.affine:
            return h, None
        shift, raw = h.chunk(2, dim=1)
        return shift, F.logsigmoid(raw + 2)

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        # Invertible layers are computed without autocast: rounding W to bfloat16 changes its determinant.
        with torch.autocast(x.device.type, enabled=False):
            if self.norm.initializing:
                self.norm.init_statistics(x)
            # Fuse norm and convolution into one affine map of the channels.
            matrix = self.mix.matrix() * self.norm.log_scale.exp().view(-1)
            x = torch.einsum("ij,bjhw->bihw", matrix, x) + torch.einsum("ij,jhw->ihw", matrix, self.norm.bias)
            log_det = math.prod(self.sides) * (self.norm.log_scale.sum() + self.mix.log_det)
        a, b = x[:, : self.kept], x[:, self.kept :]
        shift, log_scale = self._coupling(a, y)
        b = b + shift
        if log_scale is not None:
            b, log_det = b * log_scale.exp(), log_det + log_scale.flatten(1).sum(1)
        return torch.cat([a, b], dim=1), log_det.expand(len(x))

    def inverse(self, z: Tensor, y: Tensor | None) -> Tensor:
        a, b = z[:, : self.kept], z[:, self.kept :]
        shift, log_scale = self._coupling(a, y)
        if log_scale is not None:
            b = b * torch.exp(-log_scale)
        with torch.autocast(z.device.type, enabled=False):
            x = torch.cat([a, b - shift], dim=1)
            return self.norm.inverse(torch.einsum("ij,bjhw->bihw", self.mix.inverse_matrix(), x))


class Split(nn.Module):
    """Factor out half of the channels, with a Gaussian prior conditioned on the other half."""

    def __init__(self, channels: int):
        super().__init__()
        self.moments = EdgeConv(channels - channels // 2, 2 * (channels // 2), scaled=True)

    def _moments(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.moments(kept).to(kept.dtype).chunk(2, dim=1)
        return mean, log_std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, left = x.chunk(2, dim=1)
        mean, log_std = self._moments(kept)
        return kept, (left - mean) * torch.exp(-log_std), -log_std.flatten(1).sum(1)

    def inverse(self, kept: Tensor, z: Tensor) -> Tensor:
        mean, log_std = self._moments(kept)
        return torch.cat([kept, mean + z * log_std.exp()], dim=1)


class Glow(Flow):
    """A flow of activation norms, invertible 1x1 convolutions and affine couplings.

    Args:
        network: factory of a coupling's network, called as ``network(in_shape, out_shape, condition)``, for ``(x, y)``.
        event, condition: as in ``GenerativeModel``.
        scales: number of scales of an image; each halves the sides. Vectors have one.
        steps: flow steps per scale.
        affine: whether couplings are affine or additive.
        logit: whether to apply a logit to images; without it, as in the paper, samples may leave [-1, 1].

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
        steps: int = 8,
        affine: bool = True,
        logit: bool = True,
    ):
        super().__init__(event, condition)
        if scales < 1 or steps < 1:
            raise ValueError(f"scales and steps must be at least 1, not {scales} and {steps}")
        self.latent = Continuous((self.dim,))
        self.logit = Logit() if logit and event.levels is not None else None
        is_image = len(self.shape) == 3
        self.pixels = C, H, W = self.shape if is_image else (self.dim, 1, 1)
        if is_image and (H % 2**scales or W % 2**scales):
            raise ValueError(f"scales={scales} needs sides divisible by {2**scales}, not {H}x{W}")
        if not is_image and self.dim < 2:
            raise ValueError("a coupling needs at least two dimensions")
        self.block = 2 if is_image else 1  # side of the pixel blocks squeezed into channels
        flows: list[nn.ModuleList] = []
        splits: list[Split] = []
        for i in range(scales if is_image else 1):
            if i:
                splits.append(Split(C))
                C //= 2
            C, H, W = C * self.block**2, H // self.block, W // self.block
            flows.append(nn.ModuleList(FlowStep(network, (C, H, W), affine, condition) for _ in range(steps)))
        self.flows: Sequence[Sequence[FlowStep]] = nn.ModuleList(flows)  # type: ignore[assignment]
        self.splits: Sequence[Split] = nn.ModuleList(splits)  # type: ignore[assignment]
        self.top = C, H, W
        # Mean and log std of the prior of the last scale; a single class for an unconditional flow.
        top = embed(condition or ClassLabels(1), 2 * C, constant=0.0)
        assert top is not None
        self.top_prior = top

    def _top_moments(self, n: int, y: Tensor | None) -> tuple[Tensor, Tensor]:
        y = torch.zeros(n, dtype=torch.long, device=self.device) if y is None else y
        mean, log_std = self.top_prior(y)[:, :, None, None].chunk(2, dim=1)
        return mean, log_std

    def _forward_and_log_det(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        if self.logit is not None:
            x, log_det = self.logit(x)
        x = x.reshape(len(x), *self.pixels)
        latents = []
        for i, steps in enumerate(self.flows):
            if i:
                x, z, ladj = self.splits[i - 1](x)
                log_det = log_det + ladj
                latents.append(z.flatten(1))
            x = F.pixel_unshuffle(x, self.block)
            for step in steps:
                x, ladj = step(x, y)
                log_det = log_det + ladj
        mean, log_std = self._top_moments(len(x), y)
        latents.append(((x - mean) * torch.exp(-log_std)).flatten(1))
        return torch.cat(latents, dim=1), log_det - math.prod(self.top[1:]) * log_std.flatten(1).sum(1)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        mean, log_std = self._top_moments(len(z), y)
        z, last = z.split([z.shape[1] - math.prod(self.top), math.prod(self.top)], dim=1)
        x = mean + last.reshape(len(z), *self.top) * log_std.exp()
        for i, steps in reversed(list(enumerate(self.flows))):
            for step in reversed(steps):
                x = step.inverse(x, y)
            x = F.pixel_shuffle(x, self.block)
            if i:  # half of the channels were factored out
                size = x[:1].numel()
                z, left = z.split([z.shape[1] - size, size], dim=1)
                x = self.splits[i - 1].inverse(x, left.reshape(x.shape))
        x = x.reshape(len(x), *self.shape)
        return x if self.logit is None else self.logit.inverse(x)
