"""Constant tensors, cached per device."""

from __future__ import annotations

import torch
from torch import Tensor


class Constant:
    """A constant tensor that is copied to each device once, since copies from the host synchronise.

    Unlike a buffer it is not part of the state, is not cast with the model, and needs no module.

    Args:
        value: on the CPU; must not be modified.
    """

    def __init__(self, value: Tensor):
        self._copies = {value.device: value}
        self.value = value

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor on a device."""
        if device not in self._copies:
            # The first call may be in inference mode, whose tensors autograd cannot save.
            with torch.inference_mode(False):
                self._copies[device] = self.value.to(device)
        return self._copies[device]
