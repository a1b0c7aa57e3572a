"""Every example meets its own class: in the families, in training, in scoring.

A conditional model is a function of pairs (x, y). Permuting pairs permutes its outputs and changes no mean over them, whereas
permuting the classes alone makes other pairs with other outputs. A class that is flipped, rolled or cut wrongly anywhere on the
way breaks the first.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.data.dataset import DataSet, Split
from genzoo.data.loader import Batches
from genzoo.diffusion.denoiser import Denoiser
from genzoo.distributions.discretization import dequantize, quantize, to_bytes
from genzoo.evaluation import density
from genzoo.evaluation import scores as score
from genzoo.evaluation.samples import subset
from genzoo.evaluation.settings import EvalSettings
from genzoo.event import EventSpec
from genzoo.metrics.likelihood import score_log_prob
from genzoo.model import (
    Bound,
    Codec,
    Continuous,
    Density,
    GenerativeModel,
    LatentVariable,
    LogProb,
    Loss,
    Samples,
)
from genzoo.numerics.random import SampleStreams, generator
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule
from tests.test_interface import draws, every, objectives
from tests.toys import Toy

# The first stays where it is: what belongs to no example is drawn from its stream.
ORDER = torch.tensor([0, 3, 1, 4, 2])
CLASSES = torch.tensor([0, 1, 1, 0, 1])
ALONE = torch.tensor([1, 0, 1, 0, 0])  # of CLASSES all but the third and the fourth are other ones
CHANGED = CLASSES != ALONE


def pairs(model: GenerativeModel) -> Tensor:
    rng = generator("pairs")
    if model.levels is None:
        return torch.randn(5, *model.shape, generator=rng).double()
    return dequantize(torch.randint(model.levels, (5, *model.shape), generator=rng), model.levels, rng).double()


def streams(rows: Tensor) -> SampleStreams:
    return SampleStreams(11, rows.tolist())


def check(say, per_example: bool = True) -> None:
    """Compare what is said of pairs with what is said of them in another order, and with other classes.

    Args:
        say: takes the numbers of the examples and the class of each.
        per_example: whether it says something of each of them, or a mean.
    """
    rows = torch.arange(5)
    said, ordered, other = say(rows, CLASSES), say(ORDER, CLASSES[ORDER]), say(rows, ALONE)
    torch.testing.assert_close(ordered, said[ORDER] if per_example else said, rtol=1e-7, atol=1e-8)
    gap = (other - said).abs()
    if per_example:
        gap = gap.flatten(1).amax(1) if gap.ndim > 1 else gap
        assert bool((gap[CHANGED] > 1e-7).all()), "a class makes no difference"
        torch.testing.assert_close(other[~CHANGED], said[~CHANGED], rtol=1e-7, atol=1e-8)
    else:
        assert gap > 1e-8, "classes make no difference"


@every(conditional=True, captioned=False)
def test_the_loss_is_one_of_pairs(case):
    model = case.model().double().train()
    x = pairs(model)
    for i, (part, turn) in enumerate(objectives(model)):
        if part.condition:

            def say(rows: Tensor, y: Tensor, i: int = i, turn: dict[str, str] = turn) -> Tensor:
                again = list(objectives(copy.deepcopy(model)))[i][0]  # layers may move averages of their own
                return again.loss(x[rows], y, rng=streams(rows), **turn).total.detach()

            check(say, per_example=False)


@every(Density, conditional=True, captioned=False)
def test_the_density_of_a_pair_is_its_own(case):
    model = case.model().double()
    x = pairs(model)
    settled = {"num_samples": draws(model)}
    for settings in (settled,) if Bound.ESTIMATE in model.bound else ({}, settled):
        check(lambda rows, y, settings=settings: model.log_prob(x[rows], y, rng=streams(rows), **settings).value)


@every(conditional=True, captioned=False)
def test_a_sample_is_one_of_the_class_that_was_asked_for_it(case):
    model = case.model().double()
    if model.levels is not None and not isinstance(model, Denoiser):
        # Where samples are integers a class may leave some of them as they are: what they are drawn from is decoded below.
        rows = torch.arange(5)
        said = [model.sample(5, y, rng=streams(r)).x for r, y in ((rows, CLASSES), (ORDER, CLASSES[ORDER]))]
        near = (said[1] - said[0][ORDER]).abs() < 1e-6
        assert near.double().mean() > 0.99
        return
    check(lambda rows, y: model.sample(5, y, rng=streams(rows)).x)


@every(Codec, conditional=True, captioned=False)
def test_a_codec_encodes_and_decodes_pairs(case):
    model = case.model().double()
    x = pairs(model)
    z = torch.randn(5, *model.latent.shape, generator=generator("z")).double()
    if isinstance(model.latent, Continuous):
        check(lambda rows, y: model.decode(z[rows], y))
        if isinstance(model, LatentVariable):
            check(lambda rows, y: model.infer(x[rows], y, rng=streams(rows)).z)
            check(lambda rows, y: model.log_likelihood(x[rows], z[rows], y))
            check(lambda rows, y: model.generate(z[rows], y, rng=streams(rows)))


# Training and scoring


class Matched(Toy, Density, Codec):
    """Refuses every event that does not come with its own class, which its first number says."""

    bound, latent = Bound.EXACT, Continuous((1, 2, 2))

    def __init__(self):
        super().__init__(EventSpec((1, 2, 2), levels=64), ClassLabels(7))
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []  # the events, by number

    def check(self, x: Tensor, y: Tensor | None) -> None:
        number = quantize(x, 64)[:, 0].amax((1, 2))  # of images, also of mirrored ones
        assert y is not None and y.tolist() == (number % 7).tolist(), "another event's class"
        self.seen += number.tolist()

    def _loss(self, x, y, rng):
        self.check(x, y)
        return Loss(self.weight * x.mean(), {"zero": self.weight.detach()})

    def _log_prob(self, x, y, num_samples, rng):
        self.check(x, y)
        return LogProb(torch.full((len(x),), -3.0))

    def _encode(self, x, y):
        self.check(x, y)
        return x

    def _decode(self, z, y):
        self.check(z, y)
        return z

    def _sample(self, n, y, rng):
        return Samples((2 * (y + 0.5) / 64 - 1).view(-1, 1, 1, 1).expand(n, *self.shape), 1)


def split(n: int) -> Split:
    """Images whose largest number says which they are, and unlike their mirror images."""
    x = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(n, dtype=torch.uint8)
    return Split(x, torch.arange(n) % 7)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("workers", "world"), [(0, 1), (0, 3), (1, 1)])
def test_a_trainer_hands_every_example_over_with_its_class(flip, workers, world):
    """Over three epochs of 50 examples, whose ends lie within batches."""
    for rank in range(world):
        model = Matched()
        batches = Batches(split(50), 12, seed=1, flip=flip, workers=workers)
        batches.share(rank, world)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
        module = GenerativeModule(model, sgd, batches, Budget(images=156))
        module.make_plan()
        model.seen.clear()
        while not module.finished:
            module.step()
        assert len(model.seen) >= 156 // world
        assert len(set(model.seen)) == 50 or world > 1


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
@pytest.mark.parametrize("events", [None, 23])
def test_an_evaluator_hands_every_example_over_with_its_class(batch_size, events):
    data = DataSet(split(50), split(40), 64, tuple("abcdefg"))
    settings = EvalSettings(events=events, num_samples=1, batch_size=batch_size, n=30, throughput=2)
    for measure in (density.likelihood, density.reconstruction):
        model = Matched()
        measure(model, data, settings, {"seed": 0})
        assert sorted(set(model.seen)) == subset(40, events).tolist()
        assert len(model.seen) % len(subset(40, events)) == 0
    # The classes that samples are scored by are those that they were drawn by.
    x, y, _ = score.draw(Matched(), 30, batch_size, 0)
    assert len(set(y.tolist())) > 3
    assert torch.equal(x, to_bytes((2 * (y + 0.5) / 64 - 1).view(-1, 1, 1, 1).expand(30, 1, 2, 2), 64))


def test_bits_per_dimension_of_a_conditional_model_are_those_of_its_own_dimensions():
    """By hand: -3 nats of 4 numbers of 64 levels are 3/(4 ln 2) + log2 32 = 6.082 bits each."""
    model = Matched()
    name, found = score_log_prob(model, split(10).x, split(10).y, batch_size=3)
    assert name == "bpd" and found.n == 10
    assert found.value == pytest.approx(3 / (4 * math.log(2)) + 5, rel=1e-6) == pytest.approx(6.0820, abs=1e-4)
    assert found.stderr == pytest.approx(0, abs=1e-7)
