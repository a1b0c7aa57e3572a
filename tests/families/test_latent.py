r"""Latent models: with every part known in closed form their bound is the likelihood itself, whatever the scale of the latents.

The codec is probabilistic PCA, x = W z + mu + s eps with orthogonal columns of W; the prior is z ~ N(m, diag v). Then

    p(x) = N(W m + mu, W diag(v) W' + s^2 I),    p(z | x) = N(C (W'(x - mu)/s^2 + m/v), C),    C^-1 = W'W/s^2 + diag(1/v)

and with q(z | x) = p(z | x) the bound is log p(x) at every single draw.
"""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from genzoo.conditions import ClassLabels
from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.distributions.discretization import bin_center, quantize
from genzoo.distributions.likelihoods import Gaussian
from genzoo.event import EventSpec
from genzoo.families.ddpm import DDPM
from genzoo.families.gan import WGANGP
from genzoo.families.latent import Dequantized, LatentDensity, LatentModel, Standardized, latent
from genzoo.families.realnvp import RealNVP
from genzoo.families.vae import VAE
from genzoo.families.vqvae import VQVAE
from genzoo.loading import set_sampler
from genzoo.model import Bound, Continuous, Density, Discrete, LogProb, Loss, Samples, frozen
from genzoo.nn.mlp import MLP, TimeMLP
from genzoo.numerics.random import generator, rand, randn
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule

W = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -0.5], [0.0, 0.0]], dtype=torch.float64)
MU = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.3], dtype=torch.float64)
NOISE = 0.3
M, V = torch.tensor([1.5, -0.7], dtype=torch.float64), torch.tensor([0.4, 2.5], dtype=torch.float64)
LAW = MultivariateNormal(W @ M + MU, W @ V.diag() @ W.T + NOISE * torch.eye(5).double())
small = functools.partial(MLP, width=8, depth=1)


class Normal(Density):
    """An exact prior N(mean, diag var)."""

    bound = Bound.EXACT

    def __init__(self, event, condition=None, mean=0.0, var=1.0):
        super().__init__(event, condition)
        self.mean = nn.Parameter(torch.as_tensor(mean, dtype=torch.float64).expand(self.shape).clone())
        self.var = torch.as_tensor(var, dtype=torch.float64).expand(self.shape)

    def _log_prob(self, x, y, num_samples, rng):
        self.draws = num_samples
        standard = (x - self.mean) ** 2 / self.var
        return LogProb((-0.5 * (standard + self.var.log() + math.log(2 * math.pi))).flatten(1).sum(1))

    def _loss(self, x, y, rng):
        self.seen = x
        nll = -self._log_prob(x, y, 1, rng).value.mean()
        return Loss(nll, {"nll": nll.detach()})

    def _sample(self, n, y, rng):
        return Samples(self.mean + self.var.sqrt() * randn((n, *self.shape), rng=rng, dtype=torch.float64), nfe=3)


class Dice(Density):
    """An exact prior of integers, independent at each place."""

    bound = Bound.EXACT

    def __init__(self, event, condition=None):
        super().__init__(event, condition)
        self.logits = nn.Parameter(torch.randn(event.levels, generator=generator("dice"), dtype=torch.float64))

    def _log_prob(self, x, y, num_samples, rng):
        log_p = self.logits.log_softmax(0)[quantize(x, self.levels)].flatten(1).sum(1)
        return LogProb(log_p + self.dim * math.log(self.levels / 2))

    def _loss(self, x, y, rng):
        nll = -self._log_prob(x, y, 1, rng).value.mean()
        return Loss(nll, {"nll": nll.detach()})

    def _sample(self, n, y, rng):
        u = rand((n, *self.shape), rng=rng).double()
        k = torch.searchsorted(self.logits.softmax(0).cumsum(0), u).clamp(max=self.levels - 1)
        return Samples(bin_center(k, self.levels, torch.float64), nfe=1)


