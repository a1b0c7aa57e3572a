r"""Muon: orthogonalised momentum for matrices, Adam for all other weights.

With the gradient g of a matrix W, (A, B), of a linear layer with A outputs,

    m <- mu m + g,      W <- W - lr sqrt(max(1, A/B)) O(g + mu m)

where O replaces the singular values of a matrix by about 1 (five steps of a Newton-Schulz iteration, in bfloat16): an update of
the same size in every direction, also in those that gradients seldom have. The matrices are all weights with two indices,
embeddings included; biases, gains and kernels of convolutions are left to Adam.

Both parts are torch's optimisers. A step costs about a tenth more than one of Adam at batches of 32 (see GUIDE.md).

References:
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, https://kellerjordan.github.io/posts/muon/.
    Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2015, https://arxiv.org/abs/1412.6980.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Muon for matrices and Adam for the rest, with a group of weights each.

    Args:
        params: weights.
        lr: learning rate of Adam.
        matrix_lr: learning rate of the matrices.
        momentum: mu.
        betas: of Adam.
        weight_decay: decoupled, of the matrices.

    Raises:
        ValueError: without weights, and for negative settings.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        matrix_lr: float = 0.02,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        weights = list(params)
        others, matrices = [p for p in weights if p.ndim != 2], [p for p in weights if p.ndim == 2]
        self.parts: list[torch.optim.Optimizer] = []
        if others or not matrices:
            self.parts.append(torch.optim.Adam(others, lr=lr, betas=betas, fused=True))
        if matrices:
            muon = torch.optim.Muon(matrices, lr=matrix_lr, momentum=momentum, weight_decay=weight_decay)
            self.parts.append(muon)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights that have a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # which loading a state replaces
            part.step()
        return loss
