"""Tensors that never change, on every device that asks for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Constant:
    """A tensor that is copied to each device once, since a copy from the host waits for all that was launched before it.

    It is no buffer: it belongs to no state, keeps its type when a model changes its own, and may be held by what is no module.

    Args:
        value: on the CPU; must not be changed.
    """

    def __init__(self, value: Tensor):
        self._copies = {value.device: value}
        self.value = value

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor on a device."""
        if device not in self._copies:
            # Autograd refuses to save what was made in inference mode, where the first to ask may be.
            with torch.inference_mode(False):
                self._copies[device] = self.value.to(device)
        return self._copies[device]
