r"""Muon: orthogonalised momentum for matrices, Adam for all other weights.

With the gradient g of a matrix W, (A, B), of a layer with A outputs,

    m <- mu m + (1 - mu) g,      W <- (1 - lr decay) W - lr sqrt(max(1, A/B)) O((1 - mu) g + mu m)

where O replaces the singular values of a matrix by about 1: an update of the same size in every direction, also in those that
gradients seldom have. It is a Newton-Schulz iteration of X = M/|M|, (A, B) with A <= B,

    X <- a X + (b G + c G^2) X,      G = X X^T,      (a, b, c) = (3.4445, -4.7750, 2.0315)

five times in bfloat16, after which the singular values are between 0.7 and 1.2. It magnifies differences of rounding: after
ten steps the weights of one and of two processes differ by 0.5 % of the largest, those of Adam by 0.01 %. Matrices are all
weights with at least two indices whose first two sides are longer than 1: kernels of convolutions, (A, C, k, k), as (A, C k
k), embeddings included. Biases, gains and depthwise kernels are left to Adam.

References:
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, https://kellerjordan.github.io/posts/muon/.
    Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2015, https://arxiv.org/abs/1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """Replace the singular values of a matrix by about 1, (A, B) -> (A, B) bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    wide = len(x) <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon for matrices and Adam for the rest, with a group of weights each.

    Args:
        params: weights.
        lr: learning rate of Adam.
        matrix_lr: learning rate of the matrices.
        momentum: mu.
        betas: of Adam.
        weight_decay: of the matrices.

    Raises:
        ValueError: without weights, and for settings out of range.
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
        for name, value in (("matrix_lr", matrix_lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not 0 <= value < (1 if name == "momentum" else math.inf):
                raise ValueError(
                    f"{name} must be at least 0{' and below 1' if name == 'momentum' else ''}, not {value}"
                )
        weights = list(params)
        matrices = [p for p in weights if p.ndim >= 2 and min(p.shape[:2]) > 1]
        of_matrices = {id(p) for p in matrices}
        others = [p for p in weights if id(p) not in of_matrices]
        self.adam = torch.optim.Adam(others, lr=lr, betas=betas, fused=True) if others or not matrices else None
        groups: list[dict[str, Any]] = [] if self.adam is None else [*self.adam.param_groups]
        if matrices:
            groups.append({"params": matrices, "lr": matrix_lr, "momentum": momentum, "weight_decay": weight_decay})
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights that have a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            if "momentum" in group:
                self._update_matrices(group)
            elif self.adam is not None:
                self.adam.state, self.adam.param_groups = self.state, [group]  # which loading a state replaces
                self.adam.step()
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = orthogonalized(p.grad.lerp(mean, momentum).flatten(1))
            rows, columns = update.shape
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update.view_as(p), alpha=-lr * math.sqrt(max(1, rows / columns)))
