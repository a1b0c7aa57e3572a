"""The rules of the interface, for every file under ``conf/model/``: a family that is added there is tested by existing.

Each family is composed as on the command line and built for points of the plane and for tiny images, with and without
classes; a family that takes neither is built for tiny images with captions. Only sizes are shrunk. Which rules apply follows
from a model's abilities, never from its name; weights are moved away from their first values, which are zero in many last
layers and would hide much.

A density is compared with its samples by quadrature: the mass that it gives a region must be the share of its samples that
fall there where it is exact, and at most 1 where it is a lower bound, after a short training that tightens the bound.
"""

from __future__ import annotations

import ast
import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import genzoo
from genzoo.conditions import ClassLabels, Conditioner, Tokens
from genzoo.config.compose import preflight
from genzoo.config.instantiate import build
from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.path import PARAMETERIZATIONS, Prediction
from genzoo.distributions.discretization import bin_center, dequantize, quantize
from genzoo.errors import UsageError
from genzoo.jobs.building import describe_model
from genzoo.latents import interpolate
from genzoo.model import (
    Adversarial,
    Bijective,
    Bound,
    Codec,
    Continuous,
    Decoder,
    Density,
    Discrete,
    GenerativeModel,
    Staged,
    reconstruct,
)
from genzoo.numerics.random import SampleStreams, generator
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule
from tests.captions import SQUARES, squares
from tests.conftest import CAPTIONED, FAMILIES, composed
from tests.toys import Relay

# The largest value that a size may keep; a key that a family does not have is not asked for.
SMALL = {
    "width": 16, "max_width": 16, "channels": 8, "depth": 1, "blocks": 1, "couplings": 4, "latent_dim": 2,
    "num_steps": 50, "steps": 5, "dropout": 0.0, "layers": 2, "num_layers": 2, "embedding_dim": 16, "codebook_size": 8,
    "downsampling": 2, "sampling_steps": 20, "head_channels": 8, "text_width": 16, "text_layers": 1, "bins": 3,
}  # fmt: skip
TINY = {**SMALL, "scales": 1, "tolerance": 1e-5}  # for an event of 2x2 pixels
DATA = {"plane": ["data=moons"], "image": ["data=digits"]}
SIZES = {"plane": {**SMALL, "tolerance": 1e-5}, "image": {**SMALL, "tolerance": 1e-2}, "tiny": TINY}
TINY_EVENT = ["data=digits", "data.shape=[1,2,2]", "data.levels=2"]


def shrunk(node: Any, sizes: dict[str, float]) -> Any:
    """Cut every size of a model's configuration down to a test's."""
    if not isinstance(node, dict):
        return node
    cut = {name: shrunk(value, sizes) for name, value in node.items()}
    for name, limit in sizes.items():
        if name == "depth" and "codebook_size" in cut:  # codes of a position, not layers
            continue
        if isinstance(cut.get(name), (int, float)):
            # Of a solver's tolerance more is cheaper.
            cut[name] = max(cut[name], limit) if name == "tolerance" else min(cut[name], limit)
    return cut


