"""The stream of batches: every example once an epoch, and a batch that is a function of the seed and its step alone."""

from __future__ import annotations

import math
import types

import pytest
import torch

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches


def numbered(n: int, side: int = 2) -> Split:
    """Make images that show what befell them: the left column holds 2 i, the others 2 i + 1; the class is i."""
    index = torch.arange(n, dtype=torch.int32).view(n, 1, 1, 1)
    x = 2 * index + (torch.arange(side) > 0)
    return Split(x.expand(n, 1, side, side).contiguous(), torch.arange(n))


def index(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0, 0, 0] // 2


def mirrored(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0, 0, 0] % 2 == 1


@pytest.mark.parametrize("size, batch_size", [(10, 3), (10, 5), (7, 7), (5, 13), (1, 4), (12, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_every_example_comes_once_in_every_epoch_across_full_batches(size, batch_size, flip):
    batches, epochs = Batches(numbered(size), batch_size, seed=3, flip=flip), 6
    steps = math.ceil(epochs * size / batch_size)
    drawn = [batches(step) for step in range(steps)]
    assert all(len(x) == len(y) == batch_size for x, y in drawn)
    stream = torch.cat([index(x) for x, _ in drawn])[: epochs * size].view(epochs, size)
    assert torch.equal(stream.sort(1).values, torch.arange(size).expand(epochs, size))
    if size > 5:
        assert len({tuple(epoch.tolist()) for epoch in stream}) == epochs, "every epoch has an order of its own"


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_a_function_of_its_step(flip):
    stream, steps = Batches(numbered(10), 4, seed=1, flip=flip), range(12)
    expected = [stream(step) for step in steps]
    state = torch.get_rng_state()
    for step in (11, 0, 7, 7, 3):
        torch.manual_seed(step)
        for again in (stream(step), Batches(numbered(10), 4, seed=1, flip=flip)(step)):
            assert all(torch.equal(a, b) for a, b in zip(again, expected[step], strict=True))
    torch.set_rng_state(state)
    stream(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_batch_size_cuts_one_and_the_same_stream():
    def stream(batch_size: int, steps: int) -> torch.Tensor:
        batches = Batches(numbered(9), batch_size, seed=1, flip=True)
        return torch.cat([batches(step)[0] for step in range(steps)])

    assert torch.equal(stream(3, 12), stream(4, 9))
    assert torch.equal(stream(3, 12), stream(36, 1))


def test_seeds_differ_in_order_and_in_flips():
    first, second = (Batches(numbered(64), 64, seed=seed, flip=True)(0)[0] for seed in (0, 1))
    assert not torch.equal(index(first), index(second))
    by_example = [mirrored(x)[index(x).argsort()] for x in (first, second)]
    assert 16 < int((by_example[0] != by_example[1]).sum()) < 48


def test_half_of_the_images_are_mirrored_anew_in_every_epoch():
    size, epochs = 500, 8
    batches = Batches(numbered(size), size, seed=5, flip=True)
    flips = torch.stack([mirrored(x)[index(x).argsort()] for x, _ in map(batches, range(epochs))]).double()
    error = 0.5 / math.sqrt(size * epochs)
    assert abs(float(flips.mean()) - 0.5) < 4 * error
    # Independent between epochs: the correlation of any two is that of coins.
    correlations = torch.corrcoef(flips)[*torch.triu_indices(epochs, epochs, 1)]
    assert float(correlations.abs().max()) < 4 / math.sqrt(size)


def test_a_mirrored_image_is_the_image_mirrored_and_keeps_its_class():
    split = Split(torch.arange(40, dtype=torch.uint8).view(5, 2, 2, 2), torch.arange(5))
    seen = set()
    batches = Batches(split, 5, seed=0, flip=True)
    for step in range(6):
        for image, label in zip(*batches(step), strict=True):
            original = split.x[label]
            was_flipped = not torch.equal(image, original)
            assert torch.equal(image, original.flip(-1) if was_flipped else original)
            seen.add(was_flipped)
    assert seen == {False, True}


def test_without_flips_data_come_as_they_are_in_their_own_type():
    x, _ = Batches(Split(torch.arange(8, dtype=torch.uint8).view(4, 1, 1, 2), None), 4, seed=0)(0)
    assert x.dtype == torch.uint8 and sorted(x.flatten(1).tolist()) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_data_without_classes_give_none():
    assert Batches(Split(torch.zeros(3, 2), None), 2, seed=0)(0)[1] is None


def test_moving_the_data_changes_no_batch():
    batches = Batches(numbered(10), 4, seed=1, flip=True)
    before = batches(3)
    batches.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(batches(3), before, strict=True))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_empty_batch_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"at least 1, not {batch_size}"):
        Batches(numbered(3), batch_size, seed=0)


@pytest.mark.parametrize("cause", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no socket")])
def test_a_worker_that_dies_while_it_sends_a_batch_is_named_like_one_that_died_before(cause):
    class Broken:
        _workers = (
            types.SimpleNamespace(pid=7, is_alive=lambda: True),
            types.SimpleNamespace(pid=8, is_alive=lambda: False),
        )

        def __next__(self):
            raise cause

    batches = Batches(Split(torch.zeros(8, 2), None), 4, seed=0, workers=2)
    batches._prefetched = lambda step: Broken()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid 8\) died while sending a batch"):
        batches(0)