def linear(in_shape, out_shape, condition) -> nn.Module:
    class Linear(nn.Linear):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x)

    return Linear(math.prod(in_shape), math.prod(out_shape))


def ppca() -> VAE:
    """The codec, whose q(z | x) is the posterior under the prior N(M, diag V)."""
    codec = VAE(
        (5,), encoder=linear, decoder=linear, likelihood=Gaussian(), latent_dim=2, sample_likelihood=True
    ).double()
    C = 1 / ((W.T @ W).diag() / NOISE + 1 / V)
    with torch.no_grad():
        codec.likelihood.log_var.fill_(math.log(NOISE))
        codec.decoder.weight.copy_(W)
        codec.decoder.bias.copy_(MU)
        gain = C[:, None] * W.T / NOISE
        codec.encoder.weight.copy_(torch.cat([gain, torch.zeros(2, 5)]))
        codec.encoder.bias.copy_(torch.cat([C * M / V - gain @ MU, C.log()]))
    return codec


def exact(mean: Tensor, std: Tensor) -> LatentDensity:
    """The latent model whose latents are standardised by ``mean`` and ``std``, its prior expressed in them."""
    prior = functools.partial(Normal, mean=(M - mean) / std, var=V / std**2)
    model = latent(EventSpec((5,)), codec=ppca(), prior=prior).double()
    model.transform.mean.copy_(mean)
    model.transform.std.copy_(std)
    return model.eval()


SCALES = [(torch.zeros(2), torch.ones(2)), (torch.tensor([3.0, -1.0]), torch.tensor([0.1, 7.0]))]


@pytest.mark.parametrize("mean, std", SCALES)
def test_with_exact_parts_the_bound_is_the_likelihood_at_every_draw(mean, std):
    x, model = LAW.sample((50,)), exact(mean.double(), std.double())
    assert model.bound is Bound.LOWER
    for seed in range(3):
        value, stderr = model.log_prob(x, rng=generator(seed))
        torch.testing.assert_close(value, LAW.log_prob(x), rtol=0, atol=1e-9)
        assert stderr is None


def test_a_wrong_prior_costs_its_divergence_from_the_exact_posterior():
    """With the prior N(0, I) and q unchanged, bound = log p(x | N(0, I)) - KL(q || its posterior), in closed form."""
    x = LAW.sample((1,)).repeat(100_000, 1)
    model = latent(EventSpec((5,)), codec=ppca(), prior=Normal).double().eval()
    values = model.log_prob(x).value.detach()
    mean, log_var = model.codec.posterior(x[:1])
    q, prior = mean[0].detach(), log_var[0].exp().detach()
    fit = -0.5 * (((x[0] - MU - W @ q) ** 2).sum() + (W.square().sum(0) * prior).sum()) / NOISE
    fit = fit - 2.5 * math.log(2 * math.pi * NOISE)
    kl = 0.5 * (prior + q**2 - 1 - prior.log()).sum()
    assert float(values.mean()) == pytest.approx(float(fit - kl), abs=4 * float(values.std()) / 100_000**0.5)


@pytest.mark.parametrize("mean, std", SCALES)
def test_samples_follow_the_law_whatever_the_scale(mean, std):
    model = exact(mean.double(), std.double())
    x, nfe, _ = model.sample(200_000, rng=generator("law"))
    torch.testing.assert_close(x.mean(0), LAW.mean, rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(x.T), LAW.covariance_matrix, rtol=0.02, atol=0.06)
    assert nfe == 3 + 1


def test_its_own_latents_are_those_of_the_prior():
    model = exact(torch.tensor([3.0, -1.0]).double(), torch.tensor([0.1, 7.0]).double())
    x = LAW.sample((6,))
    z = model.encode(x)
    torch.testing.assert_close(z * model.transform.std + model.transform.mean, model.codec.encode(x))
    torch.testing.assert_close(model.decode(z), model.codec.decode(model.codec.encode(x)))


# The transform


