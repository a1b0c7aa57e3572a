"""Gradients and losses of several processes, averaged in one message a step.

Torch's ``DistributedDataParallel`` is not used: it expects one backward pass for one call of one module, and the families
have penalties on gradients, turns and stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genzoo.model import Loss
from genzoo.numerics import distributed


class ProcessAverage:
    """Averages gradients and losses over processes; the same message carries stop requests and the seconds of a step.

    Attributes:
        stop: whether any process had a stop request when the messages were last read.
    """

    def __init__(self) -> None:
        self.stop = False
        self._unread: Tensor | None = None  # (2,): stop requests and seconds, means over processes, summed over steps

    @torch.no_grad()
    def average(self, parameters: Sequence[nn.Parameter], loss: Loss, stop: bool, seconds: float) -> Loss:
        """Replace the gradients by their means over processes.

        Args:
            parameters: whose gradients are averaged.
            loss: of this process.
            stop: whether this process is to stop.
            seconds: of computing in this process that the others do not know of yet.

        Returns:
            The mean loss and terms, with this process's ``aux``.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        like = gradients[0]
        # Numbers of the host are filled in: to copy them would wait for the device.
        own = [like.new_full((), float(number)) for number in (stop, seconds)]
        facts = torch.stack([*own, *(value.detach().to(like.dtype) for value in (loss.total, *loss.terms.values()))])
        flat = distributed.all_reduce_mean(torch.cat([tensor.flatten() for tensor in (*gradients, facts)]))
        *averages, facts = flat.split([tensor.numel() for tensor in (*gradients, facts)])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(averages, gradients, strict=True)])
        self._unread = facts[:2] if self._unread is None else self._unread + facts[:2]
        total, *terms = facts[2:]
        return Loss(total, dict(zip(loss.terms, terms, strict=True)), loss.aux)

    def read(self) -> float:
        """Wait for the device and update ``stop``; all processes must call this after the same step.

        Returns:
            Seconds since the last call, the mean over processes.
        """
        if self._unread is None:
            return 0.0
        stop, seconds = self._unread.tolist()
        self._unread = None
        self.stop = stop > 0
        return seconds
