"""Features that are right alone, crossed: conditions, kinds of data and the options of every family, new and resumed, in one
process and in two.

A crossing is an option of a family on points of three dimensions, on grey or on colour images, without a condition, with
classes, with vectors as conditions, or with captions where a family needs them. All are built as by the command line, small.
The laws hold whatever is combined: a gradient reaches every weight and every pixel, examples meet their own conditions, a
training that was interrupted ends in the bits of one that was not, two processes take the step of one, and samples have the
law of the data where it is known.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Codes, Condition, Joint, Tokens, Vector
from genzoo.config.instantiate import build
from genzoo.config.paths import CONF
from genzoo.data.dataset import DataSet, Split
from genzoo.data.loader import Batches
from genzoo.diffusion.denoiser import Denoiser, DenoiserWrapper, path_models
from genzoo.diffusion.flow_map import FlowMap
from genzoo.diffusion.path import Prediction
from genzoo.diffusion.samplers import Euler, Heun, Sampler
from genzoo.distributions.bounds import RateCost
from genzoo.distributions.discretization import bin_center, dequantize, quantize
from genzoo.distributions.likelihoods import DiscretizedLogistic, Gaussian, GaussianMixture, Likelihood, LogisticMixture
from genzoo.evaluation.describe import describe
from genzoo.evaluation.scores import evaluate_model, pick_network
from genzoo.evaluation.settings import EvalData, EvalSettings
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import FlowMatching
from genzoo.families.gan import GeneratorAndCritic
from genzoo.families.latent import PriorStage, _Latent
from genzoo.families.masked_diffusion import MaskedDiffusion
from genzoo.jobs.train import describe_model
from genzoo.loading import FROZEN, with_parents
from genzoo.model import Bound, Codec, Continuous, Density, GenerativeModel, Loss, Staged, frozen
from genzoo.nn.transformer import Transformer
from genzoo.numerics.random import SampleStreams, generator
from genzoo.training import checkpoints
from genzoo.training.budget import Budget, LearningRate
from genzoo.training.module import GenerativeModule
from tests.children import Child
from tests.conftest import CAPTIONED, composed
from tests.exact import network
from tests.shares import TIMEOUT, examine
from tests.test_conditions import values
from tests.test_interface import SIZES, TINY_EVENT, Case, bounded_mass, draws, objectives, shrunk

CONDITIONS: dict[str, Condition | None] = {"unconditional": None, "classes": ClassLabels(3), "vectors": Vector(3)}
CAPTIONS = {"captions": Tokens(5, 9)}  # of the families that need them
CONDITIONED = ("unclip",)  # families that need a condition
KINDS = {
    "points": ("data=moons", "data.shape=[3]"),
    "grey": ("data=digits", "data.shape=[1,4,4]"),
    "colour": ("data=digits", "data.shape=[3,4,4]"),
}
ALL, IMAGES, POINTS = tuple(KINDS), ("grey", "colour"), ("points",)

NETWORK, LIKELIHOOD, SCHEDULE = "network@model.network=", "likelihood@model.likelihood=", "schedule@model.schedule="
IAF = "posterior@model.posterior=iaf"
TEACHER, CODEC = "finished teacher", "finished codec"
# The options of each family, and the kinds of data that they apply to.
OPTIONS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "autoregressive": ("autoregressive", ALL, ()),
    "autoregressive-patch": ("autoregressive", IMAGES, ("model.patch=2",)),
    "autoregressive-classes": (
        "autoregressive", IMAGES, (f"{NETWORK}transformer_image", f"{LIKELIHOOD}categorical", "model.inputs=classes"),
    ),
    "ddpm": ("ddpm", ALL, ()),
    "ddpm-vlb": ("ddpm", ALL, ("model.objective=vlb", "model.variance=fixedsmall")),
    "ddpm-vlb-x0": ("ddpm", ALL, ("model.objective=vlb", "model.prediction=x0", f"{SCHEDULE}cosine")),
    "ddpm-vlb-learned": (
        "ddpm", ALL, ("model.objective=vlb", "model.variance=learned", "model.importance=true"),
    ),
    "ddpm-hybrid": ("ddpm", ALL, ("model.objective=hybrid", "model.variance=learned", "model.prediction=v")),
    "ddpm-hybrid-importance": (
        "ddpm", ALL, ("model.objective=hybrid", "model.variance=learned", "model.importance=true"),
    ),
    "ebm": ("ebm", ALL, ()),
    "ebm-metropolis": ("ebm", ALL, ("model.metropolis=true", "model.temperature=0.5", "model.data_noise=0.05")),
    "flow_matching": ("flow_matching", ALL, ()),
    "flow_matching-transport": ("flow_matching", ALL, ("model.pairing=optimal_transport",)),
    "flow_matching-reflow": ("flow_matching", ALL, (TEACHER,)),
    "mean_flow": ("mean_flow", ALL, ("model.ratio=0.7",)),
    "mean_flow-squared": ("mean_flow", ALL, ("model.power=0", "sampler.steps=3", "sampler.gamma=0.5")),
    "consistency": ("consistency", ALL, ()),
    "consistency-teacher": ("consistency", ALL, (TEACHER, "model.objective=distillation")),
    "consistency-ratio": (
        "consistency", ALL, (f"{SCHEDULE}vp", "time_pairs@model.time_pairs=ratio", "sampler.steps=3"),
    ),
    "flow_matching-vp": (
        "flow_matching", ALL, (f"{SCHEDULE}vp", "noise_levels@model.noise_levels=logit_normal"),
    ),
    "score_sde": ("score_sde", ALL, ()),
    "score_sde-edm": ("score_sde", ALL, (f"{SCHEDULE}edm", "noise_levels@model.noise_levels=log_normal")),
    "score_sde-sub_vp": ("score_sde", ALL, (f"{SCHEDULE}sub_vp", "model.sigma_data=null")),
    "score_sde-dit": ("score_sde", IMAGES, (f"{NETWORK}dit_image",)),
    "score_sde-ncsnpp": ("score_sde", IMAGES, (f"{SCHEDULE}ve", f"{NETWORK}ncsnpp_image", "model.network.multipliers=[1,2]")),
    "gan": ("gan", ALL, ()),
    "gan-hinge": ("gan", POINTS, ("model.loss=hinge",)),
    "gan-resnet": (
        "gan", IMAGES, ("network@model.generator=resnet_generator_image", "network@model.critic=resnet_critic_image",
                        "model.critic.spectral_norm=true", "model.loss=hinge"),
    ),
    "r3gan": ("r3gan", ALL, ()),
    "r3gan-annealed": ("r3gan", IMAGES, ("model.final_gamma=0.01", "model.annealing=60")),
    "wgan": ("wgan", ALL, ()),
    "wgan_gp": ("wgan_gp", ALL, ()),
    "glide": ("glide", IMAGES, ("model.network.patch=2",)),
    "glide-ddpm": ("glide", IMAGES, ("process=ddpm", "model.network.patch=2", "model.network.convolution=false")),
    "glide-unet": (
        "glide", IMAGES, ("process=ddpm", f"{NETWORK}glide_image", "model.network.cross_attention=[4]",
                          "model.network.attention=[4]", "model.objective=hybrid", "model.variance=learned",
                          "model.prediction=v"),
    ),
    "glow": ("glow", ALL, ()),
    "glow-additive": ("glow", ALL, ("model.affine=false", "model.logit=false")),
    "masked_diffusion": ("masked_diffusion", IMAGES, ()),
    "masked_diffusion-uniform": (
        "masked_diffusion", IMAGES, ("model.noise=uniform", "model.steps=5", "model.schedule=cosine"),
    ),
    "masked_diffusion-values": (
        "masked_diffusion", IMAGES, ("model.inputs=values", f"{LIKELIHOOD}logistic_mixture", "model.schedule=geometric"),
    ),
    "masked_diffusion-confidence": ("masked_diffusion", IMAGES, ("model.order=confidence", "model.time=false")),
    "realnvp": ("realnvp", ALL, ()),
    "realnvp-additive": ("realnvp", ALL, ("model.coupling=additive",)),
    "nsf": ("nsf", ALL, ("model.bound=3.0",)),
    "maf": ("maf", ALL, ()),
    "maf-spline": ("maf", ALL, ("model.transform=spline", "model.order=random")),
    "realnvp-batch_norm": ("realnvp", ALL, ("model.batch_norm=true", "model.scale_penalty=1e-3")),
    "vae": ("vae", ALL, ("model.free_bits=0.25", "model.warmup=40")),
    "vae-gaussian": ("vae", ALL, (f"{LIKELIHOOD}gaussian", "model.beta=0.5")),
    "vae-per_element": ("vae", ALL, (f"{LIKELIHOOD}gaussian", "+model.likelihood.per_element=true")),
    "vae-categorical": ("vae", IMAGES, (f"{LIKELIHOOD}categorical",)),
    "vae-mixture": ("vae", POINTS, (f"{LIKELIHOOD}gaussian_mixture",)),
    "vae-logistic_mixture": ("vae", IMAGES, (f"{LIKELIHOOD}logistic_mixture",)),
    "vae-bernoulli": ("vae", IMAGES, (f"{LIKELIHOOD}bernoulli", "data.levels=2")),
    "vae-iaf": ("vae", ALL, (IAF, "model.free_bits=0.25")),
    "vae-vamp": ("vae", ALL, ("prior=vamp",)),
    "vae-gmm": ("vae", ALL, ("prior=gmm", "model.objective=iwae", "model.samples=3", "model.beta=1.0")),
    "vae-maf": ("vae", ALL, ("prior=maf", IAF, "model.objective=info", "model.beta=0.5")),
    "vae-nsf": ("vae", ALL, ("prior=nsf",)),
    "vae-autoregressive": ("vae", ALL, ("prior=autoregressive", "model.objective=geco", "model.target=1.0")),
    "vae-info": ("vae", ALL, ("model.objective=info", "model.beta=0.0")),
    "hvae": ("hvae", ALL, ("model.free_bits=0.55", "model.warmup=40")),
    "hvae-categorical": ("hvae", IMAGES, (f"{LIKELIHOOD}categorical",)),
    "hvae-gaussian": ("hvae", IMAGES, (f"{LIKELIHOOD}gaussian",)),
    "latent": ("latent", ALL, ()),
    "latent-finished": ("latent", ALL, (CODEC,)),
    "latent-flow_matching": ("latent", ALL, ("prior=flow_matching", "prior.pairing=optimal_transport")),
    "latent-score_sde": ("latent", POINTS, ("prior=score_sde",)),
    "latent-realnvp": ("latent", ALL, ("prior=realnvp",)),
    "latent-glow": ("latent", POINTS, ("prior=glow",)),
    "latent-gmm": ("latent", ALL, ("prior=gmm", "prior.covariance=diagonal")),
    "rae": ("rae", ALL, ()),
    "rae-ddpm": ("rae", ALL, ("prior=ddpm", "codec.regularizer=gradient_penalty")),
    "latent-vqvae": ("latent", IMAGES, ("codec=vqvae", "prior=pixelcnn")),
    "latent-dvae": ("latent", IMAGES, ("codec=dvae", "codec.annealing=60", "codec.warmup=40", "prior=transformer")),
    "latent-masked_diffusion": ("latent", ALL, ("codec=vqvae", "prior=masked_diffusion")),
    "vqvae": ("vqvae", ALL, ()),
    "unclip": ("unclip", ALL, ()),
    "unclip-others": (
        "unclip", ALL, ("prior=flow_matching", "denoiser@model.decoder=score_sde", "model.decoder.condition_dropout=0.2"),
    ),
    "unclip-autoregressive": ("unclip", POINTS, ("prior=autoregressive", "encoder.dim=4")),
    "vqvae-fsq": ("vqvae", ALL, ("codec=fsq", "codec.code_levels=[12,9]")),
    "vqvae-residual": ("vqvae", ALL, ("codec=residual", "codec.depth=2")),
    "vqvae-vqgan": ("vqvae", ALL, ("codec=vqgan", "codec.start=0")),
    # Of 4x4 pixels the top level has 2x2 codes.
    "vqvae2": ("vqvae2", ALL, ("codec.downsampling=1",)),
    "vqvae2-fsq": (
        "vqvae2", IMAGES, ("quantizer@codec.quantizer=fsq", "codec.quantizer.code_levels=[4,3]", "codec.downsampling=1"),
    ),
    "vqvae2-residual": ("vqvae2", POINTS, ("quantizer@codec.quantizer=residual",)),
    "dvae": ("dvae", ALL, ("model.annealing=60", "model.warmup=40")),
    "dalle": ("dalle", IMAGES, ("codec.annealing=60",)),
    "dalle-vqvae": ("dalle", IMAGES, ("codec=vqvae", "prior.text_weight=0.5")),
    "cascade": ("cascade", IMAGES, ()),
    "cascade-others": (
        "cascade", IMAGES, ("denoiser@model.base=score_sde", "denoiser@model.upsampler=flow_matching",
                            "model.upsampler.network.concat=true"),
    ),
}  # fmt: skip


@functools.cache
def described(family: str, *words: str) -> dict[str, Any]:
    """Compose the configuration of a model."""
    config = composed(f"model={family}", *words)
    describe_model(config, build)
    return config


@dataclass(frozen=True)
class Crossing(Case):
    """A family with an option of its own, on one kind of data, with any condition."""

    condition: Condition | None = None
    parent: str | None = None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        config, kind = described(self.family, *self.overrides), type(self.condition)
        condition = self.condition and {"_target_": f"{kind.__module__}.{kind.__qualname__}", **vars(self.condition)}
        return {**config, "model": {**config["model"], "condition": condition, **self.parents}}

    @functools.cached_property
    def parents(self) -> dict[str, Any]:
        """The finished model that the option builds on, by its key, and what goes with it."""
        if self.parent == TEACHER:
            teacher = {"teacher": frozen(self.of_parent.model())}
            return {**teacher, "pool": 40} if self.family == "flow_matching" else teacher
        return {"codec": frozen(self.of_parent.model())} if self.parent == CODEC else {}

    @property
    def of_parent(self) -> Crossing:
        """The teacher has the condition of its pupil, and the codec has none."""
        family, condition = "vae", None
        if self.parent == TEACHER:
            family, condition = "flow_matching" if self.family == "flow_matching" else "score_sde", self.condition
        of_data = tuple(word for word in self.overrides if word.startswith("data"))
        return Crossing(family, self.kind, of_data, condition is not None, condition)

    def fresh(self, seed: int = 0) -> GenerativeModel:
        return fitted(super().fresh(seed))

    def again(self, folder: Path) -> GenerativeModel:
        """Build the model as a run that goes on does: with other first weights, and its parent out of the run's folder."""
        if self.parent is None:
            return self.fresh(seed=1)
        key, parent = next(iter(self.parents.items()))
        checkpoints.keep_models(folder, {f"model.{key}": parent})
        node = {**self.config["model"], key: {"_target_": FROZEN, "model": self.of_parent.config["model"]}}
        built, found = with_parents(shrunk(node, SIZES[self.kind]), "model", build, folder)
        assert list(found) == [f"model.{key}"]
        slow(found[f"model.{key}"])
        return fitted(slow(build(built, "model")))


