"""Batches of CIFAR-10's shape, mirrored half of the time, as points of [-1, 1]: a hundred of 128 images.

Without noise, as torchvision's users have them and as genzoo's families with a discrete likelihood see them; and with the
uniform noise that spreads each level over its bin, whose drawing is most of the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from run import Go, Pair
from torch.utils.data import DataLoader, Dataset, TensorDataset

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.distributions.discretization import bin_center, dequantize
from genzoo.numerics.random import seed_of

N, BATCH, STEPS = 12_800, 128, 100


def images() -> Split:
    rng = torch.Generator().manual_seed(0)
    return Split(torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8, generator=rng), torch.arange(N) % 10)


def consumed(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Take an epoch of batches, of the right shape."""
    for x, y in itertools.islice(batches, STEPS):
        assert x.shape == (BATCH, 3, 32, 32) and x.dtype == torch.float32 and y.shape == (BATCH,)


def by_genzoo(noise: bool) -> Callable[[], Go]:
    def build() -> Go:
        batches, steps = Batches(images(), BATCH, seed=0, flip=True), itertools.count()

        def draw() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
            for step in steps:  # as GenerativeModule does
                rng = torch.Generator().manual_seed(seed_of("noise", 0, step, 0))
                k, y = batches(step)
                yield dequantize(k, 256, rng) if noise else bin_center(k, 256), y

        return lambda: consumed(draw())

    return build


class Pictures(Dataset):
    """What torchvision's CIFAR10 is once it has read its files."""

    def __init__(self, transform: Callable[[object], torch.Tensor]):
        split = images()
        self.data: np.ndarray = split.x.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets, self.transform = split.y.tolist(), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def by_torchvision(workers: int) -> Callable[[], Go]:
    def build() -> Go:
        from torchvision import transforms

        half = (0.5, 0.5, 0.5)
        steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(half, half)]
        loader = DataLoader(Pictures(transforms.Compose(steps)), BATCH, shuffle=True, num_workers=workers)
        return lambda: consumed(loader)

    return build


def by_tensors(noise: bool) -> Callable[[], Go]:
    def build() -> Go:
        split = images()
        loader = DataLoader(TensorDataset(split.x, split.y), BATCH, shuffle=True)

        def draw() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for k, y in loader:
                mirrored = torch.rand(len(k), 1, 1, 1) < 0.5
                k = torch.where(mirrored, k.flip(-1), k)
                yield (k + torch.rand(k.shape)) / 128 - 1 if noise else k / 127.5 - 1, y

        return lambda: consumed(draw())

    return build


def pairs() -> Iterator[Pair]:
    """Pictures that are decoded one by one, without helpers and with two, and tensors that are mirrored a batch at once."""
    name = "data path, CIFAR-10-shaped, flips"
    ours = by_genzoo(noise=False)
    yield Pair(name, "torchvision, no workers", ours, by_torchvision(0), 60.0)
    yield Pair(name, "torchvision, 2 workers", ours, by_torchvision(2), 40.0, measure="seconds")
    yield Pair(name, "TensorDataset, flips by batch", ours, by_tensors(noise=False), 2.5)
    yield Pair(f"{name}, noise", "TensorDataset, flips by batch", by_genzoo(noise=True), by_tensors(noise=True), 2.5)
