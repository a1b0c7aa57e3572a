"""A step of diffusion with the whole recipe: pictures and flips, loss, gradients, their norm, the optimiser and the average.

Each peer does what its own script or trainer does for 32x32 pictures in memory, in one process.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from run import Go, Pair, Setting
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from unet import BATCH, OURS, SHAPE, their_network

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import FlowMatching
from genzoo.model import GenerativeModel
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule

COUNT = 2_000
FOREVER = 10**9  # steps


def bytes_of_pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)


def genzoo(family: Callable[..., GenerativeModel], peer: str, optimizer: Any, setting: Setting) -> Go:
    """Train as `genzoo train` does: with its step, in the precision that it picks."""
    torch.manual_seed(0)
    batches = Batches(
        Split(torch.from_numpy(bytes_of_pictures()).permute(0, 3, 1, 2).contiguous(), None), BATCH, 0, flip=True
    )
    model = family(SHAPE, network=OURS[peer], levels=256)
    module = GenerativeModule(model, partial(optimizer, fused=True), batches, Budget(images=FOREVER), clip=1.0)
    module.plan.planned_steps = FOREVER
    precision = MixedPrecision("bf16-mixed", "cpu") if setting == "best" else Precision()

    def step() -> None:
        with precision.train_step_context():
            module.step()

    return step


class Pictures(Dataset[Any]):
    """Pictures and classes as torchvision's CIFAR-10 gives them."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]):
        self.pictures, self.transform = bytes_of_pictures(), transform

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pictures[index])), 0


def endless(loader: DataLoader[Any]) -> Iterator[torch.Tensor]:
    while True:
        for x, _ in loader:
            yield x


def torchcfm() -> Go:
    """Train as examples/images/cifar10/train_cifar10.py and utils_cifar.py of torchcfm do, without helpers."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    augment = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    pictures = Pictures(transforms.Compose(augment))
    batches = endless(DataLoader(pictures, batch_size=BATCH, shuffle=True, drop_last=True))
    network = their_network("torchcfm")
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: min(step, 5000) / 5000)
    matcher = ConditionalFlowMatcher(sigma=0.0)

    def ema(source: torch.nn.Module, target: torch.nn.Module, decay: float) -> None:
        weights, averages = source.state_dict(), target.state_dict()
        for key in weights:
            averages[key].data.copy_(averages[key].data * decay + weights[key].data * (1 - decay))

    def step() -> None:
        optimizer.zero_grad()
        x1 = next(batches)
        x0 = torch.randn_like(x1)
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        vt = network(t, xt)
        loss = torch.mean((vt - ut) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema(network, average, 0.9999)

    return step


def diffusers() -> Go:
    """Train as examples/unconditional_image_generation/train_unconditional.py of diffusers does."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator()
    augment = [transforms.Resize(32), transforms.CenterCrop(32), transforms.RandomHorizontalFlip()]
    pictures = Pictures(transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]))
    network = their_network("diffusers")
    average = EMAModel(
        network.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=UNet2DModel,
        model_config=network.config,
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=FOREVER)
    loader = DataLoader(pictures, batch_size=BATCH, shuffle=True)
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    batches = endless(loader)

    def step() -> float:
        clean = next(batches)
        noise = torch.randn(clean.shape)
        times = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),)).long()
        noisy = noise_scheduler.add_noise(clean, noise, times)
        with accelerator.accumulate(network):
            loss = F.mse_loss(network(noisy, times).sample.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        average.step(network.parameters())
        return loss.detach().item()  # for its progress bar

    return step


def lucidrains() -> Go:
    """Let the trainer of denoising-diffusion-pytorch do step after step, without helpers."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as module

    folder = tempfile.TemporaryDirectory()
    for i, picture in enumerate(bytes_of_pictures()):
        Image.fromarray(picture).save(Path(folder.name, f"{i}.png"))
    diffusion = GaussianDiffusion(their_network("denoising-diffusion-pytorch"), image_size=32)
    with mock.patch.object(module, "cpu_count", return_value=0):
        trainer = Trainer(
            diffusion,
            folder.name,
            train_batch_size=BATCH,
            train_num_steps=0,
            save_and_sample_every=FOREVER,
            results_folder=folder.name,
            calculate_fid=False,
        )

    def step(_: Any = folder) -> None:  # which is kept as long as the step
        trainer.train_num_steps += 1
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # its progress bar
            trainer.train()

    return step


def pairs() -> Iterator[Pair]:
    """Each peer twice."""
    adam, adamw = torch.optim.Adam, torch.optim.AdamW
    pred_v = partial(DDPM, prediction="v")
    for peer, theirs, family, optimizer, targets in (
        ("torchcfm", torchcfm, FlowMatching, partial(adam, lr=2e-4), (1.10, 1.7)),
        ("denoising-diffusion-pytorch", lucidrains, pred_v, partial(adam, lr=1e-4, betas=(0.9, 0.99)), (1.25, 1.8)),
        ("diffusers", diffusers, DDPM, partial(adamw, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6), (1.03, 1.5)),
    ):
        settings: tuple[Setting, Setting] = ("float32", "best")
        for setting, target in zip(settings, targets, strict=True):
            ours = partial(genzoo, family, peer, optimizer, setting)
            yield Pair("diffusion step, 32x32 U-Net, whole recipe", peer, ours, theirs, target, setting)