def slow(model: GenerativeModel) -> GenerativeModel:
    """Lower the frequencies of the time, as ``Case`` does."""
    for name, buffer in model.named_buffers():
        if name.endswith("frequencies"):
            buffer *= 0.02
    return model


def fitted(model: GenerativeModel) -> GenerativeModel:
    """Show a model the conditions of its data."""
    for part in model.modules():
        if isinstance(part, GenerativeModel) and part.condition:
            part.conditioner.fit(conditions(part.condition, 60))
    return model


def conditions(condition: Condition | None, n: int) -> Any:
    if condition is None:
        return None
    if isinstance(condition, Tokens):
        return captions(condition, n)
    if isinstance(condition, Codes):
        return torch.arange(n * math.prod(condition.shape)).view(n, *condition.shape) % condition.levels
    if isinstance(condition, Joint):
        return condition.join(*(conditions(part, n) for part in condition.parts))
    return torch.arange(n) % condition.n if isinstance(condition, ClassLabels) else values(condition, n)


def captions(condition: Tokens, n: int) -> Tensor:
    """Make up texts of several lengths, of which token 1 is the end and token 0 the padding."""
    row, place = torch.arange(n)[:, None], torch.arange(condition.length)
    y, last = 2 + (3 * row + place) % (condition.vocabulary - 2), condition.length - 1 - row % 3
    return torch.where(place < last, y, torch.where(place == last, 1, 0))


