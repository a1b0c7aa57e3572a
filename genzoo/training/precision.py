"""Steps that must not be taken: not finite, or beyond half precision.

A step whose loss or gradient is not finite moves no weight. On a CPU it raises at once; on an accelerator, where reading a
value would stall the device, a flag on the device makes a fused optimiser skip the step, or restores the weights after that of
another one, and is read at the end of each hand-over.

References:
    Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740 (sec. 3.2, scaling of the loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genzoo.model import Loss

PATIENCE = 20  # steps in a row that may overflow in half precision: from 2^16 the scale has then come down to 1/16
ADVICE = "try a lower optimizer.lr or trainer.clip"


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; the step that met it changed no weight."""

    exit_code = 3  # of the command line


class FiniteCheck:
    """Finds steps whose loss or gradient is not finite: at once on a CPU, and after ``read`` on an accelerator."""

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None  # on an accelerator: the first step that was not finite, or -1

    @staticmethod
    def deferred(device: torch.device) -> bool:
        """Whether a step that is not finite is skipped on the device and reported later."""
        return device.type != "cpu"

    def check(self, step: int, loss: Loss, norm: Tensor) -> Tensor | None:
        """Check the loss and the norm of the gradient of a step.

        Returns:
            Where the check is deferred, () bool, whether the step must be skipped; else None.

        Raises:
            NonFiniteError: where it is not deferred.
        """
        if self.deferred(norm.device):
            bad = ~(torch.isfinite(loss.total.detach()) & torch.isfinite(norm))
            if self._first_bad is None:
                self._first_bad = torch.full((), -1, device=bad.device)
            self._first_bad = torch.where(bad & (self._first_bad < 0), step, self._first_bad)
            return bad
        if not (math.isfinite(loss.total.item()) and math.isfinite(norm.item())):
            terms = [name for name, value in loss.terms.items() if not bool(torch.isfinite(value).all())]
            where = f"loss term '{terms[0]}'" if terms else "gradient" if bool(torch.isfinite(loss.total)) else "loss"
            raise NonFiniteError(f"{where} is not finite at step {step}: {ADVICE}")
        return None

    def read(self) -> None:
        """Wait for the device and raise for a step that was skipped.

        Raises:
            NonFiniteError: naming the first such step.
        """
        if self._first_bad is not None and (first := int(self._first_bad)) >= 0:
            raise NonFiniteError(f"loss or gradient is not finite at step {first}: {ADVICE}")


@torch.no_grad()
def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer, step: Callable[[], Any] | None = None) -> None:
    """Step an optimiser, and leave all weights as they were where ``bad``, () bool, is true; the host does not wait for it.

    Fused optimisers skip the step by themselves. The weights of others are put back: a few large operations rather than many
    small ones, which cost some passes over the weights and the memory of three copies. Their averages get a gradient of zero.
    """
    step = step or optimizer.step
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # what the fused kernels call the flag
        step()
        return
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients: list[Tensor] = [p.grad for p in weights if p.grad is not None]

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors])

    def assign(tensors: Sequence[Tensor], values: Tensor) -> None:
        parts = values.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

    assign(gradients, torch.where(bad, 0, flat(gradients)))
    before = flat(weights)
    step()
    assign(weights, torch.where(bad, before, flat(weights)))