@pytest.mark.parametrize("shape", [(3,), (3, 4, 4)])
def test_latents_are_standardised_by_the_batch_that_initialises(shape):
    transform = Standardized(Continuous(shape)).double()
    z = 5 * torch.randn(64, *shape).double() + 2
    assert torch.equal(transform(z), z) and float(transform.log_det()) == 0
    transform.init_statistics(z)
    rows = transform(z).transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.var(1, correction=0), torch.ones(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(transform.inverse(transform(z)), z)
    jacobian = torch.autograd.functional.jacobian(lambda point: transform(point[None])[0], z[0])
    size = math.prod(shape)
    assert float(transform.log_det()) == pytest.approx(float(torch.linalg.slogdet(jacobian.view(size, size))[1]))
    other = Standardized(Continuous(shape)).double()
    other.load_state_dict(transform.state_dict())
    assert torch.equal(other(10 * z), transform(10 * z)), "the statistics are part of the state"


def test_a_latent_that_never_varies_does_not_divide_by_zero():
    transform = Standardized(Continuous((2,)))
    transform.init_statistics(torch.ones(8, 2))
    assert bool(transform(torch.ones(8, 2)).isfinite().all())


def test_codes_come_back_from_anywhere_in_their_bins():
    transform = Dequantized(Discrete((1, 4, 4), 512))
    k = torch.randint(512, (64, 1, 4, 4))
    event = transform(k, generator(0))
    assert torch.equal(transform.inverse(event), k) and float((event - bin_center(k, 512)).std()) > 0.5 / 512
    assert float(transform.log_det()) == pytest.approx(-16 * math.log(256))


# Codes


def vq(condition: ClassLabels | None = None, **settings) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(
        (2,),
        condition,
        encoder=small,
        decoder=small,
        likelihood=Gaussian(),
        codebook_size=5,
        embedding_dim=3,
        **settings,
    )


def test_the_bound_of_codes_is_their_probability_and_the_likelihood_of_what_they_decode_to():
    model, x = latent(EventSpec((2,)), codec=vq(), prior=Dice).double().eval(), torch.randn(40, 2).double()
    k = model.codec.encode(x)
    log_P = model.prior.logits.log_softmax(0)[k].flatten(1).sum(1)
    mean, log_var = model.codec.decode(k), model.codec.likelihood.log_var
    log_p = -0.5 * ((x - mean) ** 2 / log_var.exp() + log_var + math.log(2 * math.pi)).sum(1)
    value, stderr = model.log_prob(x, rng=generator(0))
    torch.testing.assert_close(value, log_P + log_p, rtol=0, atol=1e-12)
    assert stderr is None and torch.equal(model.encode(x), k) and model.latent == Discrete((1, 2, 1), 5)


def test_a_continuous_prior_bounds_the_probability_of_codes():
    """On spread codes a density of [-1, 1]^D bounds the sum over its bins (Theis et al. 2016)."""
    model = (
        latent(EventSpec((2,)), codec=vq(tokens=1), prior=functools.partial(Normal, mean=0.2, var=0.3)).double().eval()
    )
    k = torch.arange(5).view(5, 1, 1, 1).repeat_interleave(20_000, 0)
    event = model.transform(k, generator("spread"))
    bound = (model.prior.log_prob(event).value + model.transform.log_det()).detach().view(5, -1).mean(1)
    edges = (torch.linspace(-1, 1, 6).double() - 0.2) / 0.3**0.5
    probability = torch.special.ndtr(edges).diff()
    assert bool((bound < probability.log()).all()) and float((probability.log() - bound).max()) < 0.1


def test_samples_are_draws_of_the_prior_decoded():
    model = latent(EventSpec((2,)), codec=vq(tokens=1), prior=Dice).double().eval()
    x = model.sample(20_000, rng=generator("codes")).x
    events = model.codec.decode(torch.arange(5).view(5, 1, 1, 1))
    k = torch.cdist(x, events.detach()).argmin(1)
    torch.testing.assert_close(x, events[k].detach())
    share = torch.bincount(k, minlength=5) / 20_000
    assert float((share - model.prior.logits.softmax(0)).abs().max()) < 4 * 0.5 / 20_000**0.5


# Stages


def test_the_stage_of_the_prior_owns_no_weight_of_the_codec_and_leaves_its_codebook_alone():
    model, x = (
        latent(EventSpec((2,)), codec=vq(), prior=Dice, codec_share=0.3).double().train(),
        torch.randn(40, 2).double(),
    )
    first, second = model.stages()
    assert (first.name, first.fraction, second.name, second.fraction) == ("codec", 0.3, "prior", 0.7)
    assert {id(p) for p in second.module.parameters()} == {id(p) for p in model.prior.parameters()}
    before = copy.deepcopy(model.codec.state_dict())
    second.module.loss(x, rng=generator(0)).total.backward()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.codec.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.codec.parameters()) and model.codec.training
    loss = first.module.loss(x, rng=generator(0))
    first.module.after_step(loss.aux, len(x), rng=generator(0))
    assert not torch.equal(before["quantizer.codes"], model.codec.quantizer.codes)