@functools.cache
def crossing(option: str, kind: str, condition: str) -> Crossing:
    family, _, words = OPTIONS[option]
    parent = next((word for word in words if word in (TEACHER, CODEC)), None)
    said = tuple(word for word in (*KINDS[kind], *words) if word != parent)
    size = "plane" if kind == "points" else "image"
    asked = {**CONDITIONS, **CAPTIONS}[condition]
    return Crossing(family, size, said, condition != "unconditional", asked, parent)


def of_option(option: str) -> list[str]:
    """Name the conditions of an option."""
    family = OPTIONS[option][0]
    every = CAPTIONS if family in CAPTIONED else {**CONDITIONS, **CAPTIONS} if family in CONDITIONED else CONDITIONS
    return [name for name in every if family not in CONDITIONED or name != "unconditional"]


LEFT_OUT = {("grey", "vectors"), ("colour", "unconditional")}
EVERY = [
    (option, kind, condition)
    for option, (_, kinds, _) in OPTIONS.items()
    for kind in kinds
    for condition in of_option(option)
    if (kind, condition) not in LEFT_OUT
]
# Each option twice, with other kinds of data and other conditions.
SOME = [
    (option, kinds[(i + j) % len(kinds)], of_option(option)[(i + 2 * j) % len(of_option(option))])
    for i, (option, (_, kinds, _)) in enumerate(OPTIONS.items())
    for j in range(2)
]
CONDITIONAL = [names for names in EVERY if names[2] != "unconditional"]


