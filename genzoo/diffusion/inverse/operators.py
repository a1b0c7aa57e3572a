r"""Linear operators of inverse problems, and observations ``value = A x + sigma n`` with ``n ~ N(0, I)``.

Values are on the scale of the data, [-1, 1] for images, and so is sigma. An operator acts on one event: batches of events,
(..., *event_shape), are mapped to batches of values, (..., *shape). Each has its adjoint, ``<A x, u> = <x, A' u>``, and solves
``(a A A' + b I) w = u``, in which its singular values are known:

    operator        A A'                                A
    Identity        I                                   x                               (denoising)
    Inpainting      I                                   the known coordinates of x
    Downsampling    I/f^2                               means over blocks of f x f pixels
    Grey            (w_1^2 + w_2^2 + w_3^2) I           sum_c w_c x_c                    (colourisation)
    Blur            (B_H B_H') x (B_W B_W')             B_H x B_W'                       (separable)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in conversions of pictures to grey


class LinearOperator(ABC):
    """A linear map of one event.

    Args:
        event_shape: shape of an event.
        shape: shape of a value.
    """

    def __init__(self, event_shape: Sequence[int], shape: Sequence[int]):
        self.event_shape, self.shape = tuple(event_shape), tuple(shape)

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return A x, (..., *event_shape) -> (..., *shape)."""

    @abstractmethod
    def adjoint(self, value: Tensor) -> Tensor:
        """Return A' u, (..., *shape) -> (..., *event_shape)."""

    @abstractmethod
    def solve(self, value: Tensor, a: float, b: float) -> Tensor:
        """Return ``(a A A' + b I)^-1 u``, (..., *shape), for a, b >= 0 and a positive sum."""

    def matrix(self) -> Tensor:
        """Return A as a matrix, (M, D) float64."""
        D = math.prod(self.event_shape)
        columns = self(torch.eye(D, dtype=torch.float64).view(D, *self.event_shape))
        return columns.flatten(1).T


class Scaled(LinearOperator):
    """An operator with ``A A' = c I``.

    Args:
        gram: c.
        event_shape, shape: as in ``LinearOperator``.
    """

    def __init__(self, event_shape: Sequence[int], shape: Sequence[int], gram: float):
        super().__init__(event_shape, shape)
        self.gram = gram

    def solve(self, value: Tensor, a: float, b: float) -> Tensor:
        return value / (a * self.gram + b)


class Identity(Scaled):
    """The identity, for denoising."""

    def __init__(self, event_shape: Sequence[int]):
        super().__init__(event_shape, event_shape, 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, value: Tensor) -> Tensor:
        return value