@dataclass(frozen=True)
class Case:
    """A family on one kind of data, with or without classes."""

    family: str
    kind: str
    overrides: tuple[str, ...]
    conditional: bool

    @property
    def captioned(self) -> bool:
        """Whether its conditions are captions, in place of classes."""
        return self.family in CAPTIONED

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        classes = ["data.conditional=true"] if self.conditional else []
        config = composed(f"model={self.family}", *self.overrides, *classes)
        describe_model(config, build)
        return config

    def fresh(self, seed: int = 0) -> GenerativeModel:
        """Build the model with first weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(shrunk(self.config["model"], SIZES[self.kind]), "model")
        if isinstance(model.condition, Tokens):
            model.conditioner.fit(conditions(model, 60))
        # Random weights on high frequencies of the time make a drift so rough that no ODE solver could follow it.
        for name, buffer in model.named_buffers():
            if name.endswith("frequencies"):
                buffer *= 0.02
        return model

    @functools.cached_property
    def _moved(self) -> GenerativeModel:
        model, rng = self.fresh(), generator("perturbation", self.family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
        return model.eval()

    def model(self) -> GenerativeModel:
        """Return a new copy of the model with every weight moved away from where it starts."""
        return copy.deepcopy(self._moved)


@functools.cache
def cases(data: tuple[str, ...] | None = None) -> dict[str, tuple[Case, GenerativeModel | ValueError]]:
    """Try every family on every kind of data: the model, or the refusal."""
    found: dict[str, tuple[Case, GenerativeModel | ValueError]] = {}
    kinds = DATA if data is None else {"tiny": list(data)}
    for family in FAMILIES:
        for kind, overrides in kinds.items():
            for conditional in (False, True):
                case = Case(family, kind, tuple(overrides), conditional)
                name = f"{family}-{kind}" + ("-conditional" if conditional else "")
                try:
                    found[name] = case, case.fresh()
                except ValueError as refusal:
                    found[name] = case, refusal
        if data is None and not any(
            isinstance(model, GenerativeModel) for case, model in found.values() if case.family == family
        ):
            case = Case(family, "image", SQUARES, True)
            found[f"{family}-captions"] = case, case.fresh()
    return found


def every(ability: type = GenerativeModel, data: tuple[str, ...] | None = None, **wanted: Any):
    """Parametrise a test over the cases whose model has an ability."""
    chosen = {
        name: case
        for name, (case, model) in cases(data).items()
        if isinstance(model, ability) and all(getattr(case, key) == value for key, value in wanted.items())
    }
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


def objectives(model: GenerativeModel) -> Iterator[tuple[GenerativeModel, dict[str, str]]]:
    """List what training minimises: the stages of a model, and for each of them the turns, as arguments of the loss."""
    for part in [stage.module for stage in model.stages()] if isinstance(model, Staged) else [model]:
        for turn in part.networks() if isinstance(part, Adversarial) else [None]:
            yield part, {} if turn is None else {"turn": turn}


def own(part: GenerativeModel, y: Tensor | None) -> Tensor | None:
    """Return conditions for a part of a model that has a condition, None for one without."""
    return y if part.condition else None


def batch(model: GenerativeModel, n: int = 6, name: str = "batch") -> tuple[Tensor, Tensor | None]:
    """Make up data of a model's own kind, and classes where it has any."""
    rng = generator(name)
    if model.levels is None:
        x = torch.randn(n, *model.shape, generator=rng)
    else:
        x = dequantize(torch.randint(model.levels, (n, *model.shape), generator=rng), model.levels, rng)
    return x.to(model.dtype), conditions(model, n)


def conditions(model: GenerativeModel, n: int) -> Tensor | None:
    """Make up classes or tokens, of which the first is 0."""
    if isinstance(model.condition, Tokens):
        rows = torch.arange(n)[:, None]
        return (3 * rows + torch.arange(model.condition.length)) % model.condition.vocabulary
    return torch.arange(n) % model.condition.n if model.condition else None


def streams(n: int, start: int = 0) -> SampleStreams:
    return SampleStreams(7, range(start, start + n))


# What a configuration makes


@pytest.mark.parametrize("name", cases())
def test_a_configuration_makes_a_model_of_its_data_or_refuses_in_one_line(name):
    case, model = cases()[name]
    if isinstance(model, ValueError):
        assert isinstance(model, UsageError), f"a refusal must be a ValueError of the family, through build: {model!r}"
        assert str(model).startswith("model") and "\n" not in str(model)
        return
    data = case.config["data"]
    assert model.shape == tuple(data["shape"]) and model.levels == data["levels"]
    classes = ClassLabels(data["num_classes"]) if case.conditional and data["num_classes"] else None
    assert model.condition == (squares().condition if case.overrides == SQUARES else classes)


def test_every_family_takes_some_data():
    takes = {case.family for case, model in cases().values() if isinstance(model, GenerativeModel)}
    assert takes == set(FAMILIES)


# loss


@every()
def test_the_loss_is_a_scalar_that_moves_every_parameter(case):
    model = case.model().train()
    x, y = batch(model, 24)  # of which some conditions are dropped
    for part, turn in objectives(model):
        total, terms, _ = part.loss(x, own(part, y), rng=generator("loss"), **turn)
        assert total.shape == () and total.isfinite()
        assert terms and all(term.shape == () and not term.requires_grad for term in terms.values())
        total.backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still


