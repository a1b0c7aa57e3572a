r"""Memorisation of training data.

Five metrics, each with the test split as the baseline:

- Nearest ratio: median distance of a sample to its nearest training image, over that of a test image. Values far below 1
  indicate memorisation.
- Authentic: fraction of the samples farther from their nearest training image than that one is from its own nearest.
- Copied: fraction of the samples whose nearest training image is less than a third as far as the second nearest.
- Shifted: the same, with the minimum distance over shifts by up to one pixel in each direction.
- Exact copies: number of samples equal to training images byte for byte.

Distances are Euclidean in pixels; with horizontal flips in training, the minimum over both orientations. An excess of copies
over the test split is flagged at level ``LEVEL`` by Fisher's exact test, with a Bonferroni correction for the tests of copied
and shifted.

References:
    Alaa et al., "How Faithful is your Synthetic Data? Sample-level Metrics for Evaluating and Auditing Generative Models",
    2022, https://arxiv.org/abs/2102.08921 (section 3.2: authenticity), as AuthPct in Stein et al., 2023,
    https://arxiv.org/abs/2306.04675.
    Yoon, Choi, Kwon, Ryu, "Diffusion Probabilistic Models Generalize when They Fail to Memorize", 2023,
    https://openreview.net/forum?id=shciCbSk9h (section 2: a third of the distance to the second neighbour).
    Fisher, "The Logic of Inductive Inference", 1935, https://doi.org/10.2307/2342435 (the exact test of two proportions).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.stats import hypergeom
from torch import Tensor

from genzoo.metrics.finite import check_finite
from genzoo.metrics.likelihood import Score, mean_and_stderr
from genzoo.metrics.manifold import squared_distances

THRESHOLD = 1 / 3
CANDIDATES = 4  # nearest neighbours in float32, recomputed in float64
LEVEL = 3.17e-5  # significance level: four standard deviations of a Gaussian, one-sided
CELLS = 2**26  # distances over shifts in memory: 256 MiB


class Neighbours(NamedTuple):
    """Nearest-neighbour distances of events, (N,) float64 each."""

    nearest: Tensor  # distance to the nearest training event
    second: Tensor  # distance to the second nearest training event
    isolation: Tensor  # distance of the nearest training event to its own nearest neighbour

    @property
    def copied(self) -> Tensor:
        """Whether each event is a copy, (N,) bool."""
        # A copy of a duplicated training event has two neighbours at distance 0.
        return (self.nearest < THRESHOLD * self.second) | (self.nearest == 0)

    @property
    def authentic(self) -> Tensor:
        """Whether each event is farther from its nearest training event than that one from its own, (N,) bool."""
        return self.nearest > self.isolation


def neighbours(x: Tensor, train: Tensor, flip: bool = False) -> Neighbours:
    """Compute the nearest-neighbour distances of events to training events.

    Args:
        x: (N, ...) bytes or floats.
        train: (M, ...), at least 3.
        flip: whether training includes horizontal flips.

    Raises:
        NonFiniteError: for non-finite events.
    """
    check_finite(events=x, training_events=train)
    nearest, index = _nearest(x, train, flip)
    unique, inverse = index[:, 0].unique(return_inverse=True)
    isolation, _ = _nearest(train[unique], train, flip, unique)
    return Neighbours(nearest[:, 0], nearest[:, 1], isolation[:, 0][inverse])


def _nearest(x: Tensor, train: Tensor, flip: bool, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances and indices of the nearest two training events of each event, (N, 2) each.

    Candidates are found in float32, and their distances recomputed in float64.

    Args:
        own: index of each event among the training events, if it is one of them, to exclude itself.
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
    # Count a training event that is a candidate in both orientations once.
    order = candidates.argsort(dim=1, stable=True)
    ordered = candidates.gather(1, order)
    twice = torch.zeros_like(exact, dtype=torch.bool)
    twice.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    values, places = exact.masked_fill(twice, torch.inf).topk(2, dim=1, largest=False)
    return values, candidates.gather(1, places)


def shifted_copies(x: Tensor, train: Tensor, flip: bool = False) -> Tensor:
    """Whether images are copies of training images up to a shift by one pixel in each direction, (N,) bool.

    The distance of two images is the minimum over nine shifts of that between their overlapping crops.

    Args:
        x: (N, C, H, W) bytes or floats, H and W at least 3; crops of tiny images match by chance.
        train: (M, C, H, W), at least 3.
        flip: whether training includes horizontal flips.
    """
    height, width = (side - 2 for side in train.shape[-2:])
    windows = [(slice(i, i + height), slice(j, j + width)) for i in range(3) for j in range(3)]
    sides = [side[..., 1:-1, 1:-1] for side in ([x, x.flip(-1)] if flip else [x])]
    found = []
    for rows in torch.arange(len(x), device=x.device).split(max(1, CELLS // len(train))):
        table = torch.full((len(rows), len(train)), torch.inf, device=x.device)
        for down, right in windows:
            part = train[..., down, right].flatten(1)
            for side in sides:
                for some, d in squared_distances(side[rows].flatten(1), part, torch.float32):
                    table[some] = table[some].minimum(d)
        candidates = table.topk(min(CANDIDATES, len(train)), largest=False).indices
        for row, i in zip(rows, candidates, strict=True):  # recompute in float64
            parts = torch.stack([train[i][..., down, right] for down, right in windows]).double()
            exact = torch.stack([(side[row].double() - parts).flatten(2).norm(dim=2) for side in sides]).amin((0, 1))
            nearest, second = exact.topk(2, largest=False).values
            found.append((nearest < THRESHOLD * second) | (nearest == 0))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.bool, device=x.device)


def exact_copies(x: Tensor, train: Tensor, flip: bool = False) -> int:
    """Count the events equal to training events byte for byte, or with ``flip`` to their horizontal flips."""
    known = {event.numpy().tobytes() for side in ([train, train.flip(-1)] if flip else [train]) for event in side.cpu()}
    return sum(event.numpy().tobytes() in known for event in x.cpu().contiguous())


def fisher_p_value(copies: int, n: int, copies_of_test: int, n_test: int) -> float:
    """One-sided p-value of Fisher's exact test for more copies among ``n`` samples than among ``n_test`` test events."""
    return float(hypergeom.sf(copies - 1, n + n_test, copies + copies_of_test, n))


