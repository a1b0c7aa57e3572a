r"""RealNVP: normalising flows of affine couplings; with additive couplings, NICE.

An invertible map ``f`` from data to noise, ``z = f(x)``, has the exact density, by the change of variables,

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

``f`` is a composition of couplings. Each splits its input into ``a`` and ``b`` and transforms ``b`` given ``a``:

    affine      b <- b * exp(s(a)) + m(a),        log |det| = sum s(a)
    additive    b <- b + m(a),                    log |det| = 0

Additive couplings preserve volume; a last layer ``z <- z * exp(s)`` with a learned scale of each latent lets the density adapt.

The multi-scale architecture of images is that of ``genzoo.families.coupling_flow``. ``full_resolution`` follows the paper at
four times the cost: the network of a checkerboard coupling takes the full-resolution, masked image. The transformed elements
may be batch-normalised.

References:
    Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, https://arxiv.org/abs/1605.08803 (eq. 4-8,
    section 3.7 for batch normalisation, section 4.1 for the bound of log scales).
    The authors' code, ``research/real_nvp`` in https://github.com/tensorflow/models.
    Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2015, https://arxiv.org/abs/1410.8516
    (section 3.2 for additive couplings, section 3.3 for the scaling).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.event import EventSpec
from genzoo.families.coupling_flow import Coupling, CouplingFlow
from genzoo.nn import defaults


class AffineCoupling(Coupling):
    """A coupling that scales and shifts, ``b exp(s(a)) + m(a)``; the log scale is ``bound * tanh``, with a learned bound.

    Args:
        network, shape, moved, condition, batch_norm: as in ``Coupling``; a zero-initialised network gives the identity.
    """

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        moved: Sequence[int],
        condition: Condition | None,
        batch_norm: bool = False,
    ):
        super().__init__(network, shape, moved, condition, batch_norm, num_params=2)
        self.bound = nn.Parameter(torch.full((len(moved), *[1] * len(shape[1:])), 1.0))

    def _moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = params.chunk(2, dim=1)
        return self.bound * torch.tanh(log_scale), shift

    def transform(self, b: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._moments(params)
        return b * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def inverse_transform(self, b: Tensor, params: Tensor) -> Tensor:
        log_scale, shift = self._moments(params)
        return (b - shift) * torch.exp(-log_scale)


class AdditiveCoupling(Coupling):
    """A coupling that shifts, ``b + m(a)``, and preserves volume.

    Args:
        network, shape, moved, condition, batch_norm: as in ``Coupling``.
    """

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        moved: Sequence[int],
        condition: Condition | None,
        batch_norm: bool = False,
    ):
        super().__init__(network, shape, moved, condition, batch_norm, num_params=1)

    def transform(self, b: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return b + params, b.new_zeros(len(b))

    def inverse_transform(self, b: Tensor, params: Tensor) -> Tensor:
        return b - params


COUPLINGS: dict[str, type[AffineCoupling | AdditiveCoupling]] = {"affine": AffineCoupling, "additive": AdditiveCoupling}


class RealNVP(CouplingFlow):
    """A flow of affine or additive couplings.

    Args:
        network: factory of a coupling's network, called as ``network(in_shape, out_shape, condition)``, for ``(x, y)``.
        event, condition: as in ``GenerativeModel``.
        scales: number of scales of an image; each halves the sides.
        couplings: couplings of each kind per scale; for vectors, the total number.
        coupling: "affine", or "additive" with a final scaling of the latents (NICE).
        full_resolution: whether checkerboard couplings work on full-resolution images, as in the paper; the last scale then has
            one more checkerboard coupling and no channel couplings.
        batch_norm: whether couplings have batch normalisation.
        scale_penalty: weight of an L2 penalty on the bounds of log scales and on the magnitudes of normalised weights.

    Raises:
        ValueError: for images whose sides are not divisible by ``2**scales``, for vectors of one element, and for a penalty on
            the log scales of additive couplings.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.coupling,
        scales: int = 2,
        couplings: int = 3,
        coupling: Literal["affine", "additive"] = "affine",
        full_resolution: bool = False,
        batch_norm: bool = False,
        scale_penalty: float = 0.0,
    ):
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling must be affine or additive, not {coupling!r}")
        if scale_penalty < 0:
            raise ValueError(f"scale_penalty must not be negative, not {scale_penalty}")
        if scale_penalty and coupling == "additive":
            raise ValueError(f"additive couplings have no log scales: scale_penalty must be 0, not {scale_penalty}")
        super().__init__(
            event,
            condition,
            coupling=functools.partial(COUPLINGS[coupling], batch_norm=batch_norm),
            network=network,
            scales=scales,
            couplings=couplings,
            full_resolution=full_resolution,
            scaled=coupling == "additive",
        )
        self.scale_penalty = scale_penalty

    def _penalized(self, nll: Tensor) -> Tensor:
        if not self.scale_penalty:
            return nll
        scales = [p for name, p in self.named_parameters() if name.endswith(("bound", "magnitude"))]
        return nll + self.scale_penalty * torch.stack([p.square().sum() for p in scales]).sum()
