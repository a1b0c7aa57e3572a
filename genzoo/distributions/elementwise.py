r"""Increasing functions of one variable whose parameters are computed by a network: affine functions and splines.

The elements of a layer of a normalising flow are transformed one by one, ``z_i = f(x_i; theta_i)``, so that its Jacobian is
triangular and its log-determinant the sum of ``log f'(x_i; theta_i)``.

The monotonic rational-quadratic spline has K bins between knots (x_k, y_k) from (-B, -B) to (B, B), with slopes d_k at the
knots. In a bin of width w, height h and mean slope s = h/w, for t = (x - x_k)/w,

    z  = y_k + h (s t^2 + d_k t (1 - t)) / q,                      q = s + (d_{k+1} + d_k - 2 s) t (1 - t)
    f' = s^2 (d_{k+1} t^2 + 2 s t (1 - t) + d_k (1 - t)^2) / q^2

and its inverse is a root of a quadratic equation in t. Outside of [-B, B] it is the identity. The slopes at -B and B are 1:
the derivative is continuous.

References:
    Gregory, Delbourgo, "Piecewise Rational Quadratic Interpolation to Monotonic Data", 1982,
    https://doi.org/10.1093/imanum/2.2.123.
    Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019, https://arxiv.org/abs/1906.04032 (section 3.1, eq. 4
    for the spline and eq. 5 for its derivative; appendix A.1 for the inverse).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Elementwise(ABC):
    """An increasing function of each element, given its parameters; the identity where all of them are zero.

    Elements are (B, C, ...) and parameters (B, num_params * C, ...): the first parameter of all channels comes first.

    Attributes:
        num_params: number of parameters of an element.
    """

    num_params: int

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log derivative of each element, both (B, C, ...)."""

    @abstractmethod
    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """Return x, (B, C, ...)."""


class Affine(Elementwise):
    """The affine function ``z = (x - m) exp(-a)`` of parameters a and m.

    The log scale is bounded smoothly, to ``a/(1 + |a|/log 1000)``: scales are between 1/1000 and 1000.
    """

    num_params = 2

    def _moments(self, params: Tensor) -> tuple[Tensor, Tensor]:
        raw, mean = params.chunk(2, dim=1)
        return mean, raw / (1 + raw.abs() / math.log(1000))

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self._moments(params)
        return (x - mean) * torch.exp(-log_scale), -log_scale

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        mean, log_scale = self._moments(params)
        return z * log_scale.exp() + mean


class Bin(NamedTuple):
    """The bin of each element: its lower left knot, size, mean slope, and the slopes at both ends."""

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    slope: Tensor
    d0: Tensor
    d1: Tensor


class RationalQuadraticSpline(Elementwise):
    """The monotonic rational-quadratic spline with linear tails.

    The parameters are K logits of widths, K logits of heights, and K - 1 numbers whose softplus, shifted to be 1 at zero, is
    the slope at an inner knot.

    Args:
        bins: K.
        bound: B.

    Raises:
        ValueError: for less than one bin, more than a width of at least 1/1000 of the interval allows, or no positive bound.
    """

    MIN_SIZE = MIN_SLOPE = 1e-3  # of a bin, as a fraction of the interval; of a knot

    def __init__(self, bins: int = 8, bound: float = 5.0):
        if not 1 <= bins < 1 / self.MIN_SIZE:
            raise ValueError(f"bins must be from 1 to {round(1 / self.MIN_SIZE) - 1}, not {bins}")
        if not 0 < bound < math.inf:
            raise ValueError(f"bound must be positive and finite, not {bound}")
        self.bins, self.bound = bins, bound
        self.num_params = 3 * bins - 1

    def _knots(self, logits: Tensor) -> Tensor:
        """Return positions of knots from -B to B, (..., K) -> (..., K + 1)."""
        sizes = self.MIN_SIZE + (1 - self.MIN_SIZE * self.bins) * logits.softmax(-1)
        inner = self.bound * (2 * sizes.cumsum(-1)[..., :-1] - 1)
        return F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    def _find(self, point: Tensor, params: Tensor, axis: int) -> Bin:
        """Return the bin of each point on the axis of x (0) or z (1)."""
        params = params.unflatten(1, (self.num_params, -1)).movedim(1, -1)
        widths, heights, raw = params.split([self.bins, self.bins, self.bins - 1], dim=-1)
        x, y = self._knots(widths), self._knots(heights)
        one = math.log(math.expm1(1 - self.MIN_SLOPE))
        d = F.pad(self.MIN_SLOPE + F.softplus(raw + one), (1, 1), value=1.0)
        k = (point[..., None] >= (x, y)[axis][..., 1:-1]).sum(-1, keepdim=True)

        def at(values: Tensor) -> Tensor:
            return values.gather(-1, k)[..., 0]

        width, height = at(x.diff(dim=-1)), at(y.diff(dim=-1))
        return Bin(at(x), at(y), width, height, height / width, at(d), at(d[..., 1:]))

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() < self.bound
        point = torch.where(inside, x, 0.0)  # the quotient is computed where it exists
        b = self._find(point, params, axis=0)
        t = (point - b.x) / b.width
        u = t * (1 - t)
        q = b.slope + (b.d1 + b.d0 - 2 * b.slope) * u
        z = b.y + b.height * (b.slope * t.square() + b.d0 * u) / q
        numerator = b.d1 * t.square() + 2 * b.slope * u + b.d0 * (1 - t).square()
        log_slope = 2 * b.slope.log() + numerator.log() - 2 * q.log()
        return torch.where(inside, z, x), torch.where(inside, log_slope, 0.0)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        inside = z.abs() < self.bound
        point = torch.where(inside, z, 0.0)
        b = self._find(point, params, axis=1)
        rise, curvature = point - b.y, b.d1 + b.d0 - 2 * b.slope
        # a t^2 + b1 t + c = 0, by the form of its root that does not cancel.
        a = b.height * (b.slope - b.d0) + rise * curvature
        b1 = b.height * b.d0 - rise * curvature
        c = -b.slope * rise
        root = torch.sqrt((b1.square() - 4 * a * c).clamp(min=0.0))
        t = 2 * c / (-b1 - root)
        return torch.where(inside, b.x + t * b.width, z)