@every()
def test_the_generator_alone_decides_the_loss(case):
    model = case.model().train()
    x, y = batch(model)

    def losses(seed: int) -> list[float]:
        again = copy.deepcopy(model)  # a loss may move averages of its own
        return [
            part.loss(x, own(part, y), rng=generator(seed), **turn).total.item() for part, turn in objectives(again)
        ]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = losses(5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(2)
    assert losses(5) == first


@every()
def test_classes_are_refused_where_there_are_none_and_demanded_where_there_are(case):
    model = case.model()
    x, y = batch(model)
    wrong: list[Tensor | None] = [torch.zeros(len(x), dtype=torch.int64)]
    if model.condition:
        wrong = [None, y[:-1], y.float(), y - 1, model.condition.null(y)]
    for bad in wrong:
        for part, turn in objectives(model):
            if part.condition == model.condition:
                with pytest.raises(ValueError, match="y must"):
                    part.loss(x, bad, **turn)
        if isinstance(model, Density):
            with pytest.raises(ValueError, match="y must"):
                model.log_prob(x, bad)
        if bad is not None:
            with pytest.raises(ValueError, match="y must"):
                model.sample(len(x), bad)


# sample


@every()
def test_samples_are_events_on_the_scale_of_the_data(case):
    model = case.model()
    for n in (0, 1, 4):
        x, nfe, _ = model.sample(n, rng=generator("shape"))
        assert x.shape == (n, *model.shape) and x.dtype == model.dtype and not x.requires_grad
        assert isinstance(nfe, int) and nfe > 0
        assert bool(x.isfinite().all())
        if model.levels is not None and n:
            # A flow that squeezes [-1, 1] to [.05, .95] before its logit may land at most this far outside.
            assert x.abs().max() <= 10 / 9 + 1e-5


@every()
def test_sample_i_depends_on_seed_and_i_alone(case):
    model = case.model().double()  # in single precision kernels round by the size of a batch
    whole = model.sample(8, rng=streams(8)).x
    parts = torch.cat([model.sample(3, rng=streams(3)).x, model.sample(5, rng=streams(5, start=3)).x])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.sample(8, rng=streams(8)).x, whole)
    assert (whole[1:] - whole[:-1]).flatten(1).abs().amax(1).min() > 0, "two samples are the same"


@every(conditional=True)
def test_a_conditional_model_draws_the_conditions_it_was_not_told_from_their_frequencies(case, monkeypatch):
    model, drawn = case.model(), torch.tensor([1, 0, 1, 1])
    if isinstance(model.condition, Tokens):
        chosen = [model.conditioner.examples[i] for i in (drawn, 1 - drawn)]
        monkeypatch.setattr("genzoo.conditions.randint", lambda high, shape, **_: drawn if high == 60 else None)
        x = model.sample(4, rng=generator("classes")).x
        assert torch.equal(x, model.sample(4, chosen[0], rng=generator("classes")).x)
        assert not torch.equal(x, model.sample(4, chosen[1], rng=generator("classes")).x)
        return
    probs = model.conditioner.probs
    probs.copy_(torch.linspace(1, 2, len(probs)) / 1.5 / len(probs))
    asked = []

    def draw(probs: Tensor, n: int, *, rng: torch.Generator | None) -> Tensor:
        asked.append((probs.clone(), n))
        return drawn

    monkeypatch.setattr("genzoo.conditions.categorical", draw)
    x = model.sample(4, rng=generator("classes")).x
    assert len(asked) == 1 and torch.equal(asked[0][0], probs) and asked[0][1] == 4
    assert torch.equal(x, model.sample(4, drawn, rng=generator("classes")).x)
    assert not torch.equal(x, model.sample(4, 1 - drawn, rng=generator("classes")).x)


def test_classes_are_drawn_as_often_as_they_occur():
    conditioner, n = Conditioner(ClassLabels(4)), 20_000
    probs = torch.tensor([0.5, 0.2, 0.0, 0.3])
    conditioner.probs.copy_(probs)
    share = torch.bincount(conditioner.draw(n, None, generator("frequencies")), minlength=4) / n
    assert share[2] == 0
    assert bool(((share - probs).abs() <= 4 * (probs * (1 - probs) / n).sqrt()).all())


# weights


@every()
def test_the_state_dict_holds_all_that_samples_depend_on(case):
    model, other = case.model(), case.fresh(seed=1).eval()
    assert not torch.equal(model.sample(4, rng=streams(4)).x, other.sample(4, rng=streams(4)).x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.sample(4, rng=streams(4)).x, other.sample(4, rng=streams(4)).x)


