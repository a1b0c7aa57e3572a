"""Conditions: which values each accepts, how they are dropped, drawn and embedded, and what travels with the weights; and
every family with its default networks, for every kind of data and of condition."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import EXAMPLES_BYTES, ClassLabels, Codes, Condition, Conditioner, Image, Joint, Tokens, Vector
from genzoo.event import EventSpec
from genzoo.families.autoregressive import Autoregressive
from genzoo.families.ddpm import DDPM
from genzoo.families.ebm import ebm
from genzoo.families.flow import Flow
from genzoo.families.flow_matching import FlowMatching, minibatch_ot
from genzoo.families.gan import GAN, WGAN, WGANGP
from genzoo.families.glow import Glow
from genzoo.families.hvae import HVAE
from genzoo.families.latent import latent
from genzoo.families.maf import MAF
from genzoo.families.nsf import NSF
from genzoo.families.r3gan import R3GAN
from genzoo.families.realnvp import RealNVP
from genzoo.families.score_sde import ScoreSDE
from genzoo.families.vae import VAE
from genzoo.families.vqvae import VQVAE
from genzoo.model import Adversarial, GenerativeModel
from genzoo.nn.embeddings import ImageChannels, embed
from genzoo.numerics import distributed
from genzoo.numerics.random import SampleStreams, generator

CONDITIONS: dict[str, Condition] = {
    "classes": ClassLabels(5),
    "vector": Vector(3),
    "tokens": Tokens(4, 7),
    "image": Image((2, 8, 6)),
    "small image": Image((1, 3, 3)),  # which needs no convolution
    "joint": Joint((Vector(2), ClassLabels(3), Tokens(3, 5), Image((1, 2, 2)))),
}
every = pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
of_several_numbers = pytest.mark.parametrize("condition", list(CONDITIONS.values())[1:-1], ids=list(CONDITIONS)[1:-1])


def values(condition: Condition, n: int, seed: int = 0) -> Tensor:
    """Draw conditions of the domain, (n, *condition.shape)."""
    rng = generator("conditions", seed)
    if isinstance(condition, Joint):
        return condition.join(*(values(part, n, seed + i) for i, part in enumerate(condition.parts)))
    if isinstance(condition, ClassLabels):
        return torch.randint(condition.n, (n,), generator=rng)
    if isinstance(condition, Tokens):
        return torch.randint(condition.vocabulary, (n, condition.length), generator=rng)
    if isinstance(condition, Codes):
        return torch.randint(condition.levels, (n, *condition.shape), generator=rng)
    y = torch.randn(n, *condition.shape, generator=rng)
    return y.tanh() if isinstance(condition, Image) else y


def is_null(condition: Condition, y: Tensor) -> Tensor:
    """Which rows are the null value as a whole, (n,)."""
    null = condition.null(y).reshape(len(y), -1)
    rows = y.reshape(len(y), -1)
    return ((rows == null) | (rows.isnan() & null.isnan())).all(1)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN counted as equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0))


# What is accepted


@every
@pytest.mark.parametrize("training", [True, False])
def test_values_of_the_domain_are_accepted(condition, training):
    conditioner = Conditioner(condition).train(training)
    for n in (0, 1, 6):
        conditioner.check(values(condition, n), n)
        conditioner.check(values(condition, n), n, allow_null=True, synchronize=True)


@every
def test_wrong_shapes_and_types_are_refused(condition):
    conditioner, y = Conditioner(condition), values(condition, 6)
    wrong_type = y.float() if condition.dtype else (2 * y).long()
    for wrong in (y[:5], y[:, None], y.flatten()[:1].view(()), y[..., None], wrong_type, y.to(torch.int32)):
        for allow_null in (False, True):
            with pytest.raises(ValueError, match=r"y must be \(6"):
                conditioner.check(wrong, 6, allow_null=allow_null)
    if condition.shape:
        with pytest.raises(ValueError, match=r"y must be \(6"):
            conditioner.check(y[:, :-1], 6)


@every
def test_a_missing_condition_is_refused_and_one_too_many_too(condition):
    with pytest.raises(ValueError, match="this model is conditional: y must hold 6"):
        Conditioner(condition).check(None, 6)
    with pytest.raises(ValueError, match="this model is unconditional: y must be None"):
        Conditioner(None).check(values(condition, 6), 6)
    Conditioner(None).check(None, 6)


@every
def test_values_outside_the_domain_are_refused_wherever_they_are(condition):
    """One element of one row is enough, with and without null values."""
    outside = {torch.int64: (-1, 100, -100)}.get(condition.dtype, (math.inf, -math.inf))
    for value in outside:
        for place in (0, -1):
            y = values(condition, 6)
            y.view(6, -1)[place, place] = value
            for allow_null in (False, True):
                with pytest.raises(ValueError, match=f"of {condition.domain}, not"):
                    Conditioner(condition).check(y, 6, allow_null=allow_null)


@every
def test_null_values_are_accepted_where_they_are_allowed_alone(condition):
    y = values(condition, 6)
    y[2:4] = condition.null(y[2:4])
    for some in (y, condition.null(y)):
        with pytest.raises(ValueError, match=f"of {condition.domain}, not"):
            Conditioner(condition).check(some, 6)
        Conditioner(condition).check(some, 6, allow_null=True)
    assert same(condition.null(y[:2]), condition.null(y[4:])), "there is one null value"


@of_several_numbers
def test_a_value_that_is_null_in_part_is_refused(condition):
    y = values(condition, 6)
    y.view(6, -1)[2, 0] = condition.null(y[:1]).flatten()[0]
    for allow_null in (False, True):
        with pytest.raises(ValueError, match=f"of {condition.domain}, not"):
            Conditioner(condition).check(y, 6, allow_null=allow_null)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClassLabels(0), "at least 1 class, not 0"),
        (lambda: Vector(0), "at least 1 dimension, not 0"),
        (lambda: Tokens(0, 5), "positive length and vocabulary, not 0 and 5"),
        (lambda: Tokens(5, 0), "positive length and vocabulary, not 5 and 0"),
        (lambda: Image((8, 8)), r"a shape \(channels, height, width\), not \(8, 8\)"),
        (lambda: Image((1, 0, 8)), r"not \(1, 0, 8\)"),
        (lambda: Conditioner(Vector(2), 1.1), r"condition_dropout must be in \[0, 1\], not 1.1"),
        (lambda: Conditioner(Vector(2), (0.1, 0.2)), r"condition_dropout=\[0.1, 0.2\]: 1 conditions can be dropped"),
        (lambda: Conditioner(Vector(2), -0.1), r"condition_dropout must be in \[0, 1\], not -0.1"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@every
def test_a_condition_is_a_value(condition):
    again = copy.deepcopy(condition)
    assert again == condition and hash(again) == hash(condition)
    assert len({*CONDITIONS.values(), again}) == len(CONDITIONS)
    assert condition.empty(4, torch.device("cpu"), torch.float64).shape == (4, *condition.shape)


# Dropping


@every
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.6, 1.0])
def test_as_many_conditions_are_dropped_as_asked_and_the_others_stay(condition, dropout):
    n = 20_000 if dropout in (0.1, 0.6) else 500
    y = values(condition, n)
    before = y.clone()
    dropped = Conditioner(condition, dropout).drop(y, generator("drop"))
    null = is_null(condition, dropped)
    assert torch.equal(y, before) and dropped.dtype == y.dtype and dropped.shape == y.shape
    assert torch.equal(dropped[~null], y[~null])
    assert same(dropped[null], condition.null(y[null]))
    assert float(null.double().mean()) == pytest.approx(dropout, abs=4 * math.sqrt(dropout * (1 - dropout) / n))
    Conditioner(condition).check(dropped, n, allow_null=True)


@every
def test_a_condition_tells_its_null_value(condition):
    y = values(condition, 6)
    y[2:4] = condition.null(y[2:4])
    assert torch.equal(condition.is_null(y), is_null(condition, y)) and condition.is_null(y).sum() == 2


def test_several_conditions_are_dropped_independently():
    condition, n, probs = Joint((Vector(3), Tokens(4, 7), ClassLabels(5))), 20_000, (0.1, 0.5, 0.3)
    y = condition.join(values(Vector(3), n), values(Tokens(4, 7), n), values(ClassLabels(5), n))
    conditioner = Conditioner(condition, probs)
    dropped = conditioner.drop(y, generator("drop"))
    null = torch.stack(
        [part.is_null(v) for part, v in zip(condition.parts, condition.split(dropped), strict=True)], dim=1
    )
    widths = torch.tensor(condition.sizes)
    kept = ~null.repeat_interleave(widths, dim=1)
    assert torch.equal(dropped[kept], y[kept]) and dropped.dtype == y.dtype
    share = null.double()
    torch.testing.assert_close(share.mean(0), torch.tensor(probs).double(), atol=0.015, rtol=0)
    torch.testing.assert_close(torch.corrcoef(share.T), torch.eye(3).double(), atol=0.03, rtol=0)
    conditioner.check(dropped, n, allow_null=True)
    assert conditioner.learns_null and not Conditioner(condition, (0.1, 0.0, 0.2)).learns_null


def test_fixed_conditions_are_not_dropped():
    condition = Joint((Vector(2), Vector(3)), fixed=1)
    y = values(Vector(5), 50)
    dropped = Conditioner(condition, (1.0,)).drop(y, generator("drop"))
    assert torch.equal(dropped[:, :2], y[:, :2]) and bool(dropped[:, 2:].isnan().all())
    with pytest.raises(ValueError, match=r"condition_dropout=\[0.1, 0.5\]: 1 conditions can be dropped"):
        Conditioner(condition, (0.1, 0.5))


def test_nothing_is_dropped_without_a_condition():
    assert Conditioner(None, 1.0).drop(None, None) is None


@every
def test_what_is_dropped_is_chosen_by_the_generator(condition):
    conditioner, y = Conditioner(condition, 0.5), values(condition, 64)
    one, again, two = (conditioner.drop(y, generator(seed)) for seed in (0, 0, 1))
    assert same(one, again) and not same(one, two)


# Drawing


def test_classes_are_drawn_as_often_as_they_occur():
    conditioner, y = Conditioner(ClassLabels(4)), torch.tensor([0] * 5 + [2] * 3 + [3] * 12)
    uniform = torch.bincount(conditioner.draw(40_000, None, generator(0)), minlength=4) / 40_000
    assert float((uniform - 0.25).abs().max()) < 4 * 0.5 / 40_000**0.5, "before the data are seen"
    conditioner.fit(y)
    torch.testing.assert_close(conditioner.probs, torch.tensor([0.25, 0.0, 0.15, 0.6]))
    share = torch.bincount(conditioner.draw(40_000, None, generator(0)), minlength=4) / 40_000
    assert share[1] == 0 and float((share - conditioner.probs).abs().max()) < 4 * 0.5 / 40_000**0.5
    assert conditioner.distinct(7).tolist() == [0, 2, 3, 0, 2, 3, 0]


@of_several_numbers
def test_other_conditions_are_drawn_from_those_that_were_fitted_each_as_often(condition):
    conditioner, y, n = Conditioner(condition), values(condition, 10), 20_000
    for draw in (lambda: conditioner.draw(3, None, generator(0)), lambda: conditioner.distinct(3)):
        with pytest.raises(ValueError, match="no training conditions to sample from: y must be given"):
            draw()
    conditioner.fit(y)
    drawn = conditioner.draw(n, None, generator(0))
    assert drawn.shape == (n, *condition.shape) and drawn.dtype == y.dtype
    conditioner.check(drawn, n)
    equal = (drawn.view(n, 1, -1) == y.view(1, 10, -1)).all(2)
    assert bool((equal.sum(1) == 1).all()), "only examples that were fitted"
    share = equal.double().mean(0)
    assert float((share - 0.1).abs().max()) < 4 * math.sqrt(0.09 / n)
    assert torch.equal(conditioner.distinct(12), torch.cat([y, y[:2]]))


@every
def test_draws_of_a_sample_depend_on_its_number_alone(condition):
    conditioner = Conditioner(condition)
    conditioner.fit(values(condition, 10))
    whole = conditioner.draw(6, None, SampleStreams(3, range(6)))
    assert torch.equal(conditioner.draw(2, None, SampleStreams(3, [4, 5])), whole[4:])


@every
def test_given_conditions_are_used_as_they_are_and_checked(condition):
    conditioner, y = Conditioner(condition), values(condition, 6)
    assert conditioner.draw(6, y, None) is y
    for wrong in (y[:5], condition.null(y)):
        with pytest.raises(ValueError, match="y must be"):
            conditioner.draw(6, wrong, None)
    assert Conditioner(None).draw(6, None, None) is None and Conditioner(None).distinct(6) is None


@every
def test_conditions_outside_the_domain_are_not_fitted(condition):
    conditioner = Conditioner(condition)
    with pytest.raises(ValueError, match=condition.domain):
        conditioner.fit(condition.null(values(condition, 3)))


def test_of_many_large_conditions_a_few_are_kept_from_all_over_the_data():
    side, n = 64, 500
    y = (torch.arange(n) / n).view(n, 1, 1, 1).expand(n, 1, side, side).clone()
    conditioner = Conditioner(Image((1, side, side)))
    conditioner.fit(y)
    kept = conditioner.examples[:, 0, 0, 0]
    assert len(kept) == EXAMPLES_BYTES // (4 * side**2) < n
    assert kept[0] == y[0, 0, 0, 0] and kept[-1] == y[-1, 0, 0, 0]
    assert float(kept.diff().max()) < 3 / n


# Embeddings


@every
@pytest.mark.parametrize("null", [True, False])
def test_each_condition_has_its_own_features_and_so_has_the_null_value(condition, null):
    embedding = embed(condition, 6, null=null).double()
    y = values(condition, 5) if not isinstance(condition, ClassLabels) else torch.arange(5)
    y = torch.cat([y, condition.null(y[:1])]) if null else y
    out = embedding(y if condition.dtype else y.double())
    assert out.shape == (len(y), 6) and bool(out.isfinite().all())
    apart = torch.cdist(out, out).detach() + torch.eye(len(y))
    assert float(apart.min()) > 1e-3
    alone = embedding((y if condition.dtype else y.double())[1:3])
    torch.testing.assert_close(out[1:3], alone, rtol=1e-12, atol=1e-12)  # rows are independent


@every
@pytest.mark.parametrize("null", [True, False])
def test_gradients_reach_every_parameter_and_stay_finite(condition, null):
    embedding = embed(condition, 6, null=null).double()
    y = torch.cat([torch.arange(5), torch.arange(5)]) if isinstance(condition, ClassLabels) else values(condition, 64)
    y = torch.cat([y, condition.null(y[:2])]) if null else y
    out = embedding(y)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in embedding.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name
        if name in ("weight", "tokens.weight"):  # one row for each class or token
            assert bool(parameter.grad.any(1).all()), name


@every
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_an_embedding_may_start_as_a_constant_and_leaves_it(condition, constant):
    embedding = embed(condition, 6, null=True, constant=constant).double()
    y = values(condition, 5)
    y = torch.cat([y, condition.null(y[:1])])
    assert torch.equal(embedding(y), torch.full((6, 6), constant).double())
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    target = torch.randn(6, 6).double()
    for _ in range(3):
        optimizer.zero_grad()
        (embedding(y) * target).sum().backward()
        optimizer.step()
    assert float((embedding(y)[0] - embedding(y)[-1]).detach().abs().max()) > 1e-3


def test_the_order_of_tokens_matters():
    embedding, y = embed(Tokens(4, 7), 6), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert float((embedding(y)[0] - embedding(y)[1]).detach().abs().max()) > 1e-3


def test_without_a_condition_there_is_no_embedding():
    assert embed(None, 6) is None


# Several conditions at once


JOINT = CONDITIONS["joint"]


def test_parts_are_packed_and_unpacked_without_loss():
    assert isinstance(JOINT, Joint)
    parts = [values(part, 7) for part in JOINT.parts]
    y = JOINT.join(*parts)
    assert y.shape == (7, *JOINT.shape) and y.dtype == torch.float32
    assert all(same(part, found) for part, found in zip(parts, JOINT.split(y), strict=True))
    assert JOINT.join(*(part.double() if part.is_floating_point() else part for part in parts)).dtype == torch.float64
    large = Joint((Vector(1), Tokens(1, 2**24)))
    token = torch.tensor([[2**24 - 1]])
    assert torch.equal(large.split(large.join(torch.zeros(1, 1), token))[1], token)
    with pytest.raises(ValueError, match="integers up to"):
        Joint((ClassLabels(2**24 + 1),))


@pytest.mark.parametrize("part", range(4))
def test_each_part_may_be_null_by_itself(part):
    assert isinstance(JOINT, Joint)
    parts = [values(each, 6) for each in JOINT.parts]
    parts[part] = JOINT.parts[part].null(parts[part])
    y = JOINT.join(*parts)
    Conditioner(JOINT).check(y, 6, allow_null=True)
    with pytest.raises(ValueError, match="y must be"):
        Conditioner(JOINT).check(y, 6)
    embedding = embed(JOINT, 6, null=True)
    assert embedding is not None and bool(embedding(y).isfinite().all())
    if parts[part].ndim > 1 and parts[part].shape[1] > 1:  # null in one number alone
        halved = parts[part].clone()
        halved[0].view(-1)[0] = values(JOINT.parts[part], 1).flatten()[0]
        with pytest.raises(ValueError, match="y must be"):
            Conditioner(JOINT).check(JOINT.join(*parts[:part], halved, *parts[part + 1 :]), 6, allow_null=True)


def test_fixed_parts_are_never_null():
    condition = Joint((Vector(2), ClassLabels(3)), fixed=1)
    y = condition.join(torch.randn(5, 2), torch.arange(5) % 3)
    vector, label = condition.split(condition.null(y))
    assert torch.equal(vector, y[:, :2]) and bool((label == 3).all())
    dropped = Conditioner(condition, 1.0).drop(y, None)
    assert dropped is not None and torch.equal(dropped, condition.null(y))
    Conditioner(condition).check(dropped, 5, allow_null=True)
    with pytest.raises(ValueError, match="y must be"):
        Conditioner(condition).check(condition.join(torch.full((5, 2), torch.nan), label), 5, allow_null=True)
    assert [name for name, _ in embed(condition, 6, null=True).named_parameters() if "null" in name] == []  # type: ignore[union-attr]
    assert bool(condition.missing(2, torch.device("cpu"), torch.float64).isfinite().all())


def test_the_embedding_of_several_conditions_is_the_sum_of_theirs():
    assert isinstance(JOINT, Joint)
    embedding = embed(JOINT, 6)
    y = values(JOINT, 5)
    parts = zip(embedding.parts, JOINT.split(y), strict=True)  # type: ignore[union-attr]
    torch.testing.assert_close(embedding(y), sum(part(value) for part, value in parts))  # type: ignore[misc]


def test_image_conditions_are_channels_of_the_input():
    condition = Joint((Image((2, 2, 2)), ClassLabels(3)), fixed=1)
    channels = ImageChannels(condition)
    assert channels.channels == 2 and channels.rest == ClassLabels(3)
    image, x = torch.rand(5, 2, 2, 2), torch.rand(5, 1, 4, 4)
    y = condition.join(image, torch.arange(5) % 3)
    h, rest = channels(x, y)
    assert torch.equal(h[:, :1], x) and torch.equal(rest, torch.arange(5) % 3)
    torch.testing.assert_close(h[:, 1:], torch.nn.functional.interpolate(image, (4, 4), mode="bilinear"))
    whole, nothing = ImageChannels(Image((2, 4, 4)))(x, torch.full((5, 2, 4, 4), torch.nan))
    assert nothing is None and torch.equal(whole[:, 1:], torch.zeros(5, 2, 4, 4))
    assert ImageChannels(ClassLabels(3))(x, torch.arange(5) % 3)[0] is x


# State


@every
def test_what_was_fitted_travels_with_the_weights(condition):
    conditioner, other = Conditioner(condition), Conditioner(condition)
    y = torch.tensor([0, 0, 0, 1]) if isinstance(condition, ClassLabels) else values(condition, 9)
    conditioner.fit(y)
    state = copy.deepcopy(conditioner.state_dict())
    assert set(state) == {"probs" if isinstance(condition, ClassLabels) else "examples"}
    for target in (other, conditioner):  # which has none yet, and which has some
        target.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
        assert torch.equal(target.draw(20, None, generator(0)), conditioner.draw(20, None, generator(0)))
    other.fit(y[:2])
    other.load_state_dict(state)
    assert torch.equal(other.draw(20, None, generator(0)), conditioner.draw(20, None, generator(0)))
    assert torch.equal(copy.deepcopy(other).draw(20, None, generator(0)), other.draw(20, None, generator(0)))


def test_examples_of_another_shape_are_not_loaded():
    conditioner = Conditioner(Vector(3))
    conditioner.fit(torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="size mismatch for examples"):
        Conditioner(Vector(2)).load_state_dict(conditioner.state_dict())


@every
def test_a_model_is_saved_with_its_conditions(condition):
    model, other = (VAE((2,), condition) for _ in range(2))
    model.conditioner.fit(values(condition, 9))
    other.load_state_dict(model.state_dict())
    one, two = (m.eval().sample(4, rng=generator(0)).x for m in (model, other))
    assert torch.equal(one, two)


@every
def test_examples_take_on_the_type_of_the_model(condition):
    conditioner = Conditioner(condition).double()
    conditioner.fit(values(condition, 9))
    assert conditioner.draw(3, None, None).dtype == (condition.dtype or torch.float64)


# Families with their default networks


FAMILIES = {
    "autoregressive": Autoregressive,
    "ddpm": DDPM,
    "flow_matching": FlowMatching,
    "ebm": functools.partial(ebm, steps=3, sampling_steps=5, buffer_size=100),
    "gan": GAN,
    "glow": Glow,
    "hvae": HVAE,
    "maf": MAF,
    "nsf": NSF,
    "r3gan": R3GAN,
    "realnvp": RealNVP,
    "score_sde": ScoreSDE,
    "vae": VAE,
    "vqvae": VQVAE,
    "wgan": WGAN,
    "wgan_gp": WGANGP,
    "latent of vae": functools.partial(latent, codec=functools.partial(VAE, latent_dim=4), prior=FlowMatching),
    "latent of vqvae": functools.partial(latent, codec=VQVAE, prior=Autoregressive),
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
EVENTS = {"vectors": ((2,), None), "grey": ((1, 8, 8), 256), "colour": ((3, 8, 8), 256)}


def built(family, shape: tuple[int, ...], levels: int | None, condition: Condition | None = None) -> GenerativeModel:
    torch.manual_seed(0)
    if isinstance(family, functools.partial):  # a function, which takes no shape in place of an event
        return family(EventSpec(shape, levels), condition)
    args = () if condition is None else (condition,)
    return family(shape, *args) if levels is None else family(shape, *args, levels=levels)


def events(model: GenerativeModel, n: int) -> Tensor:
    x = torch.randn(n, *model.shape, generator=generator("events"))
    return x if model.levels is None else x.tanh()


def trained(model: GenerativeModel, n: int, y: Tensor | None = None) -> None:
    """Check the loss and its gradients at the first step, and end it."""
    x, rng = events(model, n), generator("noise")
    model.train().initialize(x, y, rng=rng)
    for turn in model.networks() if isinstance(model, Adversarial) else (None,):
        model.zero_grad()
        loss = model.loss(x, y, rng=rng, **({"turn": turn} if turn else {}))
        assert loss.total.shape == () and bool(loss.total.isfinite())
        assert all(bool(term.isfinite()) and not term.requires_grad for term in loss.terms.values())
        loss.total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(bool(g.isfinite().all()) for g in gradients)
        model.after_step(loss.aux, n, rng=rng)


def sampled(model: GenerativeModel, n: int, y: Tensor | None = None) -> None:
    """Check the samples; of a few steps where the default sampler takes hundreds."""
    if isinstance(model, ScoreSDE):
        model.sampler.steps = 10
    x = model.eval().sample(n, y, rng=generator("samples")).x
    assert x.shape == (n, *model.shape) and bool(x.isfinite().all()) and not x.requires_grad
    if model.levels is not None:  # a logit of [.05, .95] leaves flows a little room beyond the interval
        assert float(x.abs().max()) <= (1 / 0.9 if isinstance(model, Flow) else 1)


@families
@pytest.mark.parametrize("event", [((2,), None), ((1, 28, 28), 256), ((3, 32, 32), 256)], ids=EVENTS)
def test_a_shape_and_levels_are_enough_to_train_a_family(family, event):
    model = built(family, *event)
    assert model.event == EventSpec(*event) and model.condition is None
    assert (model.shape, model.levels, model.dim) == (*event, math.prod(event[0]))
    trained(model, 2)


@families
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_a_shape_and_levels_are_enough_to_sample_from_a_family(family, event):
    model = built(family, *event)
    trained(model, 4)
    sampled(model, 3)


@families
@pytest.mark.parametrize("event", [EVENTS["vectors"], EVENTS["grey"]], ids=["vectors", "grey"])
@every
def test_a_family_takes_every_condition(family, event, condition):
    model, y = built(family, *event, condition), values(condition, 4)
    assert model.condition == condition
    with pytest.raises(ValueError, match="this model is conditional"):
        model.loss(events(model, 4))
    trained(model, 4, y)
    sampled(model, 4, y)
    model.conditioner.fit(y)
    sampled(model, 3)


@pytest.mark.parametrize("family", [DDPM, FlowMatching, ScoreSDE])
@every
def test_a_denoiser_learns_from_dropped_conditions(family, condition):
    """With all of them dropped the loss does not depend on the conditions, and is finite with its gradients."""
    model = family((2,), condition, condition_dropout=1.0)
    x, losses = events(model, 8), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for seed in (0, 1):
        loss = model.loss(x, values(condition, 8, seed), rng=generator(0)).total
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] and math.isfinite(losses[0])
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    x_t, t, y = x, torch.full((8,), 0.5), values(condition, 8)
    torch.testing.assert_close(model.denoise(x_t, t), model.denoise(x_t, t, condition.null(y)), rtol=0, atol=0)
    assert not torch.equal(model.denoise(x_t, t), model.denoise(x_t, t, y))


@of_several_numbers
def test_ranks_that_share_a_batch_pair_noise_by_whole_conditions(condition, monkeypatch):
    """Two ranks with the same share: each condition occurs once on either, and noise changes places between the two alone."""
    x, eps, y = torch.randn(4, 2), torch.randn(4, 2), values(condition, 4)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda tensor: torch.stack([tensor, tensor]))
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert torch.equal(minibatch_ot(x, eps, y), eps)
