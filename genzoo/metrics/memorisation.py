r"""Whether samples are copies of the training data.

Five views, each beside what images of the test split give, which nobody can have copied:

- Nearest ratio: the median distance of a sample to its nearest training image, over that of a test image. Far below 1 means
  that samples hug the training data.
- Authentic: share of the samples that are farther from their nearest training image than that one is from its own nearest.
- Copied: share of the samples whose nearest training image is less than a third as far as the second nearest. A copy is near to
  one image and to no other, however plausible the images are.
- Shifted: the same where a distance is the least over shifts by up to one pixel each way, so that moved copies are seen.
- Exact copies: how many samples are training images byte for byte.

Distances are those of the pixels; of images that are flipped in training, to the nearer side. More copies than chance explains
are those whose number, were samples and test images of one distribution, is less likely than ``LEVEL`` by Fisher's exact test;
copied and shifted are tested at half of it each, so that a false alarm is no likelier whatever the sizes of both.

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
from genzoo.metrics.likelihood import Score, mean_with_error
from genzoo.metrics.manifold import squared_distances

THRESHOLD = 1 / 3
CANDIDATES = 4  # of each side that are measured again
LEVEL = 3.17e-5  # probability of a false alarm, at most: that of a normal variable beyond four standard deviations
CELLS = 2**26  # of a table of distances over shifts that is held at once: 256 MiB


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


def shifted_copies(x: Tensor, train: Tensor, flip: bool = False) -> Tensor:
    """Find the images that are copies of training images up to a shift by one pixel each way, (N,) bool.

    The distance of two images is the least over nine shifts of that of the parts that both have, the inside of one.

    Args:
        x: (N, C, H, W) bytes or floats, H and W at least 3; in the insides of tiny images chance finds copies.
        train: (M, C, H, W), at least 3.
        flip: whether training saw mirror images too.
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
        for row, i in zip(rows, candidates, strict=True):  # again, in double precision
            parts = torch.stack([train[i][..., down, right] for down, right in windows]).double()
            exact = torch.stack([(side[row].double() - parts).flatten(2).norm(dim=2) for side in sides]).amin((0, 1))
            nearest, second = exact.topk(2, largest=False).values
            found.append((nearest < THRESHOLD * second) | (nearest == 0))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.bool, device=x.device)


def exact_copies(x: Tensor, train: Tensor, flip: bool = False) -> int:
    """Count the events that are training events byte for byte, or, where training saw these too, their mirror images."""
    known = {event.numpy().tobytes() for side in ([train, train.flip(-1)] if flip else [train]) for event in side.cpu()}
    return sum(event.numpy().tobytes() in known for event in x.cpu().contiguous())


def more_than_chance(copies: int, n: int, copies_of_test: int, n_test: int) -> float:
    """Return how likely so many copies among ``n`` samples are, or more, were they as frequent among ``n_test`` test events.

    Given how many copies there are in all, each of the n + n_test events is as likely to be one: Fisher's exact test.
    """
    return float(hypergeom.sf(copies - 1, n + n_test, copies + copies_of_test, n))


class Memorisation(NamedTuple):
    """Samples beside test events; shares in [0, 1]."""

    nearest_ratio: float
    authentic: Score
    authentic_of_test: float
    copied: Score
    copied_of_test: float
    shifted: Score | None  # None where events have no pixels
    shifted_of_test: float | None
    alarms: list[
        tuple[float, float, str]
    ]  # shares of samples and of test events that chance does not explain, and which

    @property
    def flagged(self) -> bool:
        """Whether more samples are copies than chance and the test split explain."""
        return bool(self.alarms)


def memorisation(fake: Neighbours, test: Neighbours, shifted: tuple[Tensor, Tensor] | None = None) -> Memorisation:
    """Judge samples by their neighbours in the training data, and test events by theirs.

    Args:
        fake, test: of the samples, and of the test events.
        shifted: which samples, and which test events, are copies up to a shift.
    """
    pairs = {"": (fake.copied, test.copied), **({} if shifted is None else {" up to a shift by a pixel": shifted})}
    alarms = [
        (float(a.double().mean()), float(b.double().mean()), how)
        for how, (a, b) in pairs.items()
        if more_than_chance(int(a.sum()), len(a), int(b.sum()), len(b)) < LEVEL / 2
    ]
    return Memorisation(
        nearest_ratio=float(fake.nearest.median() / test.nearest.median()),
        authentic=mean_with_error(fake.authentic),
        authentic_of_test=float(test.authentic.double().mean()),
        copied=mean_with_error(fake.copied),
        copied_of_test=float(test.copied.double().mean()),
        shifted=None if shifted is None else mean_with_error(shifted[0]),
        shifted_of_test=None if shifted is None else float(shifted[1].double().mean()),
        alarms=alarms,
    )