@every()
def test_a_deep_copy_samples_alike_and_shares_nothing(case):
    model = case.model()
    clone = copy.deepcopy(model)
    before = model.sample(4, rng=streams(4)).x
    assert torch.equal(clone.sample(4, rng=streams(4)).x, before)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.fill_(0.3)
    assert torch.equal(model.sample(4, rng=streams(4)).x, before)
    assert not torch.equal(clone.sample(4, rng=streams(4)).x, before)


@every()
def test_double_precision_computes_the_same_model(case):
    model = case.model()
    x, y = batch(model)
    single = [part.loss(x, own(part, y), rng=streams(len(x)), **turn).total for part, turn in objectives(model)]
    samples = model.sample(4, rng=streams(4)).x
    model.double()
    double = [
        part.loss(x.double(), own(part, y), rng=streams(len(x)), **turn).total for part, turn in objectives(model)
    ]
    assert all(loss.dtype == torch.float64 for loss in double)
    torch.testing.assert_close(torch.stack(double).float(), torch.stack(single), rtol=1e-3, atol=1e-4)
    precise = model.sample(4, rng=streams(4)).x
    assert precise.dtype == torch.float64
    near = (precise.float() - samples).abs() <= 1e-3 + 1e-3 * samples.abs()
    assert near.double().mean() > 0.9, "all but the few elements that a rounding may move to another level"


# Density


def midpoints(low: float, high: float, n: int, dim: int) -> tuple[Tensor, float]:
    """Midpoints of n^dim cells of a cube, float64, and the volume of a cell."""
    axis = low + (high - low) / n * (torch.arange(n, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(*[axis] * dim), ((high - low) / n) ** dim


def one_class(model: GenerativeModel, n: int) -> Tensor | None:
    return torch.ones(n, dtype=torch.int64) if model.condition else None


@torch.no_grad()
def mass(model: Density, low: float, high: float, n: int) -> float:
    """Integrate an exact density, or an estimated one by its exact trace, over a cube."""
    points, volume = midpoints(low, high, n, model.dim)
    total = 0.0
    for x in points.view(-1, *model.shape).split(20_000):
        total += float(model.log_prob(x, one_class(model, len(x)), num_samples=model.dim).value.exp().sum()) * volume
    return total


def unclipped(model: Density, n: int, rng: torch.Generator) -> Tensor:
    """Draw events; from their latents where the sampler of an estimated density may stop short or clamp them."""
    y = one_class(model, n)
    if model.bound is Bound.ESTIMATE and isinstance(model, Bijective):
        return model.decode(torch.randn(n, *model.latent.shape, generator=rng, dtype=model.dtype), y)
    return model.sample(n, y, rng=rng).x


@torch.no_grad()
def bounded_mass(model: Density, low: float, high: float, n: int, draws: int, **settings: Any) -> tuple[float, float]:
    """Integrate the exponential of a lower bound, estimated from many draws, over a cube; return it and its error.

    The bound is the expectation of ``log_prob``: draws are averaged before the exponential, whose convexity is
    corrected to second order.
    """
    points, volume = midpoints(low, high, n, model.dim)
    x = points.view(-1, *model.shape)
    rng, y = generator("bound"), one_class(model, len(x))
    values = torch.stack([model.log_prob(x, y, rng=rng, **settings).value for _ in range(draws)])
    variance = values.var(0) / draws
    density = (values.mean(0) - variance / 2).exp()
    return float(density.sum()) * volume, float((density.square() * variance).sum().sqrt()) * volume


def trained(case: Case, x: Tensor, steps: int = 120) -> GenerativeModel:
    """Train a model for a moment."""
    model, rng = case.fresh().train(), generator("training")
    y = one_class(model, len(x))
    for part, turn in objectives(model):
        part.initialize(x, y, rng=generator("training"))
        parameters = list(part.networks()[turn["turn"]].parameters() if turn else part.parameters())
        optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = part.loss(x, own(part, y), rng=rng, **turn)
            loss.total.backward()
            optimizer.step()
            part.after_step({key: value.detach() for key, value in loss.aux.items()}, len(x), rng=rng)
    return model.eval().double()


def draws(model: Density) -> int:
    """Several draws of a bound, or two probes of an estimate, each of which is a derivative at each evaluation."""
    return 2 if model.bound is Bound.ESTIMATE else 20


@every(Density)
def test_log_prob_is_a_number_for_each_event_and_its_error_is_not_negative(case):
    model = case.model()
    x, y = batch(model, 3)
    for settings in ({}, {"num_samples": draws(model)}):
        value, stderr = model.log_prob(x, y, rng=generator("error"), **settings)
        assert value.shape == (len(x),) and bool(value.isfinite().all())
        assert stderr is None or (stderr.shape == (len(x),) and bool((stderr >= 0).all()))
        again = model.log_prob(x, y, rng=generator("error"), **settings).value
        assert torch.equal(value, again)
        if model.bound is Bound.EXACT:
            assert stderr is None and torch.equal(value, model.log_prob(x, y, rng=generator("other")).value)


@every(Density)
def test_the_log_prob_of_an_event_does_not_depend_on_its_neighbours(case):
    model = case.model().double()
    x, y = batch(model, 4)

    def log_prob(rows: slice) -> Tensor:
        some = range(*rows.indices(len(x)))
        labels, rng = None if y is None else y[rows], SampleStreams(3, some)
        return model.log_prob(x[rows], labels, num_samples=draws(model), rng=rng).value

    torch.testing.assert_close(
        torch.cat([log_prob(slice(0, 1)), log_prob(slice(1, 4))]), log_prob(slice(0, 4)), rtol=1e-9, atol=1e-9
    )


@every(Density, overrides=tuple(DATA["plane"]))
def test_a_density_of_the_plane_integrates_to_one_and_a_lower_bound_to_less(case):
    model = case.model().double()
    if Bound.LOWER not in model.bound:
        reach = 1.5 * float(unclipped(model, 4000, generator("reach")).abs().max()) + 1
        assert mass(model, -reach, reach, 300 if model.bound is Bound.EXACT else 80) == pytest.approx(1, abs=1e-3)
        return
    # Four clusters, which no model can describe without its latents.
    centres = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0])).repeat(64, 1)
    model = trained(case, centres + 0.2 * torch.randn(256, 2, generator=generator("plane")))
    for settings in ({}, {"num_samples": 20}):
        total, error = bounded_mass(model, -4, 4, 48, draws=8, **settings)
        assert 0.1 < total <= 1 + 3 * error + 1e-3, "the bound is no bound, or so low that it says nothing"