def test_the_prior_learns_from_draws_of_the_posterior_of_a_codec_at_rest():
    class Forgetful(nn.Module):
        def __init__(self, *shapes):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.dropout(torch.cat([x[:, :2], 0 * x[:, :2] - 4], 1))

    codec = VAE((5,), encoder=Forgetful, decoder=linear, likelihood=Gaussian(), latent_dim=2).double()
    model = latent(EventSpec((5,)), codec=codec, prior=Normal).double().train()
    x = torch.full((20_000, 5), 3.0).double()
    stage = model.stages()[-1].module
    stage.loss(x, rng=generator(0))
    seen = model.prior.seen
    assert float(seen.mean()) == pytest.approx(3.0, abs=0.01), "dropout would have hidden half"
    assert float(seen.std()) == pytest.approx(math.exp(-2), rel=0.02), "the mean alone would not vary"


@pytest.mark.parametrize("whole", [True, False], ids=["model", "stage"])
def test_the_scale_is_that_of_the_batch_that_initialises(whole):
    model, x = latent(EventSpec((5,)), codec=ppca(), prior=Normal).double(), LAW.sample((256,))
    for mode in (model.eval(), model.train()):
        mode.loss(x, rng=generator(0))
        assert torch.equal(model.transform.std, torch.ones(2).double()) and not model.transform.mean.any()
    (model if whole else model.stages()[-1].module).initialize(x, rng=generator(0))
    model.loss(x, rng=generator(0))
    assert float(model.prior.seen.mean(0).abs().max()) < 1e-9
    assert float((model.prior.seen.std(0, correction=0) - 1).abs().max()) < 1e-9
    assert float((model.transform.std - 1).abs().min()) > 0.1


def test_a_step_of_the_whole_model_ends_as_one_of_its_last_stage():
    steps = []

    class Counted(Normal):
        def after_step(self, aux, batch_size, *, rng=None):
            steps.append(batch_size)
            return {"steps": torch.tensor(len(steps))}

    model = latent(EventSpec((5,)), codec=ppca(), prior=Counted).double()
    assert model.after_step({}, 7) == {"steps": 1} and steps == [7]


def test_a_codec_whose_weights_are_fixed_is_finished():
    model = latent(EventSpec((2,)), codec=frozen(vq()), prior=Dice, codec_share=0.3)
    assert [(stage.name, stage.fraction) for stage in model.stages()] == [("prior", 1.0)]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.prior.parameters()}


def test_the_codec_of_a_latent_model_may_get_another_prior():
    first = latent(EventSpec((2,)), codec=vq(), prior=Dice)
    second = latent(EventSpec((2,)), codec=first, prior=functools.partial(Normal, mean=0.1))
    assert second.codec is first.codec and isinstance(second.prior, Normal)


# What the pair can do follows from its parts


