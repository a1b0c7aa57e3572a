r"""unCLIP: with exact parts its samples have the joint distribution in closed form, whatever the scale of the embeddings.

Conditions are y ~ N(0, I), events x = B y + L eps, so that p(x | y) = N(B y, S) with S = L L', and the encoder is the linear
e = A x. Then

    p(e | y) = N(A B y, A S A'),    p(x | e, y) = N(B y + K (e - A B y), S - K A S),    K = S A' (A S A')^-1.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Joint, Vector
from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.diffusion.guidance import ClassifierFreeGuidance, guide
from genzoo.diffusion.samplers import DDIM
from genzoo.event import EventSpec
from genzoo.families.clip import Contrastive
from genzoo.families.ddpm import DDPM
from genzoo.families.gan import WGANGP
from genzoo.families.unclip import Standardisation, UnCLIP
from genzoo.families.vae import VAE
from genzoo.model import AbilityError, GenerativeModel, Loss, Samples, SharedEmbedding
from genzoo.nn.mlp import MLP, TimeMLP
from genzoo.numerics.random import SampleStreams, generator, randn
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule

A = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]], dtype=torch.float64)
L = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.7, 0.0], [-0.3, 0.2, 0.5]], dtype=torch.float64)
S = L @ L.T
C = A @ S @ A.T
K = S @ A.T @ torch.linalg.inv(C)
MEAN, STD = torch.tensor([0.7, -2.0], dtype=torch.float64), torch.tensor([3.0, 0.2], dtype=torch.float64)


class Linear(SharedEmbedding):
    """The encoder e = A x; texts are embedded as themselves. It is known and has no weights to train."""

    def __init__(self, event: EventSpec, condition: Vector):
        super().__init__(event, condition)
        self.embedding_dim = 2

    @property
    def scale(self) -> Tensor:
        return torch.ones(())

    def _embed_image(self, x: Tensor) -> Tensor:
        return x @ A.T

    def _embed_text(self, y: Tensor) -> Tensor:
        return y

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        raise AssertionError("a known encoder is not trained")


class Normal(GenerativeModel):
    """N(f(y), F F') of a condition, whose loss records what it is told."""

    def __init__(self, event: EventSpec, condition: Joint, mean, factor: Tensor):
        super().__init__(event, condition)
        self.mean, self.factor, self.seen = mean, factor, list[tuple[Tensor, Tensor]]()
        self.weight = nn.Parameter(torch.zeros(()))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        self.seen.append((x, y))
        total = self.weight.square()
        return Loss(total, {"total": total.detach()})

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        eps = randn((n, *self.shape), rng=rng, dtype=torch.float64)
        return Samples(self.mean(*self.condition.split(y)) + eps @ self.factor.T, nfe=3)


def exact_prior(event: EventSpec, condition: Joint) -> Normal:
    """p(e | y), of standardised embeddings; the embedding of the text, y itself, is standardised too."""

    def mean(text: Tensor, y: Tensor) -> Tensor:
        torch.testing.assert_close(text * STD + MEAN, y)
        return (y @ (A @ B).T - MEAN) / STD

    return Normal(event, condition, mean, torch.linalg.cholesky(C) / STD[:, None])


def exact_decoder(event: EventSpec, condition: Joint) -> Normal:
    """p(x | e, y)."""

    def mean(z: Tensor, y: Tensor) -> Tensor:
        e = z * STD + MEAN
        return y @ B.T + (e - y @ (A @ B).T) @ K.T

    values, vectors = torch.linalg.eigh(S - K @ A @ S)  # of rank 1
    return Normal(event, condition, mean, vectors * values.clamp(min=0).sqrt())


def exact(**settings) -> UnCLIP:
    model = UnCLIP(
        EventSpec((3,)),
        Vector(2),
        encoder=Linear,
        prior=exact_prior,
        decoder=exact_decoder,
        **{"candidates": 1, **settings},
    ).double()
    model.transform.mean.copy_(MEAN)
    model.transform.std.copy_(STD)
    return model.eval()


def rows(n: int, d: int, name: str = "rows") -> Tensor:
    return torch.randn(n, d, generator=generator(name), dtype=torch.float64)


def moments(x: Tensor, y: Tensor) -> Tensor:
    """Second moments of (x, y), (5, 5)."""
    joint = torch.cat([x, y], dim=1)
    return joint.T @ joint / len(joint)


# Sampling


def test_prior_and_decoder_together_draw_from_the_joint_distribution():
    n = 200_000
    y = rows(n, 2, "y")
    x, nfe, _ = exact().sample(n, y, rng=generator("samples"))
    expected = torch.cat([torch.cat([B @ B.T + S, B], dim=1), torch.cat([B.T, torch.eye(2).double()], dim=1)])
    torch.testing.assert_close(moments(x, y), expected, atol=0.05, rtol=0.02)
    assert nfe == 6


def test_an_embedding_is_decoded_to_events_that_have_it():
    y, e = rows(500, 2, "y"), rows(500, 2, "e")
    x, nfe, _ = exact().from_embedding(e, y, rng=generator("samples"))
    torch.testing.assert_close(x @ A.T, e)
    assert nfe == 3


def test_of_several_candidates_the_nearest_to_the_text_is_decoded():
    model, y = exact(candidates=4), rows(300, 2, "y")
    one = exact()
    rng = SampleStreams(0, range(300))
    drawn = torch.stack([one.draw_embeddings(y, rng).x for _ in range(4)])
    z, nfe, _ = model.draw_embeddings(y, SampleStreams(0, range(300)))
    cosines = torch.cosine_similarity(drawn * STD + MEAN, y, dim=2)
    torch.testing.assert_close(z, drawn[cosines.argmax(0), torch.arange(300)])
    assert nfe == 12
    assert (cosines.argmax(0) > 0).double().mean() > 0.5, "all candidates are chosen"


# Training


def test_embeddings_are_standardised_by_the_moments_of_the_first_batch():
    model = exact().train()
    model.transform.mean.zero_()
    model.transform.std.fill_(1.0)
    x = rows(50, 3, "x") * torch.tensor([2.0, 0.3, 5.0])
    prior, decoder = model.stages()
    prior.module.initialize(x, rows(50, 2, "y"))
    e = x @ A.T
    torch.testing.assert_close(model.transform.mean, e.mean(0))
    torch.testing.assert_close(model.transform.std, e.std(0, correction=0))
    torch.testing.assert_close(model.transform.inverse(model.transform(e)), e)
    before = model.transform.std.clone()
    decoder.module.initialize(3 * x, rows(50, 2, "y"))
    assert torch.equal(model.transform.std, before)


def test_a_coordinate_that_does_not_vary_is_not_magnified():
    transform = Standardisation(2).double()
    transform.init_statistics(torch.cat([rows(20, 1), torch.ones(20, 1).double()], dim=1))
    assert float(transform(torch.tensor([[0.0, 1.0001]], dtype=torch.float64)).abs()[0, 1]) <= 1.01


def test_stages_are_told_standardised_embeddings_and_texts():
    model, x, y = exact().train(), rows(7, 3, "x"), rows(7, 2, "y")
    prior, decoder = model.stages()
    prior.module.loss(x, y)
    decoder.module.loss(x, y)
    z = (x @ A.T - MEAN) / STD
    ((event, given),) = model.embedding_prior.seen
    torch.testing.assert_close(event, z)
    torch.testing.assert_close(given, torch.cat([(y - MEAN) / STD, y], dim=1))
    ((event, given),) = model.prior.seen
    torch.testing.assert_close(event, x)
    torch.testing.assert_close(given, torch.cat([z, y], dim=1))


def test_shares_of_the_budget():
    names = [(stage.name, stage.fraction) for stage in exact(prior_fraction=0.3).stages()]
    assert names == [("prior", 0.3), ("decoder", 0.7)]
    stages = trained_parts(encoder_fraction=0.4, prior_fraction=0.25).stages()
    assert [stage.name for stage in stages] == ["contrastive", "prior", "decoder"]
    assert [stage.fraction for stage in stages] == pytest.approx([0.4, 0.15, 0.45])


# With networks

small, timed = functools.partial(MLP, width=16, depth=1), functools.partial(TimeMLP, width=16, depth=1)


def trained_parts(condition=ClassLabels(3), **settings) -> UnCLIP:
    torch.manual_seed(0)
    sampler = functools.partial(DDIM, steps=3)
    denoiser = functools.partial(DDPM, network=timed)
    parts = {
        "encoder": functools.partial(Contrastive, network=small, dim=4, text_width=8),
        "prior": functools.partial(denoiser, sampler=sampler(), prediction="x0"),
        "decoder": functools.partial(denoiser, sampler=sampler(), condition_dropout=[0.1, 0.5]),
    }
    return UnCLIP(EventSpec((2,)), condition, **{**parts, **settings})


def test_embedding_and_text_are_dropped_independently():
    """In the training of the decoder; the prior drops both together."""
    model, seen = trained_parts().train(), list[Tensor]()

    class Recorder(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append(y)
            return x_t

    model.prior.network = model.embedding_prior.network = Recorder()
    n = 20_000
    x, y = rows(n, 2, "x").float(), torch.arange(n) % 3
    prior, decoder = model.stages()[1:]
    for stage in (prior, decoder):
        stage.module.loss(x, y, rng=generator("dropped"))
    null = [
        torch.stack([part.is_null(v) for part, v in zip(model.joint.parts, model.joint.split(y), strict=True)])
        for y in seen
    ]
    together, apart = (values.double() for values in null)
    assert torch.equal(together[0], together[1]) and float(together[0].mean()) == pytest.approx(0.1, abs=0.01)
    assert apart.mean(1).tolist() == pytest.approx([0.1, 0.5], abs=0.015)
    assert float((apart[0] * apart[1]).mean()) == pytest.approx(0.05, abs=0.007)


def test_the_encoder_is_frozen_after_its_stage():
    model = trained_parts().train()
    x, y = rows(16, 2, "x").float(), torch.arange(16) % 3
    for stage in model.stages()[1:]:
        stage.module.loss(x, y, rng=generator("loss")).total.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.encoder.training and not any(p.grad is None for p in model.prior.parameters())


def test_a_pretrained_encoder_has_no_stage_and_keeps_its_weights():
    torch.manual_seed(0)
    encoder = Contrastive(EventSpec((2,)), ClassLabels(3), network=small, dim=4, text_width=8).requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = trained_parts(encoder=encoder)
    assert [stage.name for stage in model.stages()] == ["prior", "decoder"]
    split = Split(rows(32, 2).float(), torch.arange(32) % 3)
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    module = GenerativeModule(model, adam, Batches(split, 8, seed=0), Budget(images=8 * 12))
    module.make_plan()
    while not module.finished:
        module.step()
    for name, value in model.encoder.state_dict().items():
        assert name.startswith("conditioner") or torch.equal(value, before[name]), name
    assert float(model.transform.std.min()) > 0 and not torch.equal(model.transform.std, torch.ones(4))


# Guidance


def test_guidance_is_the_decoder_s_and_a_key_guides_the_prior():
    model, y = trained_parts().eval(), torch.arange(6) % 3
    plain = model.sample(6, y, rng=SampleStreams(0, range(6)))
    assert plain.nfe == 2 * 3 + 3
    guided = guide(model, functools.partial(ClassifierFreeGuidance, scale=2.0))
    assert guided.condition == model.condition
    found = guided.sample(6, y, rng=SampleStreams(0, range(6)))
    assert found.nfe == 2 * 3 + 2 * 3
    z = model.draw_embeddings(y, SampleStreams(0, range(6))).x
    rng = SampleStreams(0, range(6))
    model.draw_embeddings(y, rng)
    by_hand = DDIM(steps=3)(ClassifierFreeGuidance(model.prior, 2.0), 6, model.joint.join(z, y), rng)
    torch.testing.assert_close(found.x, by_hand.x)

    model.prior_guidance = 3.0
    rng = SampleStreams(0, range(6))
    z, nfe, _ = model.draw_embeddings(y, rng)
    text = model.transform(model.embed_text(y))
    rng = SampleStreams(0, range(6))
    prior = ClassifierFreeGuidance(model.embedding_prior, 3.0)
    drawn = [DDIM(steps=3)(prior, 6, model.joint.join(text, y), rng).x for _ in range(2)]
    cosines = torch.stack([torch.cosine_similarity(model.transform.inverse(z), model.embed_text(y)) for z in drawn])
    torch.testing.assert_close(z, torch.stack(drawn)[cosines.argmax(0), torch.arange(6)])
    assert nfe == 2 * 2 * 3
    assert model.sample(6, y, rng=SampleStreams(0, range(6))).nfe == 2 * 2 * 3 + 3


def test_events_are_restored_from_their_noise_and_embedding():
    model = trained_parts().double().eval()
    with torch.no_grad():
        for p in model.prior.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator("weights"))
    for name, buffer in model.named_buffers():
        if name.endswith("frequencies"):
            buffer *= 0.02  # so that the ODE is smooth
    x = rows(5, 2, "x")
    e = model.embed_image(x)
    noise = model.invert(x, e)
    torch.testing.assert_close(model.from_embedding(e, noise=noise).x, x, atol=5e-3, rtol=5e-3)
    moved = model.from_embedding(e.flip(0), noise=noise).x
    assert float((moved - x).abs().max()) > 0.02
    again = model.from_embedding(e, noise=noise, rng=generator("unused")).x
    torch.testing.assert_close(again, model.from_embedding(e, noise=noise).x)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates must be at least 1, not 0"),
        ({"encoder_fraction": 1.0}, "encoder_fraction must be between 0 and 1"),
        ({"prior_fraction": 0.0}, "prior_fraction must be between 0 and 1"),
        ({"decoder": WGANGP}, "WGANGP has no single training loss"),
        ({"encoder": VAE}, "encoder: VAE is no contrastive network"),
        ({"encoder": Contrastive(EventSpec((2,)), ClassLabels(4), network=small)}, r"encoder: is for .*n=4.*the data are"),
        ({"prior": functools.partial(DDPM, condition_dropout=0.0), "prior_guidance": 2.0}, "prior_guidance=2.0: .*dropout=0"),
        ({"condition": None}, r"data\.conditional=true"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        trained_parts(**settings)


def test_a_decoder_without_noise_cannot_restore():
    model = exact()
    with pytest.raises(AbilityError, match="Normal has no noise"):
        model.invert(rows(2, 3), rows(2, 2))
    with pytest.raises(ValueError, match=r"e must be \(B, 2\), not \(2, 3\)"):
        model.from_embedding(rows(2, 3))