@every(Density, data=tuple(TINY_EVENT), conditional=False)
def test_a_density_of_images_gives_the_cube_the_share_of_its_samples_that_fall_there(case):
    """All 2^4 images of two levels: a distribution of integers is constant on their bins, a flow is not and may leak out."""
    model = case.model().double()
    if Bound.LOWER not in model.bound:
        n, cells, slack = (4000, 12, 1e-3) if model.bound is Bound.EXACT else (500, 4, 0.04)  # an ODE costs more
        samples = unclipped(model, n, generator("cube"))
        share = float((samples.flatten(1).abs().amax(1) <= 1).double().mean())
        error = math.sqrt(share * (1 - share) / n)
        assert mass(model, -1, 1, cells) == pytest.approx(share, abs=4 * error + slack)
        return
    bits = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]]).repeat(16, 1).view(-1, 1, 2, 2)
    model = trained(case, dequantize(bits, 2, generator("bits")))
    for settings in ({}, {"num_samples": 20}):
        cells = 2 if constant_on_bins(model) else 8
        total, error = bounded_mass(model, -1, 1, cells, draws=6, **settings)
        assert 0 < total <= 1 + 3 * error + 1e-3


def constant_on_bins(model: Density) -> bool:
    """Whether a density of images is one of integers, so that one point stands for a bin."""
    x, y = batch(model)
    centre = bin_center(quantize(x, model.levels), model.levels, x.dtype)
    there, here = (model.log_prob(point, y, rng=generator("bins")).value for point in (x, centre))
    return torch.equal(there, here)


@every(Density, kind="plane", conditional=False)
def test_an_estimated_density_of_the_plane_agrees_with_the_exact_one_within_its_error(case):
    estimated(case)


@every(Density, data=tuple(TINY_EVENT), conditional=False)
def test_an_estimated_density_of_tiny_images_agrees_with_the_exact_one_within_its_error(case):
    estimated(case)


