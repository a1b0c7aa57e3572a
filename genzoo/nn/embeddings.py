"""Embeddings of conditions as features of a network, (B, *condition.shape) -> (B, features).

Another condition registers its embedding by ``@embedding.register``.
"""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Codes, Condition, Image, Joint, Tokens, Vector, null_rows
from genzoo.nn.text import TextEncoder


def embed(
    condition: Condition | None, features: int, *, null: bool = False, constant: float | None = None
) -> Embedding | None:
    """Build the embedding of a condition, (B, *condition.shape) -> (B, features), or None without a condition.

    Args:
        condition: the conditioning variable.
        features: dimension of the embedding.
        null: whether the null value is embedded too, as classifier-free guidance requires.
        constant: initial output for every condition; None for random initialisation.
    """
    return None if condition is None else embedding(condition, features, null, constant)


@functools.singledispatch
def embedding(condition: Condition, features: int, null: bool, constant: float | None) -> Embedding:
    """Build the embedding of a condition by its type; arguments as in ``embed``."""
    raise TypeError(
        f"{type(condition).__name__} has no embedding; register one by genzoo.nn.embeddings.embedding.register"
    )


class Embedding(nn.Module, ABC):
    """An embedding of conditions, (B, *condition.shape) -> (B, features)."""


class ClassEmbedding(nn.Embedding, Embedding):
    """A learned vector for each class, and for the null value if ``null``."""

    def __init__(self, n: int, features: int, null: bool, constant: float | None):
        super().__init__(n + null, features)
        if constant is not None:
            nn.init.constant_(self.weight, constant)


def _perceptron(inputs: int, features: int, constant: float | None) -> nn.Sequential:
    last = nn.Linear(features, features)
    if constant is not None:
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, constant)
    return nn.Sequential(nn.Linear(inputs, features), nn.SiLU(), last)


def _null_features(features: int, null: bool, constant: float | None) -> nn.Parameter | None:
    return nn.Parameter(torch.full((features,), constant or 0.0)) if null else None


class VectorEmbedding(Embedding):
    """An MLP with one hidden layer, and a learned null embedding."""

    def __init__(self, d: int, features: int, null: bool, constant: float | None):
        super().__init__()
        self.layers = _perceptron(d, features, constant)
        self.null = _null_features(features, null, constant)

    def forward(self, y: Tensor) -> Tensor:
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        y = y.to(weight.dtype)
        if self.null is None:
            return self.layers(y)
        return torch.where(null_rows(y), self.null, self.layers(y.nan_to_num()))


