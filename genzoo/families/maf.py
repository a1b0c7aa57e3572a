r"""MAF: masked autoregressive flows, with affine functions or splines.

An invertible map ``f`` from data to noise, ``z = f(x)``, has the exact density, by the change of variables,

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

``f`` is a composition of autoregressive layers. Each transforms dimension i given the preceding ones, with parameters from a
masked network, so that its Jacobian is triangular:

    affine    z_i = (x_i - m_i) exp(-a_i),                  log |det| = -sum a_i
    spline    z_i = spline(x_i; theta_i),                   log |det| = sum log spline'(x_i; theta_i)
    m_i, a_i, theta_i = functions of x_1, ..., x_{i-1} and the condition

The parameters of all dimensions are computed at once: density and training take one pass. The inverse is sequential,

    x_i = z_i exp(a_i) + m_i  given x_1, ..., x_{i-1},

and sampling takes D passes of every layer. Between layers the order of the dimensions is reversed, or permuted at random.

Images on [-1, 1] go through the logit of RealNVP and are flattened.

References:
    Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation", 2017,
    https://arxiv.org/abs/1705.07057 (eq. 3-6; section 3.2 for conditions).
    Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution Estimation", 2015,
    https://arxiv.org/abs/1502.03509.
    Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019, https://arxiv.org/abs/1906.04032 (section 3.2 for the
    autoregressive form).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.elementwise import Affine, Elementwise, RationalQuadraticSpline
from genzoo.distributions.transforms import Logit
from genzoo.event import EventSpec
from genzoo.families.flow import Flow
from genzoo.model import Continuous
from genzoo.nn.made import MADE


class AutoregressiveLayer(nn.Module):
    """An autoregressive layer, (B, D) -> (B, D).

    Args:
        network: factory of the masked network, called as ``network((D,), (P * D,), condition)``.
        transform: of a dimension, with P parameters.
        order: input dimensions in the order of the layer, int64 (D,).
        condition: of the network.
    """

    order: Tensor

    def __init__(
        self, network: Callable[..., MADE], transform: Elementwise, order: Tensor, condition: Condition | None
    ):
        super().__init__()
        D = len(order)
        self.transform = transform
        self.register_buffer("order", order)
        self.net = network((D,), (transform.num_params * D,), condition)
        if not isinstance(self.net, MADE):
            raise ValueError(f"an autoregressive layer needs a masked network (MADE), not {type(self.net).__name__}")

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return z, (B, D), in the order of the layer, and the log-determinant, (B,)."""
        x = x.index_select(1, self.order)
        # Log-determinants are sums over many layers: not in bfloat16.
        z, ladj = self.transform.forward(x, self.net(x, y).to(x.dtype))
        return z, ladj.sum(1)

    def inverse(self, z: Tensor, y: Tensor | None) -> Tensor:
        x = torch.zeros_like(z)
        for i in range(z.shape[1]):
            params = self.net(x, y, i).to(z.dtype)
            x_i = self.transform.inverse(z[:, i : i + 1], params)
            x = torch.cat([x[:, :i], x_i, x[:, i + 1 :]], dim=1)
        return x.index_select(1, self.order.argsort())


class MAF(Flow):
    """A masked autoregressive flow.

    Args:
        network: factory of a layer's masked network, called as ``network((D,), (P * D,), condition)``, for ``(x, y)``.
        event, condition: as in ``GenerativeModel``.
        layers: number of autoregressive layers.
        transform: "affine" or "spline".
        order: "reverse" to reverse the dimensions between layers, "random" to permute them.
        bins, bound: bins of a spline, which is the identity outside of [-bound, bound], in units of the data or of their logit.

    Raises:
        ValueError: for unknown options, less than one layer, a network that is not masked, and invalid bins and bounds.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., MADE] = MADE,
        layers: int = 5,
        transform: Literal["affine", "spline"] = "affine",
        order: Literal["reverse", "random"] = "reverse",
        bins: int = 8,
        bound: float = 5.0,
    ):
        super().__init__(event, condition)
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        if transform not in ("affine", "spline"):
            raise ValueError(f"transform must be affine or spline, not {transform!r}")
        if order not in ("reverse", "random"):
            raise ValueError(f"order must be reverse or random, not {order!r}")
        self.latent = Continuous((self.dim,))
        self.nfe = self.dim
        self.logit = Logit() if event.levels is not None else None
        function = Affine() if transform == "affine" else RationalQuadraticSpline(bins, bound)
        orders = [torch.arange(self.dim)]
        for _ in range(layers - 1):
            orders.append(torch.randperm(self.dim) if order == "random" else orders[0].flip(0))
        self.layers: Sequence[AutoregressiveLayer] = nn.ModuleList(  # type: ignore[assignment]
            AutoregressiveLayer(network, function, places, condition) for places in orders
        )

    def _forward_and_log_det(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        if self.logit is not None:
            x, log_det = self.logit(x)
        z = x.flatten(1)
        for layer in self.layers:
            z, ladj = layer(z, y)
            log_det = log_det + ladj
        return z, log_det

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.inverse(z, y)
        x = z.view(-1, *self.shape)
        return x if self.logit is None else self.logit.inverse(x)