def estimated(case: Case, repeats: int = 150) -> None:
    model = case.model().double()
    if model.bound is not Bound.ESTIMATE:
        return
    # With as many draws as dimensions an estimate is exact, and says so.
    x, rng = batch(model, 2)[0], generator("probes")
    exact, none = model.log_prob(x, num_samples=model.dim)
    assert none is not None and not none.any()
    many = x.repeat_interleave(repeats, dim=0)
    once = model.log_prob(many, rng=rng).value.view(2, repeats)
    error = once.std(1) / math.sqrt(repeats)
    assert bool(((once.mean(1) - exact).abs() <= 4.5 * error + 1e-3).all())
    if model.dim > 2:
        several, stderr = (v.view(2, repeats) for v in model.log_prob(many, num_samples=model.dim - 1, rng=rng))
        torch.testing.assert_close(stderr.square().mean(1), several.var(1), rtol=0.4, atol=1e-6)


# Decoder, Codec, Bijective


def latents(model: Decoder, n: int) -> Tensor:
    rng = generator("latents")
    if isinstance(model.latent, Discrete):
        return torch.randint(model.latent.levels, (n, *model.latent.shape), generator=rng)
    return torch.randn(n, *model.latent.shape, generator=rng, dtype=model.dtype)


@every(Decoder)
def test_decoding_turns_each_latent_into_an_event_by_itself(case):
    model = case.model().double()
    z, y = latents(model, 5), batch(model, 5)[1]
    x = model.decode(z, y)
    assert x.shape == (5, *model.shape) and x.dtype == torch.float64
    alone = torch.cat([model.decode(z[i : i + 1], None if y is None else y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, x, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="y must"):
        model.decode(z, None if model.condition else torch.zeros(5, dtype=torch.int64))


@every(Decoder)
def test_interpolation_starts_and_ends_at_the_events_of_its_ends(case):
    model = case.model().double()
    start, end, y = latents(model, 6)[:3], latents(model, 6)[3:], batch(model, 3)[1]
    if not isinstance(model.latent, Continuous):
        with pytest.raises(ValueError, match="continuous"):
            interpolate(model, start, end, 4, y)
        return
    path = interpolate(model, start, end, 4, y)
    assert path.shape == (4, 3, *model.shape)
    torch.testing.assert_close(path[0], model.decode(start, y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(path[-1], model.decode(end, y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(interpolate(model, start, start, 3, y)[1], model.decode(start, y), rtol=1e-4, atol=1e-4)


@every(Codec)
def test_encoding_turns_each_event_into_a_latent_by_itself(case):
    model = case.model().double()
    x, y = batch(model, 5)
    z = model.encode(x, y)
    assert z.shape == (5, *model.latent.shape)
    if isinstance(model.latent, Discrete):
        assert z.dtype == torch.int64 and 0 <= int(z.min()) <= int(z.max()) < model.latent.levels
    alone = torch.cat([model.encode(x[i : i + 1], None if y is None else y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, z, rtol=1e-9, atol=1e-9)
    assert torch.equal(reconstruct(model, x, y), model.decode(z, y))


@every(Bijective)
def test_a_bijection_loses_nothing_and_knows_its_jacobian(case):
    bijection(case)


@every(Bijective, data=tuple(TINY_EVENT))
def test_a_bijection_of_tiny_images_does_so_too(case):
    bijection(case)


def bijection(case: Case) -> None:
    """To the rounding of a closed form, or to the tolerance of a solver where the map is that of an ODE."""
    model = case.model().double()
    solved = isinstance(model, Density) and Bound.ESTIMATE in model.bound
    # A tiny feature map whose norm divides by almost nothing magnifies the solver's errors.
    tolerance = {"plane": 2e-3, "tiny": 0.04, "image": 1.0}[case.kind] if solved else 1e-9
    x, y = batch(model, 3)
    if solved and case.kind == "tiny":
        model.rtol = model.atol = 1e-6
    z = model.encode(x, y)
    torch.testing.assert_close(model.decode(z, y), x, rtol=0, atol=tolerance)
    if solved and model.dim > 4:  # an exact trace takes as many derivatives as dimensions: tiny events stand for them
        assert (model.decode(z, y) - x).abs().mean() < 0.08
        return
    again, log_det = model.forward_and_log_det(x, y)
    torch.testing.assert_close(again, z, rtol=0, atol=tolerance if solved else 0.0)
    rows = [(x[i : i + 1], None if y is None else y[i : i + 1]) for i in range(len(x))]
    jacobians = differences(model, x, y) if solved else [derivatives(model, *row) for row in rows]
    for i, jacobian in enumerate(jacobians):
        _, expected = torch.linalg.slogdet(jacobian.view(model.dim, model.dim))
        assert float(log_det[i].detach()) == pytest.approx(
            float(expected), abs=(5 if solved else 1) * model.dim * tolerance
        )


def derivatives(model: Bijective, x: Tensor, y: Tensor | None) -> Tensor:
    """Jacobian of the latent by automatic differentiation."""
    return torch.autograd.functional.jacobian(lambda point: model.encode(point, y).flatten(), x, vectorize=True)


def differences(model: Bijective, x: Tensor, y: Tensor | None, h: float = 0.02) -> Tensor:
    """Jacobians of latents by central differences, (N, D, D), wide enough for the errors of a solver, which works once."""
    offsets = h * torch.eye(model.dim, dtype=x.dtype).view(-1, *model.shape)
    points = torch.stack([x[:, None] + offsets, x[:, None] - offsets])
    y = None if y is None else y.repeat_interleave(model.dim).repeat(2)
    after, before = model.encode(points.flatten(0, 2), y).view(2, len(x), model.dim, model.dim)
    return ((after - before) / (2 * h)).mT


# Denoiser


@every(Denoiser)
def test_all_parameterizations_of_a_denoiser_agree(case):
    model = case.model().double()
    x_t, y = batch(model, 5)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    c = model.path.schedule.at(t)
    alpha, sigma, d_alpha, d_sigma = (v.view(-1, *[1] * (x_t.ndim - 1)) for v in c)
    x0, eps, velocity = model.denoise(x_t, t, y), model.eps(x_t, t, y), model.velocity(x_t, t, y)
    close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
    close(alpha * x0 + sigma * eps, x_t)
    close(d_alpha * x0 + d_sigma * eps, velocity)
    if model.path.independent:
        close(-eps / sigma, model.score(x_t, t, y))
    for kind in PARAMETERIZATIONS if model.path.independent else PARAMETERIZATIONS[:-1]:
        said = Prediction(kind, model.path.convert(model.predict(x_t, t, y), x_t, t, kind))
        close(model.path.convert(said, x_t, t, "x0"), x0)
        close(model.path.convert(said, x_t, t, "eps"), eps)


@every(Denoiser)
def test_a_denoiser_is_finite_at_both_ends_of_the_path(case):
    model = case.model()
    x_t, y = batch(model, 3)
    questions = [model.denoise, model.eps, model.velocity, *([model.score] if model.path.independent else [])]
    for end in (0.0, 1.0):
        for question in questions:
            answer = question(x_t, torch.full((3,), end), y)
            assert answer.shape == x_t.shape and bool(answer.isfinite().all()), (question.__name__, end)


@every(Denoiser)
def test_nfe_is_how_often_the_network_worked_for_a_sample(case):
    model, rows = case.model(), {name: 0 for name, _ in case.model().named_children()}

    def count(name: str):
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            rows[name] += len(output)

        return hook

    for name, child in model.named_children():
        child.register_forward_hook(count(name))
    samples = model.sample(4, rng=generator("nfe"))
    assert max(rows.values()) == 4 * samples.nfe


@every(Denoiser, conditional=True)
def test_a_denoiser_without_a_class_takes_the_null_value(case):
    model = case.model()
    x_t, y = batch(model, 4)
    t = torch.full((4,), 0.5)
    null = model.condition.null(y)
    free = model.predict(x_t, t).mean
    assert torch.equal(free, model.predict(x_t, t, null).mean)
    assert (free - model.predict(x_t, t, y).mean).flatten(1).abs().amax(1).min() > 1e-6


# Adversarial, Staged


def in_training(model: GenerativeModel, steps: int) -> GenerativeModule:
    """Put a model into a trainer that plans a number of steps."""
    if model.levels is None:
        x = torch.randn(32, *model.shape, generator=generator("data"))
    else:
        x = torch.randint(model.levels, (32, *model.shape), generator=generator("data")).to(torch.uint8)
    y = conditions(model, 32)
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    module = GenerativeModule(model, adam, Batches(Split(x, y), 8, seed=0), Budget(images=8 * steps))
    module.make_plan()
    return module


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]


@every(Adversarial)
def test_players_share_no_weights_and_own_them_all(case):
    model = case.model()
    owned = [id(p) for part in model.networks().values() for p in part.parameters()]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match="turn must be"):
        model.loss(*batch(model), turn="nobody")


@every(Adversarial)
def test_a_turn_moves_the_weights_of_its_player_alone(case):
    model = case.model().train()
    module, seen = in_training(model, 12), set()
    for step in range(12):
        before = {name: snapshot(part) for name, part in model.networks().items()}
        module.step()
        turn = model.turn(step)
        seen.add(turn)
        for name, part in model.networks().items():
            change = moved(part, before[name])
            assert any(change) if name == turn else not any(change), (step, name)
    assert seen == set(model.networks())


STAGED = [*(case for case, model in cases().values() if isinstance(model, Staged)), None]


@pytest.mark.parametrize("case", STAGED, ids=lambda case: case.family if case else "toy")
def test_stages_share_the_budget_and_leave_earlier_weights_alone(case):
    model = (case.model() if case else Relay()).train()
    module = in_training(model, 16)
    stages = module.stages
    assert math.fsum(stage.fraction for stage in stages) == pytest.approx(1) and all(s.fraction > 0 for s in stages)
    assert len({stage.name for stage in stages}) == len(stages) > 1
    for i, stage in enumerate(stages):
        here, earlier = snapshot(stage.module), [snapshot(done.module) for done in stages[:i]]
        while not module.finished and module.stage_at(module.steps)[0].name == stage.name:
            module.step()
        assert any(moved(stage.module, here)), f"stage {stage.name} learned nothing"
        for done, before in zip(stages[:i], earlier, strict=True):
            assert not any(moved(done.module, before)), f"stage {stage.name} moved the weights of {done.name}"
    assert module.finished


# Words that would go around the abilities


def test_no_source_asks_for_attributes_or_families_by_name():
    for path in Path(genzoo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name):
                assert node.id not in ("hasattr", "NotImplementedError"), where
            if isinstance(node, ast.Compare):
                names = {getattr(side, "id", getattr(side, "attr", "")) for side in [node.left, *node.comparators]}
                assert not names & {"family", "model_name", "model_type"}, where


# Somebody else's family

DICE = """
import torch
from torch import nn

from genzoo.model import GenerativeModel, Loss, Samples
from genzoo.numerics.random import randn


class Dice(GenerativeModel):
    def __init__(self, event, condition=None, faces: int = 6):
        super().__init__(event, condition)
        if faces < 2:
            raise ValueError(f"faces must be at least 2, not {faces}")
        self.faces, self.centre = faces, nn.Parameter(torch.zeros(event.shape))

    def _loss(self, x, y, rng):
        total = (x - self.centre).square().mean()
        return Loss(total, {"mse": total.detach()})

    def _sample(self, n, y, rng):
        return Samples(self.centre + randn((n, *self.shape), rng=rng), 1)
"""
DICE_YAML = """
# @package _global_
model:
  _target_: somebody.dice.Dice
  faces: 6

optimizer:
  lr: 3e-3
"""


def test_a_family_of_another_package_needs_two_files(tmp_path, monkeypatch):
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "dice.py").write_text(DICE)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "dice.yaml").write_text(DICE_YAML)
    monkeypatch.syspath_prepend(str(tmp_path))
    here = str(tmp_path / "conf")

    words = ["model=dice", "data=moons", "model.faces=20"]
    preflight("train", words, here)
    config = composed(*words, config_dir=here)
    assert config["optimizer"]["lr"] == 3e-3
    describe_model(config, build)
    model = build(config["model"], "model")
    assert isinstance(model, GenerativeModel) and (model.shape, model.faces) == ((2,), 20)
    before = snapshot(model)
    in_training(model, 1).step()
    assert all(moved(model, before))

    with pytest.raises(UsageError, match="did you mean 'dice'"):
        preflight("train", ["model=dise", "data=moons"], here)
    with pytest.raises(UsageError, match="model: faces must be at least 2, not 1"):
        build({**config["model"], "faces": 1}, "model")
    with pytest.raises(UsageError, match=r"unknown key 'model\.face': did you mean 'faces'"):
        build({"face": 3, **{k: v for k, v in config["model"].items() if k != "faces"}}, "model")
    with pytest.raises(UsageError, match="not among the classes"):
        build(config["model"], "model", trusted=False)
