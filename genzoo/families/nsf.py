r"""Neural spline flow: a normalising flow of couplings that are monotonic rational-quadratic splines.

An invertible map ``f`` from data to noise, ``z = f(x)``, has the exact density, by the change of variables,

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

``f`` is a composition of couplings. Each splits its input into ``a`` and ``b`` and transforms each element of ``b`` by a spline
whose K bins and slopes are the output of a network of ``a``:

    b <- spline(b; theta(a)),        log |det| = sum log spline'(b; theta(a))

Density and samples take one pass. The spline is that of ``genzoo.distributions.elementwise``: the identity outside of [-B, B],
which should hold the data, and everywhere for a zero-initialised network. The multi-scale architecture of images is that of
RealNVP, with its alternating masks in place of the learned permutations of the paper.

The autoregressive form of the flow is the masked autoregressive flow with ``transform="spline"``.

References:
    Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019, https://arxiv.org/abs/1906.04032 (section 3.1 for the
    spline, section 3.2 for the couplings).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.elementwise import RationalQuadraticSpline
from genzoo.event import EventSpec
from genzoo.families.coupling_flow import Coupling, CouplingFlow
from genzoo.nn import defaults


class SplineCoupling(Coupling):
    """A coupling of splines.

    Args:
        network, shape, moved, condition: as in ``Coupling``; a zero-initialised network gives the identity.
        spline: the family of splines.
    """

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        moved: Sequence[int],
        condition: Condition | None,
        *,
        spline: RationalQuadraticSpline,
    ):
        super().__init__(network, shape, moved, condition, num_params=spline.num_params)
        self.spline = spline

    def transform(self, b: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        b, ladj = self.spline.forward(b, params)
        return b, ladj.flatten(1).sum(1)

    def inverse_transform(self, b: Tensor, params: Tensor) -> Tensor:
        return self.spline.inverse(b, params)


class NSF(CouplingFlow):
    """A flow of couplings that are splines.

    Args:
        network: factory of a coupling's network, called as ``network(in_shape, out_shape, condition)``, for ``(x, y)``.
        event, condition: as in ``GenerativeModel``.
        scales: number of scales of an image; each halves the sides.
        couplings: couplings of each kind per scale; for vectors, the total number.
        bins: bins of a spline.
        bound: a spline is the identity outside of [-bound, bound], in units of the data or of their logit.

    Raises:
        ValueError: for images whose sides are not divisible by ``2**scales``, for vectors of one element, and for invalid bins
            and bounds.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.coupling,
        scales: int = 2,
        couplings: int = 3,
        bins: int = 8,
        bound: float = 5.0,
    ):
        coupling = functools.partial(SplineCoupling, spline=RationalQuadraticSpline(bins, bound))
        super().__init__(event, condition, coupling=coupling, network=network, scales=scales, couplings=couplings)