ddpm = functools.partial(DDPM, network=functools.partial(TimeMLP, width=8, depth=1))


class Guess(Normal):
    bound = Bound.ESTIMATE


def test_abilities_follow_from_the_parts():
    vae = functools.partial(VAE, (2,), encoder=small, decoder=small, likelihood=Gaussian(), latent_dim=2)
    assert latent(EventSpec((2,)), codec=vae(), prior=Normal).bound == Bound.LOWER
    assert latent(EventSpec((2,)), codec=vae(), prior=ddpm).bound == Bound.LOWER
    assert latent(EventSpec((2,)), codec=vae(), prior=Guess).bound == Bound.LOWER | Bound.ESTIMATE
    flow = latent(EventSpec((2,)), codec=RealNVP((2,), network=small), prior=ddpm)
    assert type(flow) is LatentModel and not isinstance(flow, Density)
    flow.stages()[-1].module.loss(torch.randn(4, 2))
    assert flow.sample(3).x.shape == (3, 2)


def test_a_sampler_is_the_prior_s():
    model = latent(
        EventSpec((2,)), codec=VAE((2,), encoder=small, decoder=small, likelihood=Gaussian(), latent_dim=2), prior=ddpm
    ).eval()
    set_sampler(model, {"_target_": "genzoo.diffusion.samplers.DDIM", "steps": 7})
    assert model.prior.sampler.steps == 7 and model.sample(2).nfe == 7 + 1
    with pytest.raises(ValueError, match="Dice samples in one pass and takes no sampler"):
        set_sampler(latent(EventSpec((2,)), codec=vq(), prior=Dice), {"_target_": "genzoo.diffusion.samplers.DDIM"})


def test_the_draws_of_a_bound_are_the_prior_s():
    model = exact(*[s.double() for s in SCALES[0]])
    model.log_prob(LAW.sample((3,)), num_samples=8)
    assert model.prior.draws == 8


def test_a_codec_may_be_unconditional():
    model = latent(EventSpec((2,)), ClassLabels(3), codec=vq(), prior=Dice).double().train()
    x, y = torch.randn(6, 2).double(), torch.arange(6) % 3
    first, second = (stage.module for stage in model.stages())
    assert (first.condition, second.condition) == (None, ClassLabels(3))
    second.loss(x, y, rng=generator(0))
    assert model.log_prob(x, y).value.shape == (6,) and model.sample(4).x.shape == (4, 2)

    batches, sgd = Batches(Split(x, y), 3, seed=0), functools.partial(torch.optim.SGD, lr=1e-3)
    module = GenerativeModule(model, sgd, batches, Budget(images=12))
    module.make_plan()
    module.training_step((0, 4), 0)
    assert module.finished, "each stage gets the classes that it is conditioned on"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"codec": lambda: WGANGP((2,), generator=small, critic=small)}, "codec: WGANGP has no encoder"),
        (
            {"codec": lambda: VAE((3,), encoder=small, decoder=small, likelihood=Gaussian())},
            r"codec: models EventSpec\(shape=\(3,\), levels=None\), not EventSpec\(shape=\(2,\)",
        ),
        ({"codec": lambda: vq(ClassLabels(3))}, r"codec: its condition is ClassLabels\(n=3\), that of the model None"),
        ({"event": EventSpec((2,), 17)}, "codec: models .* levels=None.*, not .* levels=17"),
        (
            {"prior": functools.partial(WGANGP, generator=small, critic=small)},
            "prior: WGANGP has no single training loss",
        ),
        (
            {"prior": functools.partial(RealNVP, network=small)},
            r"prior: incompatible with latents of shape \[1, 2, 1\] of 5 codes: scales=2",
        ),
        ({"codec_share": 1.0}, "codec_share must be between 0 and 1, not 1.0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    arguments = {"event": EventSpec((2,)), "codec": vq, "prior": Dice, **arguments}
    with pytest.raises(ValueError, match=message):
        latent(**{**arguments, "codec": arguments["codec"]()})