class ImageEmbedding(Embedding):
    """Strided convolutions followed by an MLP, and a learned null embedding."""

    def __init__(self, shape: Sequence[int], features: int, null: bool, constant: float | None):
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        while max(height, width) > 4:
            layers += [nn.Conv2d(channels, features, 3, stride=2, padding=1), nn.SiLU()]
            channels, height, width = features, -(-height // 2), -(-width // 2)
        self.convolutions = nn.Sequential(*layers)
        self.layers = _perceptron(channels * height * width, features, constant)
        self.null = _null_features(features, null, constant)

    def forward(self, y: Tensor) -> Tensor:
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        y = y.to(weight.dtype)
        if self.null is None:
            return self.layers(self.convolutions(y).flatten(1))
        h = self.layers(self.convolutions(y.nan_to_num()).flatten(1))
        return torch.where(null_rows(y).flatten(1), self.null, h)


class TokensEmbedding(Embedding):
    """A transformer of the tokens, their mean, and an MLP."""

    def __init__(self, length: int, vocabulary: int, features: int, null: bool, constant: float | None):
        super().__init__()
        self.encoder = TextEncoder(length, vocabulary + null, features)
        self.layers = _perceptron(features, features, constant)

    def forward(self, y: Tensor) -> Tensor:
        return self.layers(self.encoder.pooled(*self.encoder(y)))


class CodesEmbedding(Embedding):
    """The mean of a learned vector for each code, and of one for each position, and an MLP."""

    def __init__(self, condition: Codes, features: int, null: bool, constant: float | None):
        super().__init__()
        self.values = nn.Embedding(condition.levels + null, features)
        self.positions = nn.Parameter(torch.randn(features, *condition.shape))
        self.layers = _perceptron(features, features, constant)

    def forward(self, y: Tensor) -> Tensor:
        return self.layers((self.values(y).movedim(3, 1) * self.positions).mean((2, 3)))


class JointEmbedding(Embedding):
    """The sum of the embeddings of all parts."""

    def __init__(self, condition: Joint, features: int, null: bool, constant: float | None):
        super().__init__()
        self.split = condition.split
        self.parts = nn.ModuleList(
            embedding(
                part, features, null and i >= condition.fixed, None if constant is None else 0.0 if i else constant
            )
            for i, part in enumerate(condition.parts)
        )

    def forward(self, y: Tensor) -> Tensor:
        parts = zip(self.parts, self.split(y), strict=True)
        return torch.stack([embed(value) for embed, value in parts]).sum(0)


@embedding.register
def _(condition: ClassLabels, features: int, null: bool, constant: float | None) -> Embedding:
    return ClassEmbedding(condition.n, features, null, constant)


@embedding.register
def _(condition: Vector, features: int, null: bool, constant: float | None) -> Embedding:
    return VectorEmbedding(condition.d, features, null, constant)


@embedding.register
def _(condition: Image, features: int, null: bool, constant: float | None) -> Embedding:
    return ImageEmbedding(condition.shape, features, null, constant)


@embedding.register
def _(condition: Tokens, features: int, null: bool, constant: float | None) -> Embedding:
    return TokensEmbedding(condition.length, condition.vocabulary, features, null, constant)


@embedding.register
def _(condition: Codes, features: int, null: bool, constant: float | None) -> Embedding:
    return CodesEmbedding(condition, features, null, constant)


@embedding.register
def _(condition: Joint, features: int, null: bool, constant: float | None) -> Embedding:
    return JointEmbedding(condition, features, null, constant)


class ImageChannels(nn.Module):
    """Concatenation of image conditions with the input of a network, as in super-resolution.

    Images are resized bilinearly to the input; the null value is an image of zeros.

    Args:
        condition: of the network.

    Attributes:
        channels: of all images.
        rest: the condition without its images; None if there is no other.

    References:
        Saharia et al., "Image Super-Resolution via Iterative Refinement", 2021, https://arxiv.org/abs/2104.07636 (section 2.4).
    """

    def __init__(self, condition: Condition | None):
        super().__init__()
        self.condition = condition
        parts = condition.parts if isinstance(condition, Joint) else [condition] if condition else []
        self.is_image = [isinstance(part, Image) for part in parts]
        self.channels = sum(part.shape[0] for part in parts if isinstance(part, Image))
        rest = [part for part in parts if not isinstance(part, Image)]
        fixed = (
            sum(not is_image for is_image in self.is_image[: condition.fixed]) if isinstance(condition, Joint) else 0
        )
        self.rest: Condition | None = (Joint(tuple(rest), fixed) if len(rest) > 1 else rest[0]) if rest else None

    def forward(self, x_BCHW: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the input with the images as further channels, and the other conditions."""
        if not self.channels or self.condition is None:
            return x_BCHW, y
        if y is None:
            y = self.condition.missing(len(x_BCHW), x_BCHW.device, x_BCHW.dtype)
        values = self.condition.split(y) if isinstance(self.condition, Joint) else (y,)
        h, rest = [x_BCHW], []
        for value, is_image in zip(values, self.is_image, strict=True):
            if is_image:
                image = value.nan_to_num().to(x_BCHW.dtype)
                same = image.shape[-2:] == x_BCHW.shape[-2:]
                h.append(image if same else F.interpolate(image, x_BCHW.shape[-2:], mode="bilinear"))
            else:
                rest.append(value)
        if isinstance(self.rest, Joint):
            return torch.cat(h, dim=1), self.rest.join(*rest)
        return torch.cat(h, dim=1), rest[0] if rest else None


class CodeFeatures(nn.Module):
    """Features at each position of a grid from coarser or equal grids of codes, as between the levels of a hierarchy.

    A learned vector for each code, at the positions that it covers, and two 3x3 convolutions.

    Args:
        condition: of the network.
        features: E.
        sides: (H, W) of the grid.

    Attributes:
        present: whether there are codes; without, the module has no weights.
        rest: the condition without its codes; None if there is no other.
    """

    def __init__(self, condition: Condition | None, features: int, sides: Sequence[int]):
        super().__init__()
        self.condition, self.sides = condition, tuple(sides)
        parts = condition.parts if isinstance(condition, Joint) else [condition] if condition else []
        codes = [part for part in parts if isinstance(part, Codes)]
        rest = [part for part in parts if not isinstance(part, Codes)]
        self.present = bool(codes)
        self.rest: Condition | None = (
            condition if not codes else Joint(tuple(rest)) if len(rest) > 1 else rest[0] if rest else None
        )
        self.values = nn.ParameterList(torch.randn(part.levels, features) for part in codes)
        self.layers = nn.Sequential()
        if codes:
            convolutions = [nn.Conv2d(features, features, 3, padding=1) for _ in range(2)]
            self.layers = nn.Sequential(convolutions[0], nn.GELU(), convolutions[1])

    def forward(self, y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the features, (B, E, H, W), and the other conditions, (B, *rest.shape)."""
        if not self.present or y is None or self.condition is None:
            return None, y
        values = self.condition.split(y) if isinstance(self.condition, Joint) else (y,)
        parts = self.condition.parts if isinstance(self.condition, Joint) else (self.condition,)
        codes = [value for part, value in zip(parts, values, strict=True) if isinstance(part, Codes)]
        rest = [value for part, value in zip(parts, values, strict=True) if not isinstance(part, Codes)]
        grids = [
            # The null value has no vector.
            (F.one_hot(value, len(vectors) + 1)[..., :-1].to(vectors.dtype) @ vectors).movedim(3, 1)
            for vectors, value in zip(self.values, codes, strict=True)
        ]
        h = torch.stack([F.interpolate(grid, self.sides, mode="nearest") for grid in grids]).sum(0)
        others = self.rest.join(*rest) if isinstance(self.rest, Joint) else rest[0] if rest else None
        return self.layers(h), others
