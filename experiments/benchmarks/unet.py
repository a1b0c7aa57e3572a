"""Evaluation of a U-Net while sampling, 32x32, beside the U-Nets of three peers; and these networks, for `diffusion.py`.

Those of torchcfm and diffusers are genzoo's, layer by layer. That of denoising-diffusion-pytorch has another plan; the one of
genzoo's beside it has as many weights, and takes as many multiplications where doubled pixels are multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from run import Go, Pair
from torch import Tensor, nn

from genzoo.diffusion.denoiser import Denoiser
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import FlowMatching
from genzoo.nn.unet import UNet

SHAPE = (3, 32, 32)
BATCH = 16
CHANNELS = 32


def torchcfms() -> nn.Module:
    from torchcfm.models.unet.unet import UNetModelWrapper

    return UNetModelWrapper(  # as examples/images/cifar10/train_cifar10.py, which has 128 channels and a level more
        dim=SHAPE,
        num_res_blocks=2,
        num_channels=CHANNELS,
        channel_mult=[1, 2, 2],
        num_heads=4,
        num_head_channels=64,
        attention_resolutions="16",
        dropout=0.1,
    )


def diffusers() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(CHANNELS, 2 * CHANNELS, 2 * CHANNELS),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def lucidrains() -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=CHANNELS, dim_mults=(1, 2, 4), flash_attn=True)  # as the README, which has a level more


unet = partial(UNet, channels=CHANNELS, blocks=2)
OURS = {
    "torchcfm": partial(unet, multipliers=(1, 2, 2), attention=[16], head_channels=64, dropout=0.1),
    "diffusers": partial(unet, multipliers=(1, 2, 2), attention=[16], head_channels=8),
    "denoising-diffusion-pytorch": partial(unet, multipliers=(1, 2, 3), head_channels=32, scale_shift=True),
}
THEIRS = {"torchcfm": torchcfms, "diffusers": diffusers, "denoising-diffusion-pytorch": lucidrains}
CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {  # time is a number of [0, 1]
    "torchcfm": lambda network, x, t: network(t, x),
    "diffusers": lambda network, x, t: network(x, 999 * t).sample,
    "denoising-diffusion-pytorch": lambda network, x, t: network(x, (999 * t).expand(len(x))),
}


def their_network(peer: str) -> nn.Module:
    """Build a peer's network, and see that genzoo's has as many weights, to 2 per cent."""
    ours, theirs = OURS[peer](SHAPE, SHAPE), THEIRS[peer]()
    weights = [sum(p.numel() for p in network.parameters()) for network in (ours, theirs)]
    assert abs(weights[0] / weights[1] - 1) < 0.02, (peer, weights)
    return theirs


def ours(peer: str, bfloat16: bool) -> Go:
    """Ask a denoiser as samplers do, and as ``python -m genzoo sample precision=bf16-mixed`` has them do."""
    family = FlowMatching if peer == "torchcfm" else DDPM
    denoiser: Denoiser = family(SHAPE, network=OURS[peer], levels=256).eval()
    x, t = torch.randn(BATCH, *SHAPE), torch.full((BATCH,), 0.5, dtype=torch.float64)

    def go() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            denoiser.predict(x, t)

    return go


def theirs(peer: str) -> Go:
    """Ask a peer's network as its samplers do."""
    network = their_network(peer).eval()
    x, t = torch.randn(BATCH, *SHAPE), torch.tensor(0.5)
    mode = torch.inference_mode if peer == "denoising-diffusion-pytorch" else torch.no_grad
    return mode()(lambda: CALLS[peer](network, x, t))


def pairs() -> Iterator[Pair]:
    """Each peer twice."""
    targets = {"torchcfm": (1.0, 1.4), "diffusers": (1.0, 1.4), "denoising-diffusion-pytorch": (1.5, 2.2)}
    for peer, (alike, best) in targets.items():
        name, other = "U-Net evaluation while sampling", partial(theirs, peer)
        yield Pair(name, peer, partial(ours, peer, False), other, alike)
        yield Pair(name, peer, partial(ours, peer, True), other, best, "best")