def over(chosen: list[tuple[str, str, str]]):
    return pytest.mark.parametrize("names", chosen, ids="-".join)


def examples(model: GenerativeModel, n: int) -> tuple[Tensor, Any]:
    """Make up events of a model's own kind as floats, and its conditions."""
    x, levels = stored(model, n), model.levels
    return (x if levels is None else dequantize(x, levels, generator("dither"))).to(model.dtype), conditions(
        model.condition, n
    )


def stored(model: GenerativeModel, n: int) -> Tensor:
    """Make up events as a data set holds them."""
    rng = generator("events")
    if model.levels is None:
        return torch.randn(n, *model.shape, generator=rng)
    return torch.randint(model.levels, (n, *model.shape), generator=rng, dtype=torch.uint8)


# Gradients


def moved(names: tuple[str, str, str]) -> GenerativeModel:
    """Build a model that trains, whose weights are not where they start and whose conditions are dropped often."""
    model = crossing(*names).model().double().train()
    for part in model.modules():
        if isinstance(part, GenerativeModel) and part.conditioner.dropout:
            part.conditioner.dropout = 0.3
        if isinstance(part, DDPM) and part.history:  # so that losses decide over the times
            part.history.counts.fill_(part.history.LAST)
            part.history.losses.uniform_(0.5, 2)
    return model


def outputs(part: GenerativeModel, turn: dict[str, str]) -> Iterator[tuple[nn.Module, int]]:
    """List the networks that say something of every pixel, and how many of their channels are means."""
    if isinstance(part, PriorStage):
        yield from outputs(part.prior, turn)
    elif isinstance(part, Denoiser) and not isinstance(part, FlowMap):  # whose network is differentiated forwards too
        yield part.network, part.shape[0]  # the others are variances
    elif isinstance(part, GeneratorAndCritic) and turn["turn"] == "generator":
        yield part.generator, part.shape[0]


def pixels(part: GenerativeModel, turn: dict[str, str], x: Tensor, y: Any) -> list[tuple[Tensor, bool]]:
    """Return the gradients of a loss in what is said of pixels, (B, P, ...), and whether each element must have one."""
    kept: list[tuple[Tensor, int]] = []

    def keep(output: Tensor, means: int = 0) -> Tensor:
        if not output.requires_grad:
            return output
        output = output.clone()  # what a hook returns takes the place of the output
        output.retain_grad()
        kept.append((output, means))
        return output

    with contextlib.ExitStack() as stack:
        for network, means in outputs(part, turn):
            handle = network.register_forward_hook(lambda module, inputs, out, means=means: keep(out, means))
            stack.callback(handle.remove)
        within = part.prior if isinstance(part, PriorStage) else part
        # Of masked diffusion only the masked positions have a gradient.
        law: Any = None if isinstance(within, MaskedDiffusion) else getattr(within, "likelihood", None)
        if law is not None:
            log_prob = law.log_prob
            law.log_prob = lambda params, x: log_prob(keep(params), x)
            stack.callback(delattr, law, "log_prob")
        part.loss(x, y if part.condition else None, rng=generator("loss"), **turn).total.backward()
    found: list[tuple[Tensor, bool]] = []
    for output, means in kept:
        assert output.grad is not None
        found += [(output.grad[:, :means], True), (output.grad[:, means:], True)] if means else [(output.grad, False)]
    return [(gradient, elementwise) for gradient, elementwise in found if gradient.numel()]


def check_gradients(model: GenerativeModel) -> None:
    """Check that a loss and its gradient are finite, and that the gradient reaches every weight and every pixel."""
    x, y = examples(model, 16)
    for part, turn in objectives(model):
        total, terms, _ = part.loss(x, y if part.condition else None, rng=generator("loss"), **turn)
        assert bool(total.isfinite()) and all(bool(term.isfinite()) for term in terms.values())
        for gradient, elementwise in pixels(part, turn, x, y):
            told = (
                gradient != 0 if elementwise else gradient.flatten(2).any(1) if gradient.ndim > 2 else gradient.any(1)
            )
            share = float(told.double().mean())
            assert share > 0.97, f"{share:.0%} of the pixels have a gradient"
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert all(bool(p.grad.isfinite().all()) for _, p in trained)
    alone = [name for name, part in model.named_modules() if isinstance(part, Transformer) and part.tokens == 1]
    # What a transformer makes of a value is read by those after it.
    unread = tuple(f"{name}.stem." for name in alone)
    assert not [name for name, p in trained if not p.grad.any() and not name.startswith(unread)]
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) and part.weight.is_leaf and ".code_features." not in name:
            first = int(isinstance(model.condition, Tokens))  # padding is masked
            assert bool(part.weight.grad[first:].any(1).all()), f"{name}: a class has no gradient"


@over(EVERY)
def test_a_gradient_reaches_every_weight_and_every_pixel(names):
    check_gradients(moved(names))


