"""Training steps of flows: the batch on hand, the likelihood, the gradient and a step of Adam.

A coupling flow of vectors: 64 dimensions, 8 affine couplings whose nets have three hidden layers and SiLU, of width
64 as in the peers' own examples and of width 256, batches of 512. nflows and zuko bring such nets; normflows takes
any module and is given genzoo's. At width 64 bfloat16 does not pay for so little work.

Glow of images: 3x32x32, 3 scales of 4 steps, nets of width 256 with activation norms as genzoo's and the authors',
batches of 16.

All do the same: the loss of a batch that is on hand, its gradient and a step of Adam, genzoo's as its configurations
build it, the peers' as their examples do. What genzoo's trainer adds, as these examples do not, is timed by ``loop``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from run import Go, Pair
from torch import Tensor, nn

from genzoo.families.glow import Glow
from genzoo.families.realnvp import RealNVP
from genzoo.model import GenerativeModel
from genzoo.nn.coupling import GlowNet
from genzoo.nn.mlp import MLP

D, COUPLINGS, BATCH = 64, 8, 512
SHAPE, SCALES, STEPS, CHANNELS, IMAGES = (3, 32, 32), 3, 4, 256, 16


def vectors() -> Tensor:
    return torch.randn(BATCH, D, generator=torch.Generator().manual_seed(0))


def images() -> Tensor:
    return torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def vector_flow(width: int) -> RealNVP:
    """The flow of vectors, whose number of weights is that of the peers' to 1%."""
    return RealNVP((D,), network=functools.partial(MLP, width=width, depth=1, zero_init=True), couplings=COUPLINGS)


def image_flow() -> Glow:
    """The flow of images, whose number of weights is that of the peer's to 5%."""
    return Glow(
        SHAPE, network=functools.partial(GlowNet, width=CHANNELS), levels=256, scales=SCALES, steps=STEPS, logit=False
    )


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def steps(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Go:
    """Train on one batch."""

    def go() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return go


def ours(build: Callable[[], GenerativeModel], data: Callable[[], Tensor], bfloat16: bool) -> Callable[[], Go]:
    """Train a flow of genzoo's."""

    def prepare() -> Go:
        x, model = data(), build()

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                return model.loss(x).total

        return steps(loss, torch.optim.Adam(model.parameters(), lr=1e-3, fused=True))

    return prepare


def theirs(model: nn.Module, nll: Callable[[Tensor], Tensor], x: Tensor, own: GenerativeModel, close: float) -> Go:
    """Train a peer's flow as their examples do, which all agree."""
    assert abs(count(model) / count(own) - 1) < close, (count(model), count(own))
    return steps(lambda: nll(x), torch.optim.Adam(model.parameters(), lr=1e-3))


def by_normflows(width: int) -> Go:
    import normflows as nf

    chain: list[nn.Module] = []
    for _ in range(COUPLINGS):
        chain.append(nf.flows.AffineCouplingBlock(MLP((D // 2,), (D,), width=width, depth=1, zero_init=True)))
        chain.append(nf.flows.Permute(D, mode="swap"))
    model = nf.NormalizingFlow(nf.distributions.base.DiagGaussian(D), chain)
    return theirs(model, model.forward_kld, vectors(), vector_flow(width), 0.01)


def by_nflows(width: int) -> Go:
    from nflows.flows.realnvp import SimpleRealNVP

    model = SimpleRealNVP(D, width, COUPLINGS, num_blocks_per_layer=1, activation=nn.functional.silu)
    return theirs(model, lambda x: -model.log_prob(inputs=x).mean(), vectors(), vector_flow(width), 0.01)


def by_zuko(width: int) -> Go:
    from zuko.flows import RealNVP as Flow

    model = Flow(D, transforms=COUPLINGS, hidden_features=[width] * 3, activation=nn.SiLU)
    return theirs(model, lambda x: -model().log_prob(x).mean(), vectors(), vector_flow(width), 0.01)


def glow_by_normflows() -> Go:
    import normflows as nf

    C, H, W = SHAPE
    bases, chains, merges = [], [], []
    for i in reversed(range(SCALES)):  # the deepest first
        block = functools.partial(nf.flows.GlowBlock, C * 2 ** (i + 2), CHANNELS, net_actnorm=True)
        chains.append([*(block() for _ in range(STEPS)), nf.flows.Squeeze()])
        last = i == SCALES - 1
        bases.append(nf.distributions.GlowBase((C * 2 ** (i + 1 + last), H // 2 ** (i + 1), W // 2 ** (i + 1))))
        if i:
            merges.append(nf.flows.Merge())
    model = nf.MultiscaleFlow(bases, chains, merges, class_cond=False)
    return theirs(model, model.forward_kld, images(), image_flow(), 0.05)


def pairs() -> Iterator[Pair]:
    """Both flows against those who have them, in float32 and, where the work is enough for it to pay, in bfloat16."""
    for width in (64, 256):
        step, flow = f"coupling flow step, width {width}", functools.partial(vector_flow, width)
        for peer, build, equal, best in (
            ("normflows", by_normflows, 1.15, 1.6),
            ("nflows", by_nflows, 1.4, 2.0),
            ("zuko", by_zuko, 1.5, 2.1),
        ):
            peers = functools.partial(build, width)
            yield Pair(step, peer, ours(flow, vectors, False), peers, equal)
            if width == 256:
                yield Pair(step, peer, ours(flow, vectors, True), peers, best, "best")
    yield Pair("Glow step", "normflows", ours(image_flow, images, False), glow_by_normflows, 1.3)
    yield Pair("Glow step", "normflows", ours(image_flow, images, True), glow_by_normflows, 1.6, "best")
