"""Everything that training changes besides weights, averages and optimisers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genzoo.training.plan import Plan


@dataclass
class Window:
    """Terms of the loss since they were last written, kept on the device."""

    terms: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of one step."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value)

    def flush(self) -> dict[str, float]:
        """Return the mean of each term and forget them."""
        if not self.terms:
            return {}
        means = torch.stack([torch.stack(values).float().mean() for values in self.terms.values()]).tolist()
        names, self.terms = list(self.terms), {}
        return dict(zip(names, means, strict=True))

    def to(self, device: torch.device) -> None:
        """Move the terms to a device."""
        self.terms = {name: list(torch.stack(values).to(device)) for name, values in self.terms.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the terms, each as one tensor."""
        return {name: torch.stack(values) for name, values in self.terms.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore terms that ``state_dict`` returned."""
        self.terms = {name: list(values) for name, values in state.items()}


@dataclass
class TrainState:
    """Progress of a training.

    Attributes:
        plan: of the steps.
        steps: taken so far.
        train_seconds: of computing, on all processes' clock.
        flops: of all steps.
        skipped, in_a_row: steps whose scaled gradients overflowed, and how many of them were the last ones.
        window: terms of the loss that were not written yet.
        decaying: whether the decay of the learning rate of the last stage has begun.
    """

    plan: Plan
    steps: int = 0
    train_seconds: float = 0.0
    flops: int = 0
    skipped: int = 0
    in_a_row: int = 0
    window: Window = field(default_factory=Window)
    decaying: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types and tensors."""
        return {
            "steps": self.steps,
            **self.plan.state_dict(),
            "window": self.window.state_dict(),
            "train_seconds": self.train_seconds,
            "flops": self.flops,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "decaying": self.decaying,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned, also in an earlier release."""
        self.plan.load_state_dict(state)
        self.steps, self.train_seconds, self.flops = state["steps"], state["train_seconds"], state["flops"]
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self.window.load_state_dict(state["window"])
        self.decaying = state.get("decaying", False)
