"""How many steps a run has, and at which of them its stages end.

Images and FLOPs are planned exactly before the first step. Where seconds end the run, alone or before a count, the plan is
fitted to the speed of the steps that were trained: the first time after a few percent of the seconds, until when schedules
stand at their beginning, and a few times later. Each stage gets its share of the images, or where seconds end the run its
share of the seconds, since the steps of one stage may take longer than another's.

The functions here compute plans; ``Plan`` holds the present one and decides when it is fitted anew.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from genzoo.training.budget import Budget

# Fractions of a stage's plan or seconds after which the plan is fitted to the clock.
CORRECTIONS = (0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
UNPLANNED = 10**9  # steps of a stage before the first fit
MARGIN = 1.05  # times the seconds left: a count of images or FLOPs that takes less keeps its own plan
CYCLE = 5040  # steps that are counted one by one: a multiple of every short cycle of turns


def ends_by_images(images: int, batch_size: int, shares: Sequence[float]) -> list[int]:
    """Return the step at which each stage ends.

    Args:
        images: of the whole run.
        batch_size: of a step.
        shares: of the budget that is spent at the end of each stage, rising to 1.
    """
    steps = math.ceil(images / batch_size)
    return [round(share * steps) for share in shares]


def affordable_steps(flops: float, costs: Sequence[int]) -> int:
    """Return how many steps some FLOPs pay for, at least one.

    Args:
        flops: the budget of a stage.
        costs: FLOPs of each step of one cycle of turns.
    """
    spent = list(itertools.accumulate(costs))
    cycles, left = divmod(flops, spent[-1])
    return max(int(cycles) * len(spent) + bisect.bisect_right(spent, left), 1)


def ends_by_seconds(
    step: int, seconds: float, budget: float, shares: Sequence[float], speeds: Sequence[float], longest: int | None
) -> list[int]:
    """Return the steps at which the present and later stages end, a little less than fits.

    A stage that is late takes its time from the next one.

    Args:
        step, seconds: so far.
        budget: seconds of the whole run.
        shares: of the budget that is spent at the end of each of these stages.
        speeds: of each of them, in steps a second.
        longest: the step at which a count ends the run, if there is one.
    """
    ends, stop = [], step
    for share, speed in zip(shares, speeds, strict=True):
        stop += max(1, int(0.97 * speed * (share * budget - seconds)))
        seconds = max(seconds, share * budget)
        ends.append(stop if longest is None else min(stop, longest))
    return ends


class Plan:
    """The steps of a run.

    Args:
        budget: limits of the run.
        stage_shares: of the budget, of each stage; they sum to 1.
        batch_size: of a step, all processes together.

    Attributes:
        planned_steps: the end of the last stage, None before ``start``.
        boundaries: the ends of all other stages.
        planned_by: the limit that the plan follows.
    """

    def __init__(self, budget: Budget, stage_shares: Sequence[float], batch_size: int):
        self.budget, self.batch_size = budget, batch_size
        self.stage_shares = list(stage_shares)
        self.shares = list(itertools.accumulate(stage_shares))
        self.planned_steps: int | None = None
        self.planned_by = ""
        self.boundaries: list[int] = []
        self._counted: list[int] = []  # the ends of all stages by a count of images or FLOPs
        self._counted_by = ""  # the stricter of the two
        self._speeds: list[float | None] = [None] * len(stage_shares)  # of each stage, in steps a second, once measured
        self._begun = 0, 0.0  # steps and seconds when the present stage began
        self._fitted: tuple[int, float] | None = None  # and from when on its speed is measured
        self._corrections = 0  # of the present stage

    @property
    def known(self) -> bool:
        """Whether the end is known, as by the clock it is not before some steps were measured."""
        return self.planned_steps is not None and self.planned_steps < UNPLANNED

    def stage_at(self, step: int) -> tuple[int, int, int]:
        """Return the index of a step's stage, the step's number within it, and the number of its steps."""
        assert self.planned_steps is not None
        start = 0
        for i, stop in enumerate(self.boundaries):
            if step < stop:
                return i, step - start, stop - start
            start = stop
        return len(self.shares) - 1, step - start, self.planned_steps - start

    def start(self, costs: Callable[[int], Sequence[int]]) -> None:
        """Fix how many steps schedules expect; where only seconds are given, that is known once some were measured.

        Args:
            costs: gives FLOPs of each of ``CYCLE`` steps of a stage.
        """
        plans = {}
        if self.budget.images is not None:
            plans["images"] = ends_by_images(self.budget.images, self.batch_size, self.shares)
        if self.budget.flops is not None:
            flops = self.budget.flops
            lengths = [affordable_steps(share * flops, costs(i)) for i, share in enumerate(self.stage_shares)]
            plans["flops"] = list(itertools.accumulate(lengths))
        if plans:
            self._counted_by, self._counted = min(plans.items(), key=lambda plan: plan[1][-1])
            self.planned_by = self._counted_by
            *self.boundaries, self.planned_steps = self._counted
        else:
            self.planned_by = "seconds"
            self._leave_open(0)

    def _leave_open(self, present: int) -> None:
        """Leave open where the present stage and those after it end."""
        self.boundaries = [*self.boundaries[:present], *[UNPLANNED] * (len(self.shares) - 1 - present)]
        self.planned_steps = UNPLANNED

    def correct(self, steps: int, seconds: float) -> None:
        """Where seconds are given, fit the plan a few times a stage to the speed since it was last fitted.

        The first step of a stage, which warms up allocators and caches, does not count. A finished stage stays as it was.

        Args:
            steps, seconds: so far.
        """
        if self.budget.seconds is None:
            return
        assert self.planned_steps is not None
        present = sum(steps >= stop for stop in self.boundaries)
        if steps in self.boundaries:  # a stage has just ended
            self._begun, self._fitted, self._corrections = (steps, seconds), None, 0
            if self.planned_by == "seconds":
                self._leave_open(present)
            return
        if self._corrections == len(CORRECTIONS):
            return
        begun_steps, begun_seconds = self._begun
        stop = [*self.boundaries, self.planned_steps][present]
        done_steps = (steps - begun_steps) / max(stop - begun_steps, 1)
        # Nothing is left where an earlier stage was very late.
        left = self.shares[present] * self.budget.seconds - begun_seconds
        done_seconds = (seconds - begun_seconds) / max(left, 1e-9)
        if self._fitted is None:
            if seconds == begun_seconds:  # nothing was measured yet
                return
            self._fitted = (steps, seconds) if done_seconds < 1 else self._begun
        done, spent = steps - self._fitted[0], seconds - self._fitted[1]
        if max(done_steps, done_seconds) < CORRECTIONS[self._corrections] or not done or spent <= 0:
            return
        self._corrections += 1
        self._fitted = steps, seconds
        if self._counted and self._corrections == 1:  # a count that can be reached is not given up for a slow start
            return
        self._speeds[present] = done / spent
        self._fit(present, steps, seconds)

    def _fit(self, present: int, steps: int, seconds: float) -> None:
        """Plan from the present stage on, whose speed is known, by the limit that will end the run."""
        assert self.budget.seconds is not None and self._speeds[present] is not None
        # A stage that has not run yet is taken to be as fast as this one.
        speeds = [speed or self._speeds[present] or 0.0 for speed in self._speeds[present:]]
        ends = self.boundaries[:present]
        if self._counted:
            starts = [steps, *self._counted[present:-1]]
            lengths = [stop - start for start, stop in zip(starts, self._counted[present:], strict=True)]
            needed = sum(max(length, 0) / speed for length, speed in zip(lengths, speeds, strict=True))
            if needed <= MARGIN * (self.budget.seconds - seconds):
                self.planned_by = self._counted_by
                *self.boundaries, self.planned_steps = [*ends, *self._counted[present:]]
                return
        self.planned_by = "seconds"
        longest = self._counted[-1] if self._counted else None
        later = ends_by_seconds(steps, seconds, self.budget.seconds, self.shares[present:], speeds, longest)
        *self.boundaries, self.planned_steps = [*ends, *later]

    def extend(self, costs: Callable[[int], Sequence[int]], steps: int, seconds: float, flops: float) -> None:
        """Plan the rest of a restored run by a larger budget than it was planned by; its last stage goes on.

        Args:
            costs: as in ``start``.
            steps, seconds, flops: so far, within the last stage.
        """
        done, self._counted, self._counted_by = self.boundaries, [], ""
        self.start(costs)
        self.boundaries = done
        if done and self._counted:  # the stages before the last one stay as they were
            counts = {}
            if self.budget.images is not None:
                counts["images"] = math.ceil(self.budget.images / self.batch_size)
            if self.budget.flops is not None:
                counts["flops"] = steps + affordable_steps(self.budget.flops - flops, costs(len(done)))
            self._counted_by = self.planned_by = min(counts, key=lambda name: counts[name])
            self.planned_steps = counts[self.planned_by]
            self._counted = [*done, self.planned_steps]
        if self.budget.seconds is not None:
            begun_steps, begun_seconds = self._begun
            self._corrections, self._fitted = 0, (steps, seconds)
            self._speeds[-1] = (steps - begun_steps) / max(seconds - begun_seconds, 1e-9)
            self._fit(len(done), steps, seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan in plain types."""
        return {
            "planned_steps": self.planned_steps,
            "planned_by": self.planned_by,
            "counted": list(self._counted),
            "counted_by": self._counted_by,
            "boundaries": list(self.boundaries),
            "speeds": list(self._speeds),
            "begun": self._begun,
            "fitted": self._fitted,
            "corrections": self._corrections,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a plan that ``state_dict`` returned, also one of an earlier release."""
        self.planned_steps, self.boundaries = state["planned_steps"], list(state["boundaries"])
        self._speeds, self._corrections = list(state["speeds"]) or self._speeds, state["corrections"]
        if "planned_by" in state:
            self.planned_by, self._counted = state["planned_by"], list(state["counted"])
            self._counted_by = state["counted_by"]
        else:  # a run of an earlier release, which never fitted a count to the clock
            counts = [name for name in ("images", "flops") if getattr(self.budget, name) is not None]
            self._counted_by = counts[0] if counts else ""
            self.planned_by = self._counted_by or "seconds"
            self._counted = [*self.boundaries, self.planned_steps] if counts and self.planned_steps else []
        self._begun = tuple(state["begun"])
        self._fitted = None if state["fitted"] is None else tuple(state["fitted"])
