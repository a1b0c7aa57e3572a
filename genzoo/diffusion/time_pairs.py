r"""Pairs of neighbouring times for consistency training, which approach each other as training proceeds.

A consistency function is trained to agree at two times ``s < t`` of a trajectory. Far apart, the targets are close to the data
and the bias is large; close together, the bias vanishes and errors accumulate over many pairs. The distance is halved each time
that ``doubling`` images have been seen.

References:
    Song, Dhariwal, "Improved Techniques for Training Consistency Models", 2024, https://arxiv.org/abs/2310.14189
    (sections 3.4, 3.5: doubling of the steps, log-normal noise levels).
    Geng et al., "Consistency Models Made Easy", 2024, https://arxiv.org/abs/2406.14548 (section 3: continuous times).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from genzoo.diffusion.schedules import Schedule


class TimePairs(nn.Module, ABC):
    """Neighbouring times, whose distance is halved as training proceeds.

    Args:
        doubling: images between two halvings of the distance.
        halvings: their number.

    Attributes:
        seen: training images so far, saved with the weights.
    """

    seen: Tensor

    def __init__(self, doubling: int, halvings: int):
        super().__init__()
        if doubling < 1 or halvings < 0:
            raise ValueError(
                f"doubling must be at least 1 image and halvings at least 0, not {doubling} and {halvings}"
            )
        self.doubling, self.halvings = doubling, halvings
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def count(self, images: int) -> None:
        """Count the images of a training step."""
        self.seen += images

    def fineness(self) -> Tensor:
        """Return 2 to the power of the halvings so far, () float64."""
        return 2.0 ** (self.seen // self.doubling).clamp(max=self.halvings).double()

    @abstractmethod
    def pair(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Return the later and the earlier time of pairs near the times t, (B,) float64 each."""


class GridPairs(TimePairs):
    r"""Neighbours of a grid of N steps, uniform in the time of the schedule; N doubles from ``start`` to ``end``.

    On ``EDMSchedule`` these are the noise levels of Karras et al. A time chooses the pair about it: log-normal noise levels
    choose pairs with the discretized log-normal probabilities of Song and Dhariwal (section 3.5).

    Args:
        start, end: initial and final number of steps.
        doubling: images between two doublings.
    """

    def __init__(self, start: int = 10, end: int = 1280, doubling: int = 100_000):
        if not 2 <= start <= end:
            raise ValueError(f"start must be at least 2 and at most end, not {start} and {end}")
        super().__init__(doubling, math.ceil(math.log2(end / start)))
        self.start, self.end = start, end

    def pair(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        N = (self.start * self.fineness()).clamp(max=self.end)
        length = (schedule.t_max - schedule.t_min) / N
        index = ((t - schedule.t_min) / length).floor().clamp(min=0).minimum(N - 1)
        later = (schedule.t_min + (index + 1) * length).clamp(max=schedule.t_max)
        return later, schedule.t_min + index * length


class RatioPairs(TimePairs):
    r"""Pairs of Easy Consistency Tuning, whose noise levels r = sigma/alpha have the ratio ``r_s/r_t = 1 - n(r_t)/2^k``.

    The integer k grows from 1 by one at each halving, and ``n(r) = 1 + 8 sigmoid(-r)`` lengthens steps at low noise (Geng et
    al. 2024). The first pairs end at the data, at t_min, as in the training of a denoiser.

    Args:
        doubling: images between two halvings of the distance.
        halvings: their number.
    """

    def __init__(self, doubling: int = 100_000, halvings: int = 8):
        super().__init__(doubling, halvings)

    def pair(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        lowest = schedule.ratio(torch.full((), schedule.t_min, dtype=torch.float64, device=t.device))
        ratio = schedule.ratio(t).clamp(min=2 * lowest)
        step = (1 + 8 * torch.sigmoid(-ratio)) / (2 * self.fineness())
        earlier = torch.maximum(ratio * (1 - step), lowest)
        return schedule.time_of(ratio), schedule.time_of(earlier)