class Memorisation(NamedTuple):
    """Memorisation metrics of samples and of test events; fractions in [0, 1]."""

    nearest_ratio: float
    authentic: Score
    authentic_of_test: float
    copied: Score
    copied_of_test: float
    shifted: Score | None  # None for vectors
    shifted_of_test: float | None
    alarms: list[tuple[float, float, str]]  # significant fractions of samples and of test events, and their description

    @property
    def flagged(self) -> bool:
        """Whether significantly more samples than test events are copies."""
        return bool(self.alarms)


def memorisation(fake: Neighbours, test: Neighbours, shifted: tuple[Tensor, Tensor] | None = None) -> Memorisation:
    """Compute memorisation metrics.

    Args:
        fake, test: nearest-neighbour distances of samples and of test events.
        shifted: whether samples, and test events, are copies up to a shift.
    """
    pairs = {"": (fake.copied, test.copied), **({} if shifted is None else {" up to a shift by a pixel": shifted})}
    alarms = [
        (float(a.double().mean()), float(b.double().mean()), how)
        for how, (a, b) in pairs.items()
        if fisher_p_value(int(a.sum()), len(a), int(b.sum()), len(b)) < LEVEL / 2
    ]
    return Memorisation(
        nearest_ratio=float(fake.nearest.median() / test.nearest.median()),
        authentic=mean_and_stderr(fake.authentic),
        authentic_of_test=float(test.authentic.double().mean()),
        copied=mean_and_stderr(fake.copied),
        copied_of_test=float(test.copied.double().mean()),
        shifted=None if shifted is None else mean_and_stderr(shifted[0]),
        shifted_of_test=None if shifted is None else float(shifted[1].double().mean()),
        alarms=alarms,
    )