LAWS: dict[str, tuple[Likelihood, int]] = {  # and how many channels they are tried on, 0 for a vector
    "normal-points": (Gaussian(per_element=True), 0),
    "normal-colour": (Gaussian(per_element=True), 3),
    "mixture-points": (GaussianMixture(None, 1), 0),
    "logistic-grey": (DiscretizedLogistic(17), 1),
    "logistic-colour": (DiscretizedLogistic(17), 3),
    "logistic_mixture-colour": (LogisticMixture(17, 1), 3),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_gradient_leads_back_a_scale_beyond_its_bound(name):
    """Data far from a narrow distribution must widen it, in every pixel."""
    likelihood, channels = LAWS[name]
    shape = (channels, 4, 4) if channels else (3,)
    x = torch.rand(5, *shape, generator=generator("far")).double()
    params = torch.full(
        (5, likelihood.num_params(shape[0]), *shape[1:]), -16.0, dtype=torch.float64, requires_grad=True
    )
    (-likelihood.log_prob(params, x).sum()).backward()
    assert params.grad is not None
    told = (params.grad != 0).sum(1)
    assert bool((told >= 2 * shape[0]).all()), "a place or a scale has no gradient"


# Pairs


# The first stays: what belongs to no example is drawn from its stream. No flip and no roll does the same to both orders.
ORDER = torch.tensor([0, 4, 1, 5, 2, 3])
OTHER = torch.tensor([1, 1, 2, 3, 4, 5])  # gives the first the condition of the second


def streams(rows: Tensor) -> SampleStreams:
    return SampleStreams(11, rows.tolist())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@over(CONDITIONAL)
def test_examples_and_conditions_that_change_places_together_change_nothing(names):
    model = moved(names)
    x, y = examples(model, 6)

    def losses(rows: Tensor, conditions: Tensor) -> Tensor:
        again = copy.deepcopy(model)
        found = [
            part.loss(x[rows], conditions if part.condition else None, rng=streams(rows), **turn).total.detach()
            for part, turn in objectives(again)
        ]
        return torch.stack(found)

    rows, several = torch.arange(6), torch.tensor([1, 1, 3, 3, 5, 5])  # a condition that is dropped makes no difference
    whole, ordered, other = losses(rows, y), losses(ORDER, y[ORDER]), losses(rows, y[several])
    close(ordered, whole)
    conditional = torch.tensor([part.condition is not None for part, _ in objectives(model)])
    if names[0] == "flow_matching-reflow":  # whose pairs have conditions of their own
        assert torch.equal(other, whole)
    else:
        assert bool(((other - whole).abs()[conditional] > 1e-9).all()), "conditions make no difference"


@over([names for i, names in enumerate(CONDITIONAL) if i // 2 % 3 == 0 or names[1] == "points"])
def test_samples_densities_and_codes_are_those_of_their_own_condition(names):
    model = moved(names).eval()
    for sampled in path_models(model)[:1]:
        sampled.sampler.clip = False  # which would hide what a condition changes
    x, y = examples(model, 6)
    rows = torch.arange(6)
    says: list[Callable[[Tensor, Tensor], Tensor]] = []
    if model.levels is None or isinstance(model, Denoiser):  # of integers a rounding would decide
        says.append(lambda rows, y: model.sample(6, y, rng=streams(rows)).x)
    if isinstance(model, Density) and Bound.ESTIMATE not in model.bound:
        says.append(lambda rows, y: model.log_prob(x[rows], y, num_samples=draws(model), rng=streams(rows)).value)
    own = not isinstance(model, _Latent) or model.codec.condition
    if isinstance(model, Codec) and not isinstance(model, Denoiser) and own and isinstance(model.latent, Continuous):
        says.append(lambda rows, y: model.encode(x[rows], y))
        z = torch.randn(6, *model.latent.shape, generator=generator("z")).double()
        if model.levels is None:
            says.append(lambda rows, y: model.decode(z[rows], y))
    for say in says:
        whole, ordered, other = say(rows, y), say(ORDER, y[ORDER]), say(rows, y[OTHER])
        close(ordered, whole[ORDER])
        close(other[1:], whole[1:])
        assert not torch.equal(other[0], whole[0]), "a condition makes no difference"


# Training


EXAMPLES, BATCH = 24, 12


def module_of(model: GenerativeModel, x: Tensor, y: Any, steps: int) -> GenerativeModule:
    """Put a model into the trainer, with averages that follow closely."""
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    batches = Batches(Split(x, y), BATCH, seed=3)
    module = GenerativeModule(
        model.train(), adam, batches, Budget(images=BATCH * steps), ema_half_life=6.6 * BATCH, clip=100.0, seed=5
    )
    module.cost = lambda stage, turn: 0  # type: ignore[method-assign]  # FLOPs, which are counted on a copy
    module.make_plan()
    return module


def watch(module: GenerativeModule, x: Tensor, y: Any) -> None:
    """Check that every loss of a training is one of examples of the data and their own conditions."""
    for stage in module.stages:
        inner = stage.module._loss

        def loss(batch: Tensor, mine: Any, *rest: Any, inner: Any = inner, part: Any = stage.module) -> Loss:
            rows = batch if part.levels is None else quantize(batch, part.levels)
            same = (rows[:, None] == x[None].to(rows.dtype)).flatten(2).all(2)
            assert bool(same.any(1).all()), "an event that is none of the data"
            if part.condition:
                assert torch.equal(mine, y[same.long().argmax(1)].to(mine.dtype)), "another example's condition"
            return inner(batch, mine, *rest)

        stage.module._loss = loss


def tensors(module: GenerativeModule) -> dict[str, Tensor]:
    """List what a training has left: weights, averages, optimisers and records."""
    found = {f"weights.{name}": value for name, value in module.model.state_dict().items()}
    found |= {f"average.{name}": value for name, value in module.ema.model.state_dict().items()}
    for i, player in enumerate(module.every_player()):
        for j, own in player.optimizer.state_dict()["state"].items():
            found |= {f"optimizer{i}.{j}.{name}": value for name, value in own.items()}
    return {name: value.clone() for name, value in (found | module.progress.window.state_dict()).items()}


@over(SOME)
def test_a_training_goes_on_in_the_same_bits_after_every_interruption(names, tmp_path):
    case = crossing(*names)
    model = case.fresh()
    x, y = stored(model, EXAMPLES), conditions(model.condition, EXAMPLES)
    steps = 12 if isinstance(model, Staged) else 8  # in which a generator has its turn, and a codec is finished
    cuts = steps // 4, steps * 3 // 4

    def save(module: GenerativeModule) -> None:
        checkpoints.save(tmp_path, module.steps, module.model, module.ema.model, module.state())

    module = module_of(model, x, y, steps)
    watch(module, x, y)
    module.on_step = lambda: save(module) if module.steps == cuts[0] else None
    while not module.finished:
        module.step()
    whole = tensors(module)

    module = resumed(case, tmp_path, x, y, steps, cuts[0])
    while module.steps < cuts[1]:
        module.step()
    save(module)
    module = resumed(case, tmp_path, x, y, steps, cuts[1])
    while not module.finished:
        module.step()
    ended = tensors(module)
    assert whole.keys() == ended.keys() and all(bool(value.double().isfinite().all()) for value in whole.values())
    assert [name for name, value in whole.items() if not torch.equal(value, ended[name])] == []


def resumed(case: Crossing, folder: Path, x: Tensor, y: Any, steps: int, step: int) -> GenerativeModule:
    """Put a new model into a new trainer, and restore a checkpoint."""
    model = case.again(folder / f"parents-{step}")
    if case.parent:
        key, parent = next(iter(case.parents.items()))
        other: Any = (
            model.codec
            if key == "codec"
            else model.pairs.teacher
            if case.family == "flow_matching"
            else model.teacher.denoiser
        )
        assert other is not parent, "the parent was not read"
        weights = other.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in parent.state_dict().items()), "another parent"
        assert not any(p.requires_grad for p in other.parameters())
    module = module_of(model, x, y, steps)
    module.restore(*checkpoints.load(folder / f"step-{step}"))
    assert module.steps == step
    return module


CONTRASTIVE = ("ebm",)  # whose loss is a difference that is 0 at first and in equilibrium
ADVERSARIAL = ("gan", "r3gan", "wgan", "wgan_gp")
LEARNING = [
    (option, kinds[0] if i % 3 or kinds[0] == "grey" else kinds[-1], of_option(option)[i % len(of_option(option))])
    for i, (option, (family, kinds, _)) in enumerate(OPTIONS.items())
    if family not in (*ADVERSARIAL, *CONTRASTIVE) and option != "vqvae-vqgan"  # whose first stage is adversarial
]


@over(LEARNING)
def test_every_stage_of_a_training_lowers_its_loss(names):
    model = crossing(*names).fresh().train()
    for part in model.modules():
        if isinstance(part, RateCost):
            part.seen.fill_(1000)  # after the warm-up
    x, y = examples(model, 16)
    x = x / 4 + 1 if model.levels is None else x.abs()
    for part, turn in objectives(model):
        own = y if part.condition else None
        part.initialize(x, own, rng=generator("first"))
        adam = torch.optim.Adam([p for p in part.parameters() if p.requires_grad], lr=1e-2, foreach=True)
        losses = []
        for step in range(35):
            adam.zero_grad()
            rng = generator("learning", step % 5)  # the same five draws of the noise again and again
            loss = part.loss(x, own, rng=rng, **turn)
            loss.total.backward()
            adam.step()
            part.after_step(loss.aux, len(x), rng=rng)
            losses.append(float(loss.total.detach()))
        assert all(map(math.isfinite, losses))
        assert sum(losses[-5:]) < sum(losses[5:10]) < math.inf, f"{sum(losses[5:10])} became {sum(losses[-5:])}"


@over([names for names in SOME if OPTIONS[names[0]][0] in ADVERSARIAL])
def test_a_critic_learns_while_its_generator_stands_still(names):
    model = crossing(*names).fresh().train()
    x, y = examples(model, EXAMPLES)
    x = x / 4 + 1 if model.levels is None else x.abs()
    model.initialize(x, y, rng=generator("first"))
    adam = torch.optim.Adam(model.critic.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        adam.zero_grad()
        loss = model.loss(x, y, turn="critic", rng=generator("critic", step))
        loss.total.backward()
        adam.step()
        model.after_step(loss.aux, len(x))
        losses.append(float(loss.total.detach()))
    assert sum(losses[-5:]) < sum(losses[:5]) and all(map(math.isfinite, losses))


# Two processes


RANKS, SHARE = 2, 6
# Modules with spectral norm, which is independent of the batch, cannot be pickled; the gradient of a pseudo-input of vae-vamp
# that lies on the bound of the data is its slope on either side, by rounding.
SHARED = [
    (
        option,
        kinds[i % len(kinds)],
        ("vectors" if i % 3 == 2 else "classes") if len(of_option(option)) > 1 else "captions",
    )
    for i, (option, (_, kinds, _)) in enumerate(OPTIONS.items())
    if option not in ("gan-resnet", "vae-vamp")
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[list[dict[str, Any]]]]:
    """What one process finds on a whole batch, and each of two on its share of it."""
    folder, given = tmp_path_factory.mktemp("crossed"), {}
    for names in SHARED:
        model = moved(names)
        given["-".join(names)] = model, *examples(model, RANKS * SHARE)
    torch.save(given, folder / "models.pt")
    processes = [
        Child(
            [sys.executable, "-m", "tests.shares", str(folder), str(rank), str(RANKS)],
            cwd=Path(__file__).resolve().parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        alone = {name: examine(*one) for name, one in given.items()}
        said = [process.communicate(timeout=2 * TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(said)
    shares = [torch.load(folder / f"rank_{rank}.pt") for rank in range(RANKS)]
    return {name: [alone[name], *(share[name] for share in shares)] for name in given}


@over(SHARED)
def test_two_processes_take_the_step_of_one(found, names):
    for whole, *shares in zip(*found["-".join(names)], strict=True):
        largest = max(float(g.abs().max()) for g in whole["gradients"].values())
        assert largest > 0
        for key, gradient in whole["gradients"].items():
            together = torch.stack([share["gradients"][key] for share in shares]).mean(0)
            assert float((together - gradient).abs().max()) <= 1e-9 * largest, key
        for key, term in whole["terms"].items():
            together = torch.stack([share["terms"][key] for share in shares]).double().mean(0)
            torch.testing.assert_close(together, term.double(), rtol=1e-6, atol=1e-6, msg=key)
        for key, value in whole["state"].items():
            assert all(torch.equal(share["state"][key], shares[0]["state"][key]) for share in shares), key
            torch.testing.assert_close(shares[0]["state"][key], value, rtol=1e-9, atol=1e-9, msg=key)


# Laws that are known


SPREAD = 0.3  # of a class about its place, in each of three dimensions
PLACES = torch.tensor([-1.5, 1.5])


def exact_teacher(condition: Condition) -> FlowMatching:
    """The velocity of the straight path to N(m, SPREAD^2 I), m the place of the condition."""

    def velocity(x_t: Tensor, t: Tensor, y: Any) -> Tensor:
        m = (y if y.is_floating_point() else PLACES[y][:, None]).to(x_t)
        alpha, sigma = 1 - t.to(x_t)[:, None], t.to(x_t)[:, None]
        gain = (sigma - alpha * SPREAD**2) / (alpha**2 * SPREAD**2 + sigma**2)
        return gain * (x_t - alpha * m) - m

    return FlowMatching((3,), condition, network=network(velocity))


LEARNED = {
    "classes": ["autoregressive", "ddpm-vlb", "ddpm-vlb-learned", "ddpm-hybrid-importance",
                "flow_matching-transport", "flow_matching-reflow", "score_sde-edm", "realnvp-batch_norm", "glow-additive",
                "vae-per_element", "hvae", "vae-gmm", "vae-maf", "latent-flow_matching", "vqvae"],
    "vectors": ["ddpm-hybrid-importance", "flow_matching-transport", "flow_matching-reflow", "vae-per_element",
                "latent-realnvp"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "kind"), [(option, kind) for kind, options in LEARNED.items() for option in options]
)
def test_samples_have_the_law_of_the_condition_that_is_asked_for(option, kind):
    """Two narrow laws at +-1.5, trained and averaged: paired across classes, the samples of a flow came out at +-0.36."""
    condition: Condition = ClassLabels(2) if kind == "classes" else Vector(1)
    y: Tensor = torch.arange(512) % 2
    x = PLACES[y][:, None] + SPREAD * torch.randn(512, 3, generator=generator("laws"))
    case = replace(crossing(option, "points", kind), condition=condition, parent=None)
    own = {"teacher": exact_teacher(condition), "pool": 400} if option.endswith("reflow") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = slow(build(shrunk({**case.config["model"], **own}, SIZES["plane"]), "model"))
    places = y if kind == "classes" else PLACES[y][:, None]
    model.conditioner.fit(places)
    steps, batch = 200, 64
    adam = functools.partial(torch.optim.Adam, lr=1e-2, foreach=True)
    batches, budget = Batches(Split(x, places), batch, seed=3), Budget(images=batch * steps)
    module = GenerativeModule(
        model.train(), adam, batches, budget, LearningRate("cosine"), ema_half_life=34 * BATCH, clip=10.0
    )
    module.cost = lambda stage, turn: 0  # type: ignore[method-assign]
    module.make_plan()
    while not module.finished:
        module.step()
    average: Any = module.ema.model.eval()
    if isinstance(average, Denoiser):
        average.sampler = Heun(12)
    n = 200
    for c, place in enumerate(PLACES.tolist()):
        asked = torch.full((n,), c) if kind == "classes" else torch.full((n, 1), place)
        samples = average.sample(n, asked, rng=streams(torch.arange(n))).x
        assert (samples.mean(0) - place).abs().max() < 0.2
        assert 0.4 * SPREAD < float(samples.std(0).mean()) < 2.5 * SPREAD


@pytest.mark.parametrize(
    "option",
    [
        *("autoregressive", "autoregressive-classes", "ddpm-vlb", "ddpm-vlb-learned", "ddpm-hybrid-importance"),
        *("vae-iaf", "vae-vamp", "vae-gmm", "vae-maf"),
        *("vae-categorical", "vae-logistic_mixture", "vae-bernoulli", "hvae-categorical", "latent-vqvae", "vqvae"),
        *("masked_diffusion", "masked_diffusion-uniform", "latent-masked_diffusion"),
    ],
)
def test_the_probabilities_of_all_images_of_a_class_add_up_to_one_or_a_bound_to_less(option):
    family, _, words = OPTIONS[option]
    case = Crossing(family, "tiny", (*TINY_EVENT, *words), True, ClassLabels(3))
    model = case.model().double()
    total, error = bounded_mass(model, -1, 1, 2, draws=4)
    if model.bound is Bound.EXACT:
        assert total == pytest.approx(1, abs=1e-9)
    else:
        assert 0 < total <= 1 + 3 * error + 1e-9


@pytest.mark.parametrize("option", ["autoregressive", "autoregressive-patch", "autoregressive-classes"])
def test_all_colour_images_of_a_class_are_drawn_as_often_as_their_probability_says(option):
    """The 2^6 images of three channels and two pixels, each class by itself: its probabilities and its samples."""
    family, _, words = OPTIONS[option]
    shape = "data.shape=[3,2,2]" if option.endswith("patch") else "data.shape=[3,1,2]"
    case = Crossing(family, "tiny", ("data=digits", shape, "data.levels=2", *words), True, ClassLabels(2))
    model, n = case.model().double(), 4000
    values = torch.cartesian_prod(*[bin_center(torch.arange(2), 2, torch.float64)] * model.dim)
    places = 2 ** torch.arange(model.dim - 1, -1, -1)
    laws = []
    for c in range(2):
        x = values.view(-1, *model.shape)
        law = model.log_prob(x, torch.full((len(x),), c)).value.detach().exp()
        assert float(law.sum()) == pytest.approx(1, abs=1e-9)
        samples = model.sample(n, torch.full((n,), c), rng=generator("colours", c)).x
        counts = torch.bincount((quantize(samples, 2).flatten(1) * places).sum(1), minlength=len(x))
        statistic = float(((counts - n * law).square() / (n * law)).sum())
        assert statistic < len(x) + 5 * math.sqrt(2 * len(x)) + 20
        laws.append(law)
    assert (laws[0] - laws[1]).abs().sum() > 0.01


# Scores and their cards


SCORED = [("ddpm-hybrid", "points"), ("flow_matching-reflow", "points"), ("realnvp-batch_norm", "points")]
SCORED += [("gan-hinge", "points"), ("vqvae", "points"), ("latent-finished", "colour"), ("vae-bernoulli", "colour")]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("option", "kind"), SCORED)
def test_what_was_combined_is_scored(option, kind, condition):
    case = crossing(option, kind, condition)
    model = case.model()
    events = stored(model, 60)
    asked = conditions(model.condition, 60)
    splits = [Split(events[part], None if asked is None else asked[part]) for part in (slice(40), slice(40, 60))]
    data = DataSet(*splits, model.levels)
    settings = EvalSettings(n=40, events=6, num_samples=4, batch_size=20, throughput=4, features=None)
    settings = replace(settings, features="identity") if model.levels is None else settings
    features = pick_network(settings, "crossed", model.event, needed=True)
    result = evaluate_model(model, EvalData(data, "crossed", False), settings, features)
    wanted = {"memorisation/copied", "sampling/nfe"}
    wanted |= {"test/sliced_wasserstein", "test/mmd", "test/fd_identity"} if model.levels is None else set()
    assert wanted <= result["metrics"].keys() and not [line for line in result["warnings"] if "not finite" in line]
    for name, score in result["metrics"].items():
        number = score["value"]
        assert number is None or not isinstance(number, float) or math.isfinite(number), name
        json.dumps(score["card"], allow_nan=False)


class Guided(Sampler):
    """Classifier-free guidance around another sampler, as somebody's package may have it."""

    stochastic = False

    def __init__(self, inner: Sampler, weight: Any, until: float = 1.0):
        super().__init__(inner.steps)
        self.inner, self.weight, self.until = inner, weight, until

    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Any, rng: torch.Generator | None) -> Any:
        yield from self.inner.iterate(Towards(denoiser, self), noise, y, rng)


class Towards(DenoiserWrapper):
    """A denoiser that goes beyond what a condition makes of the null value."""

    def __init__(self, denoiser: Denoiser, guide: Guided):
        super().__init__(denoiser)
        self.guide = guide

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return 2 * self.denoiser.evaluations

    def predict(self, x_t: Tensor, t: Tensor, y: Any = None) -> Prediction:
        free, told = self.denoiser.denoise(x_t, t), self.denoiser.denoise(x_t, t, y)
        weight = self.guide.weight(t) if callable(self.guide.weight) else self.guide.weight
        return Prediction("x0", free + weight * (told - free))


def rising(slope: float) -> Callable[[Tensor], Tensor]:
    """Return a weight that rises with time."""
    return lambda t: 1 + slope * t.float().mean()


def cards(values: list[Any]) -> list[str]:
    return [json.dumps(describe(value), sort_keys=True, allow_nan=False) for value in values]


def test_samplers_that_differ_in_one_setting_or_in_what_wraps_them_have_unlike_cards():
    samplers: list[Any] = []
    for path in sorted((CONF / "sampler").glob("*.yaml")):
        node = composed("model=score_sde", f"sampler={path.stem}")["sampler"]
        samplers.append(build(node, "sampler"))
        for key, value in node.items():
            if isinstance(value, bool):
                samplers.append(build({**node, key: not value}, "sampler"))
            elif isinstance(value, int | float) and not (path.stem == "ode" and key == "steps"):
                samplers.append(
                    build({**node, key: value + 1 if isinstance(value, int) else value / 2 + 1e-3}, "sampler")
                )
    weights: list[Any] = [1.0, 3.0, rising(0.5), rising(2.0), functools.partial(torch.mul, 2), torch.tensor(3.0)]
    weights += [lambda t: 2.0, lambda t: 4.0, lambda t, weight=2.0: weight, lambda t, weight=4.0: weight]
    samplers += [Guided(inner, weight) for inner in (Euler(4), Heun(4)) for weight in weights]
    samplers += [
        Guided(Guided(Euler(4), 1.0), 3.0),
        Guided(Guided(Euler(4), 3.0), 1.0),
        Guided(Euler(4), 1.0, until=0.5),
    ]
    said = cards(samplers)
    assert len(set(said)) == len(said), [card for card in said if said.count(card) > 1]
    assert said == cards(copy.deepcopy(samplers))


def test_a_guided_sampler_counts_both_evaluations_and_its_card_says_its_weight():
    model: Any = crossing("flow_matching-transport", "points", "classes").model()
    y = conditions(model.condition, 6)
    drawn = {}
    for weight in (0.0, 1.0, 3.0):
        model.sampler = Guided(Euler(4), weight)
        x, nfe, _ = model.sample(6, y, rng=streams(torch.arange(6)))
        assert nfe == 8 and describe(model.sampler)["weight"] == weight
        drawn[weight] = x
    model.sampler = Euler(4)
    plain = model.sample(6, y, rng=streams(torch.arange(6))).x
    torch.testing.assert_close(drawn[1.0], plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn[3.0], plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["points", "grey"])
def test_models_whose_options_or_conditions_differ_are_described_apart(kind):
    names = [names for names in EVERY if names[1] == kind and names[2] != "vectors"]
    said = cards([crossing(*one).model() for one in names])
    assert len(set(said)) == len(said)
