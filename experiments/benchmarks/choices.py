"""What the choices inside genzoo pay on this machine: each beside the other way to do it, both of torch.

Steps are those of a VAE and of a U-Net's DDPM as the trainer does them. A ratio below its target means that the choice does not
hold here, and should be looked at again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from run import Go, Pair
from torch import nn

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.distributions.likelihoods import DiscretizedLogistic
from genzoo.families.ddpm import DDPM
from genzoo.families.vae import VAE
from genzoo.model import GenerativeModel
from genzoo.nn.layers import UpsampleConv2d, attend
from genzoo.nn.resnet import ConvDecoder, ConvEncoder
from genzoo.nn.unet import UNet
from genzoo.training.budget import Budget
from genzoo.training.ema import EMA
from genzoo.training.module import GenerativeModule

SHAPE, BATCH = (1, 28, 28), 32
ADAM = functools.partial(torch.optim.Adam, lr=1e-4, fused=True)


def vae() -> GenerativeModel:
    return VAE(SHAPE, encoder=ConvEncoder, decoder=ConvDecoder, likelihood=DiscretizedLogistic(256), levels=256)


def ddpm() -> GenerativeModel:
    return DDPM(SHAPE, network=functools.partial(UNet, channels=32, multipliers=(1, 2), attention=[14]), levels=256)


def step(
    family: Callable[[], GenerativeModel], bfloat16: bool = False, channels_last: bool = False, threads: int = 1
) -> Go:
    """Train as the trainer does."""
    torch.manual_seed(0)
    images = torch.randint(256, (512, *SHAPE), dtype=torch.uint8)
    model = family()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    batches = Batches(Split(images, None), BATCH, seed=0)
    module = GenerativeModule(model, ADAM, batches, Budget(images=10**9), clip=1.0, channels_last=channels_last)
    module.make_plan()

    def go() -> None:
        torch.set_num_threads(threads)
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            module.step()

    return go


def adam(**how: bool) -> Go:
    """Move the weights of a U-Net."""
    parameters = list(ddpm().parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    return torch.optim.Adam(parameters, lr=1e-4, **how).step


def averaged_by_genzoo() -> Go:
    model = ddpm()
    ema = EMA(model, 0.999)
    ema.watch("all", model)
    return lambda: ema.update("all")


def averaged_by_torch() -> Go:
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    model = ddpm()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.999))
    return lambda: average.update_parameters(model)


def attention(way: Callable[..., torch.Tensor], dtype: torch.dtype) -> Go:
    """Attend among the 256 places of a 16x16 map, forward and backward."""
    tokens = [torch.randn(16, 4, 256, 32, dtype=dtype, requires_grad=True) for _ in range(3)]
    return lambda: way(*tokens).float().sum().backward()


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("bhqc,bhkc->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bhkc->bhqc", weights.softmax(dim=-1), v)


def doubled(literal: bool) -> Go:
    """Scale an image up and convolve it, forward and backward."""
    torch.manual_seed(0)
    layer, x = UpsampleConv2d(64, 64), torch.randn(16, 64, 16, 16, requires_grad=True)

    def scaled_up() -> torch.Tensor:
        return nn.Conv2d.forward(layer, F.interpolate(x, scale_factor=2)) if literal else layer(x, (32, 32))

    other = copy.deepcopy(layer)
    assert torch.allclose(other(x, (32, 32)), nn.Conv2d.forward(other, F.interpolate(x, scale_factor=2)), atol=1e-5)
    return lambda: scaled_up().sum().backward()


def pairs() -> Iterator[Pair]:
    """Each choice, and what it is chosen over."""
    bind = functools.partial
    for family in (vae, ddpm):
        name = family.__name__
        # One side has tuned its allocator, as every command of genzoo does, and the other has not.
        yield Pair(
            f"glibc keeps freed blocks, step of {name}", "as glibc is", bind(step, family), bind(step, family), 1.0
        )
        half, whole = bind(step, family, bfloat16=True), bind(step, family)
        yield Pair(f"bfloat16, step of {name}", "float32", half, whole, 1.2, "best")
    tall = bind(step, ddpm, bfloat16=True, channels_last=True)
    yield Pair("channels first in bfloat16 on a CPU, step of ddpm", "channels last", half, tall, 1.0, "best")
    yield Pair("fused Adam", "one weight after the other", bind(adam, fused=True), bind(adam, foreach=False), 1.5)
    yield Pair("fused Adam", "foreach", bind(adam, fused=True), bind(adam, foreach=True), 1.5)
    yield Pair("average of the weights in one call", "AveragedModel", averaged_by_genzoo, averaged_by_torch, 1.0)
    fused = bind(attention, attend, torch.float32)
    yield Pair("fused attention, float32", "einsum and softmax", fused, bind(attention, by_einsum, torch.float32), 1.0)
    plain, kernel = (bind(attention, way, torch.bfloat16) for way in (attend, F.scaled_dot_product_attention))
    yield Pair("attention by plain products, bfloat16 on a CPU", "fused attention", plain, kernel, 1.0, "best")
    literal = bind(doubled, True)
    yield Pair("doubled pixels multiplied once", "scaled up, then convolved", bind(doubled, False), literal, 1.5)
    two, one = bind(step, ddpm, threads=2), bind(step, ddpm)
    yield Pair("two threads on two free cores, step of ddpm", "one thread", two, one, 1.3, measure="seconds")
