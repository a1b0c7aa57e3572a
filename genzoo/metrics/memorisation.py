r"""Whether samples are copies of the training data.

Three views, each beside what images of the test split give, which nobody can have copied:

- Nearest ratio: the median distance of a sample to its nearest training image, over that of a test image. Far below 1 means
  that samples hug the training data.
- Authentic: share of the samples that are farther from their nearest training image than that one is from its own nearest.
- Copied: share of the samples whose nearest training image is less than a third as far as the second nearest. A copy is near to
  one image and to no other, however plausible the images are.

Distances are those of the pixels; of images that are flipped in training, to the nearer side.

References:
    Alaa et al., "How Faithful is your Synthetic Data? Sample-level Metrics for Evaluating and Auditing Generative Models",
    2022, https://arxiv.org/abs/2102.08921 (section 3.2: authenticity), as AuthPct in Stein et al., 2023,
    https://arxiv.org/abs/2306.04675.
    Yoon, Choi, Kwon, Ryu, "Diffusion Probabilistic Models Generalize when They Fail to Memorize", 2023,
    https://openreview.net/forum?id=shciCbSk9h (section 2: a third of the distance to the second neighbour).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.metrics.finite import check_finite
from genzoo.metrics.likelihood import Score, mean_with_error
from genzoo.metrics.manifold import squared_distances

THRESHOLD = 1 / 3
CANDIDATES = 4  # of each side that are measured again
SURE = 4.0  # standard errors by which copies must exceed those of the test split to be called so


class Neighbours(NamedTuple):
    """Of each event, (N,) float64 each."""

    nearest: Tensor  # distance to the nearest training event
    second: Tensor  # to the second nearest
    isolation: Tensor  # of the nearest training event from its own nearest

    @property
    def copied(self) -> Tensor:
        """Which events are copies, (N,) bool."""
        # Of two training events that are the same, a copy has both at distance 0.
        return (self.nearest < THRESHOLD * self.second) | (self.nearest == 0)

    @property
    def authentic(self) -> Tensor:
        """Which events are farther from the training events than those are from each other, (N,) bool."""
        return self.nearest > self.isolation


def neighbours(x: Tensor, train: Tensor, flip: bool = False) -> Neighbours:
    """Find the nearest two training events of each event.

    Args:
        x: (N, ...) bytes or floats.
        train: (M, ...), at least 3.
        flip: whether training saw mirror images too.

    Raises:
        NotFinite: for events that are not.
    """
    check_finite(events=x, training_events=train)
    nearest, index = _nearest(x, train, flip)
    towns, back = index[:, 0].unique(return_inverse=True)
    others, _ = _nearest(train[towns], train, flip, towns)
    return Neighbours(nearest[:, 0], nearest[:, 1], others[:, 0][back])


def _nearest(x: Tensor, train: Tensor, flip: bool, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances of the nearest two training events of each event, and which these are, (N, 2) each.

    The table is made in single precision; the best few of it are measured again in double.

    Args:
        own: the place of each event among the training events, where it is one of them and not its own neighbour.
    """
    sides = [x, x.flip(-1)] if flip else [x]
    distances = []
    for side in sides:
        found = []
        for rows, d in squared_distances(side.flatten(1), train.flatten(1), torch.float32):
            if own is not None:
                d[rows - rows[0], own[rows]] = torch.inf
            found.append(d.topk(min(CANDIDATES, len(train) - 1), dim=1, largest=False).indices)
        distances.append(torch.cat(found))
    candidates = torch.cat(distances, dim=1)
    pairs = [zip(side.double(), candidates, strict=True) for side in sides]
    exact = torch.stack(
        [torch.stack([(event - train[i]).flatten(1).norm(dim=1) for event, i in side]) for side in pairs]
    ).amin(0)
    # A training event that is near on both sides is one event.
    order = candidates.argsort(dim=1, stable=True)
    ordered = candidates.gather(1, order)
    twice = torch.zeros_like(exact, dtype=torch.bool)
    twice.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    values, places = exact.masked_fill(twice, torch.inf).topk(2, dim=1, largest=False)
    return values, candidates.gather(1, places)


class Memorisation(NamedTuple):
    """Samples beside test events; shares in [0, 1]."""

    nearest_ratio: float
    authentic: Score
    authentic_of_test: float
    copied: Score
    copied_of_test: float

    @property
    def flagged(self) -> bool:
        """Whether more samples are copies than chance and the test split explain."""
        p = (self.copied.value * self.copied.n + 1) / (self.copied.n + 2)  # the rule of succession: never quite 0
        return self.copied.value - self.copied_of_test > SURE * (2 * p * (1 - p) / self.copied.n) ** 0.5


def memorisation(fake: Neighbours, test: Neighbours) -> Memorisation:
    """Judge samples by their neighbours in the training data, and test events by theirs."""
    return Memorisation(
        nearest_ratio=float(fake.nearest.median() / test.nearest.median()),
        authentic=mean_with_error(fake.authentic),
        authentic_of_test=float(test.authentic.double().mean()),
        copied=mean_with_error(fake.copied),
        copied_of_test=float(test.copied.double().mean()),
    )