class Inpainting(Scaled):
    """The known coordinates of an event.

    Args:
        unknown: mask of the coordinates to fill, bool (*event_shape) or broadcast to it, such as (1, H, W) over channels.
        event_shape: shape of an event.

    Raises:
        ValueError: for a mask of another shape, without unknown, or without known coordinates.
    """

    def __init__(self, event_shape: Sequence[int], unknown: Tensor):
        if unknown.dtype != torch.bool or unknown.ndim != len(event_shape):
            raise ValueError(
                f"the mask is {unknown.dtype} {tuple(unknown.shape)}, not bool of shape {tuple(event_shape)}"
            )
        try:
            self.unknown = unknown.expand(tuple(event_shape)).clone()
        except RuntimeError as error:
            raise ValueError(f"the mask is {tuple(unknown.shape)}, the event {tuple(event_shape)}") from error
        hidden = int(self.unknown.sum())
        if hidden in (0, self.unknown.numel()):
            raise ValueError(f"the mask marks {'every' if hidden else 'no'} pixel as unknown: it must mark some")
        super().__init__(event_shape, (self.unknown.numel() - hidden,), 1.0)
        self._places = (~self.unknown).flatten().nonzero()[:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(-len(self.event_shape)).index_select(-1, self._places.to(x.device))

    def adjoint(self, value: Tensor) -> Tensor:
        x = value.new_zeros(*value.shape[:-1], math.prod(self.event_shape))
        return x.index_copy(-1, self._places.to(value.device), value).unflatten(-1, self.event_shape)

    def put_back(self, x: Tensor, value: Tensor) -> Tensor:
        """Replace the known coordinates of x by copies of their values."""
        return torch.where(self.unknown.to(x.device), x, self.adjoint(value.to(x.dtype)))


class Downsampling(Scaled):
    """Means over blocks of pixels, for super-resolution.

    Args:
        event_shape: (C, H, W).
        factor: side of a block.

    Raises:
        ValueError: for a factor that does not divide the sides of the image, and for vectors.
    """

    def __init__(self, event_shape: Sequence[int], factor: int):
        C, H, W = image_shape(event_shape, "super-resolution")
        if factor < 2 or H % factor or W % factor:
            raise ValueError(f"factor={factor} must be at least 2 and divide the sides of an image of {W}x{H} pixels")
        super().__init__(event_shape, (C, H // factor, W // factor), 1 / factor**2)
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        f, (C, h, w) = self.factor, self.shape
        return x.reshape(*x.shape[:-3], C, h, f, w, f).mean(dim=(-3, -1))

    def adjoint(self, value: Tensor) -> Tensor:
        f = self.factor
        return (value / f**2).repeat_interleave(f, dim=-1).repeat_interleave(f, dim=-2)


class Grey(Scaled):
    """The luminance of a colour image, for colourisation.

    Args:
        event_shape: (3, H, W).
        weights: of red, green and blue.

    Raises:
        ValueError: for data without three channels.
    """

    def __init__(self, event_shape: Sequence[int], weights: Sequence[float] = LUMA):
        C, H, W = image_shape(event_shape, "colourisation")
        if C != 3 or len(weights) != 3:
            raise ValueError(f"colourisation needs images of 3 channels and 3 weights, not {C} and {len(weights)}")
        super().__init__(event_shape, (1, H, W), sum(w**2 for w in weights))
        self.weights = torch.tensor(weights, dtype=torch.float64).view(3, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return (self.weights.to(x) * x).sum(-3, keepdim=True)

    def adjoint(self, value: Tensor) -> Tensor:
        return self.weights.to(value) * value


class Blur(LinearOperator):
    """Convolution with a Gaussian, separable in rows and columns.

    Args:
        event_shape: (C, H, W).
        std: standard deviation of the Gaussian in pixels, cut off at four of them.
        border: "reflect" continues the image by its mirror image, the edge pixel included; "circular" by itself.

    Raises:
        ValueError: for a standard deviation that is not positive, and for vectors.
    """

    def __init__(self, event_shape: Sequence[int], std: float, border: Literal["reflect", "circular"] = "reflect"):
        _, H, W = image_shape(event_shape, "deblurring")
        if not 0 < std < math.inf or border not in ("reflect", "circular"):
            raise ValueError(f"std must be positive and border reflect or circular, not {std} and {border!r}")
        super().__init__(event_shape, event_shape)
        self.rows, self.columns = blur_matrix(H, std, border), blur_matrix(W, std, border)
        (rows, self._u), (columns, self._v) = (torch.linalg.eigh(B @ B.T) for B in (self.rows, self.columns))
        self._eigenvalues = rows.clamp(min=0)[:, None] * columns.clamp(min=0)

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows.to(x) @ x @ self.columns.to(x).T

    def adjoint(self, value: Tensor) -> Tensor:
        return self.rows.to(value).T @ value @ self.columns.to(value)

    def solve(self, value: Tensor, a: float, b: float) -> Tensor:
        # In float64, since the smallest eigenvalues of a blur are below float32's resolution. Where a sum underflows there
        # is no signal, and the minimum-norm solution is 0.
        u, v, scale = (m.to(value.device) for m in (self._u, self._v, a * self._eigenvalues + b))
        along = u.T @ value.double() @ v
        kept = scale > 1e-12 * scale.max()
        return (u @ torch.where(kept, along / scale, 0.0) @ v.T).to(value.dtype)


def blur_matrix(n: int, std: float, border: str) -> Tensor:
    """Matrix of a one-dimensional Gaussian blur with unit row sums, (n, n) float64."""
    radius = max(1, math.ceil(4 * std))
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / std) ** 2)
    places = torch.arange(n)[:, None] + offsets
    if border == "circular":
        places = places % n
    else:
        places = places % (2 * n)
        places = torch.where(places < n, places, 2 * n - 1 - places)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (kernel / kernel.sum()).expand(n, -1).contiguous())


def image_shape(event_shape: Sequence[int], task: str) -> tuple[int, int, int]:
    """Return channels, height and width.

    Raises:
        ValueError: for vectors.
    """
    if len(event_shape) != 3:
        raise ValueError(f"{task} needs images, not vectors of {math.prod(event_shape)} numbers")
    C, H, W = event_shape
    return C, H, W


class Observation:
    """A batch of values ``A x + sigma n``, one for each sample to draw.

    Args:
        operator: A.
        value: (B, *operator.shape).
        sigma: standard deviation of the noise, on the scale of the data; 0 for exact values.

    Raises:
        ValueError: for values of another shape, and a negative or infinite sigma.
    """

    def __init__(self, operator: LinearOperator, value: Tensor, sigma: float = 0.0):
        if tuple(value.shape[1:]) != operator.shape:
            raise ValueError(f"the observation has shape {tuple(value.shape[1:])}, not {operator.shape}")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma must be at least 0 and finite, not {sigma}")
        self.operator, self.value, self.sigma = operator, value, sigma

    def __len__(self) -> int:
        return len(self.value)

    def residual(self, x: Tensor) -> Tensor:
        """Return ``value - A x``, (B, *operator.shape)."""
        return self.value.to(x) - self.operator(x)

    def finish(self, x: Tensor) -> Tensor:
        """Put exactly known coordinates back into samples, (B, *event_shape), to the same bits."""
        exact = isinstance(self.operator, Inpainting) and self.sigma == 0
        return self.operator.put_back(x, self.value) if exact else x  # type: ignore[attr-defined]
