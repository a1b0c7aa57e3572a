"""Inverse problems on Gaussian data, where every method has a law in closed form, and its distance from the posterior too."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from genzoo.diffusion.denoiser import DenoiserWrapper
from genzoo.diffusion.inverse import (
    DPS,
    Blur,
    Downsampling,
    Grey,
    Identity,
    Inpainting,
    MomentMatching,
    Observation,
    PiGDM,
    RePaint,
)
from genzoo.diffusion.inverse.moment_matching import conjugate_gradients
from genzoo.diffusion.inverse.sampler import PosteriorDenoiser
from genzoo.diffusion.path import PARAMETERIZATIONS, Prediction
from genzoo.diffusion.samplers import DDIM, AdaptiveODE, Ancestral, Euler, Heun
from genzoo.diffusion.schedules import EDMSchedule, LinearSchedule, VPSchedule
from genzoo.families.flow_matching import FlowMatching
from genzoo.numerics.random import SampleStreams, generator
from tests.exact import MU, SCHEDULES, SIGMA, GaussianDenoiser, MixtureDenoiser, moments
from tests.inverse_laws import Chain, Dense, Normal, Problem, law

VP = VPSchedule()
# So much noise that the prior's mean of 0 is forgotten, and so many steps that the solver's error is below 1e-3.
FINE, HEUN = EDMSchedule(sigma_max=4000.0), Heun(400, ratio_max=4000.0)
A = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]]).double()
UNKNOWN = torch.tensor([True, False, True])
KNOWN = torch.tensor([[0.0, 1.0, 0.0]]).double()


def problem(A=A, value=(0.5, -1.0), s=0.3, covariance=SIGMA, mean=MU) -> Problem:
    mean, covariance, value = (torch.tensor(v, dtype=torch.float64) for v in (mean, covariance, value))
    return Problem(mean, covariance, A, value, s)


def denoiser_of(p: Problem, schedule=VP, kind="eps") -> GaussianDenoiser:
    return GaussianDenoiser(schedule, p.mu.tolist(), p.covariance.tolist(), kind)


def drawn(p: Problem, make, base, monkeypatch, operator=None, schedule=VP, kind="eps") -> Normal:
    """The exact mean and covariance of the samples of a method."""
    operator = Dense(p.A) if operator is None else operator

    def sampler(denoiser, n):
        return make(Observation(operator, p.value.expand(n, -1), p.s), base)(denoiser, n)

    return Normal(*moments(sampler, denoiser_of(p, schedule, kind), monkeypatch))


def assert_same(found: Normal, expected: Normal, tolerance: float) -> None:
    apart = found.distance(expected)
    assert max(apart) < tolerance, apart


# Operators

OPERATORS = {
    "identity": Identity((3, 6, 4)),
    "inpainting": Inpainting((3, 6, 4), torch.arange(24).view(1, 6, 4) % 3 == 0),
    "inpainting of a vector": Inpainting((5,), torch.tensor([True, False, True, False, False])),
    "downsampling": Downsampling((3, 6, 4), 2),
    "grey": Grey((3, 6, 4)),
    "blur": Blur((3, 6, 4), 0.8),
    "circular blur": Blur((2, 5, 7), 1.7, "circular"),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator("normal", *shape), dtype=torch.float64)


@every_operator
def test_the_adjoint_is_exact_and_the_matrix_is_the_operator(operator):
    x, value = normal(4, *operator.event_shape), normal(4, *operator.shape)
    left, right = (operator(x) * value).flatten(1).sum(1), (x * operator.adjoint(value)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.flatten(1) @ operator.matrix().T, operator(x).flatten(1))


@every_operator
def test_the_gram_matrix_is_inverted_with_and_without_noise(operator):
    value, matrix = normal(4, *operator.shape), operator.matrix()
    gram = matrix @ matrix.T
    for a, b in ((0.7, 0.2), (2.0, 1e-3), (0.0, 0.5)):
        expected = torch.linalg.solve(a * gram + b * torch.eye(len(gram)).double(), value.flatten(1).T).T
        torch.testing.assert_close(operator.solve(value, a, b).flatten(1), expected, rtol=1e-8, atol=1e-9)


def test_operators_do_to_pictures_what_their_names_say():
    x = torch.arange(3 * 4 * 4).double().view(3, 4, 4) / 24 - 1
    assert torch.equal(Downsampling((3, 4, 4), 2)(x)[1], x[1].unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3)))
    grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    torch.testing.assert_close(Grey((3, 4, 4))(x)[0], grey)
    ones = torch.ones(3, 4, 4).double()
    for operator in (Grey((3, 4, 4)), Downsampling((3, 4, 4), 4), Blur((3, 4, 4), 1.3), Blur((3, 4, 4), 9, "circular")):
        torch.testing.assert_close(operator(ones), torch.ones(operator.shape).double())  # constant images stay
    impulse = torch.zeros(1, 21, 21).double()
    impulse[0, 10, 10] = 1.0
    blurred = Blur((1, 21, 21), 1.5)(impulse)[0]
    offsets = torch.arange(21.0).double() - 10
    assert float((blurred.sum(0) * offsets**2).sum()) == pytest.approx(1.5**2, rel=0.01)
    torch.testing.assert_close(blurred, blurred.T)
    corner = torch.zeros(1, 8, 8).double()
    corner[0, 0, 0] = 1.0
    reflected, circular = (Blur((1, 8, 8), 1.0, border)(corner)[0] for border in ("reflect", "circular"))
    assert float(circular[7, 0]) == pytest.approx(float(circular[1, 0])) and float(reflected[7, 0]) < 1e-6
    unknown = torch.zeros(1, 4, 4, dtype=torch.bool)
    unknown[0, 1, 2] = True
    hidden = Inpainting((3, 4, 4), unknown)
    assert hidden.shape == (45,) and torch.equal(hidden.adjoint(hidden(x)), torch.where(unknown, 0.0, x))


# Laws

BASES = {"ancestral": (Ancestral(steps=60), None), "ddim": (DDIM(40), 0.0), "ddim stochastic": (DDIM(60, eta=1.0), 1.0)}
every_base = pytest.mark.parametrize("base", BASES)


@every_base
@pytest.mark.parametrize("method", ["moment_matching", "pigdm"])
@pytest.mark.parametrize("s", [0.3, 0.0])
def test_posterior_means_draw_their_own_law(base, method, s, monkeypatch):
    sampler, eta = BASES[base]
    p = problem(s=s)

    def make(observation, sampler):
        return (
            MomentMatching(observation, sampler, 5, 0.0) if method == "moment_matching" else PiGDM(observation, sampler)
        )

    found = drawn(p, make, sampler, monkeypatch)
    assert_same(found, law(p, method, Chain(VP, sampler.steps, eta)), 1e-6)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule", ["vp", "edm", "cond_ot", "cosine"])
def test_the_posterior_mean_is_exact_whatever_the_denoiser_predicts(kind, schedule):
    p, schedule = problem(), SCHEDULES[schedule]
    denoiser = denoiser_of(p, schedule, kind)
    x_t = normal(4, 3)
    for t in (0.1, 0.5, 0.9):
        alpha, sigma, *_ = (float(c) for c in schedule.at(torch.tensor(t)))
        for name, make in (("moment_matching", MomentMatching), ("pigdm", PiGDM)):
            method = make(Observation(Dense(p.A), p.value.expand(4, -1), p.s), Heun(2))
            guided = PosteriorDenoiser(denoiser, method.observation, method.correction)
            K, k = p.estimate(name, alpha, sigma)
            torch.testing.assert_close(guided.denoise(x_t, torch.full((4,), t)), x_t @ K.T + k, rtol=1e-5, atol=1e-6)


def test_moment_matching_draws_the_posterior_once_its_solver_converges(monkeypatch):
    p = problem()
    found = drawn(p, lambda o, s: MomentMatching(o, s, 5, 0.0), HEUN, monkeypatch, schedule=FINE)
    assert_same(found, p.posterior, 1e-3)
    for eta in (0.0, 1.0, None):  # up to the forgotten mean of the prior, which VP noise does not drown
        assert_same(law(p, "moment_matching", Chain(VP, 4000, eta)), p.posterior, 0.02)
    rough = drawn(p, lambda o, s: MomentMatching(o, s, 1, 0.0), Heun(60), monkeypatch, schedule=EDMSchedule())
    assert max(rough.distance(p.posterior)) > 0.05


def test_pigdm_draws_the_posterior_of_white_data_and_no_other(monkeypatch):
    white = problem(covariance=torch.eye(3).tolist())
    found = drawn(white, PiGDM, HEUN, monkeypatch, schedule=FINE)
    assert_same(found, white.posterior, 1e-3)
    wide = problem(covariance=(4 * torch.eye(3)).tolist())
    found = drawn(wide, lambda o, s: PiGDM(o, s, std=2.0), HEUN, monkeypatch, schedule=FINE)
    assert_same(found, wide.posterior, 1e-3)
    assert max(law(problem(), "pigdm", Chain(VP, 4000, 0.0)).distance(problem().posterior)) > 0.05


@pytest.mark.parametrize("zeta", [0.02, 0.1])
@every_base
def test_dps_without_its_norm_draws_its_own_law(base, zeta, monkeypatch):
    sampler, eta = BASES[base]
    p = problem()
    found = drawn(p, lambda o, s: DPS(o, s, zeta, normalize=False), sampler, monkeypatch)
    assert_same(found, law(p, "dps", Chain(VP, sampler.steps, eta), zeta=zeta), 1e-6)


def test_dps_divides_the_gradient_of_the_square_by_the_norm():
    """Algorithm 1, step by step by matrices, with deterministic steps of DDIM."""
    p, sampler, zeta = problem(s=0.0), DDIM(25), 0.3
    chain = Chain(VP, 25, 0.0)
    noise, grid = normal(4, 3), chain.grid()
    x = noise * float(chain.start(3).covariance[0, 0]) ** 0.5
    for before, after in itertools.pairwise(grid):
        K, k, _ = p.prior_estimate(*before)
        a, b, _ = chain.step(before, after)
        x0 = x @ K.T + k
        r = p.value - x0 @ p.A.T
        gradient = -2 * r @ p.A @ K
        x = a * x + b * x0 - zeta * gradient / r.norm(dim=1, keepdim=True)
    *_, (found, nfe) = DPS(Observation(Dense(p.A), p.value.expand(4, -1)), sampler, zeta).iterate(
        denoiser_of(p), noise, None, None
    )
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
    assert nfe == 50


@every_base
@pytest.mark.parametrize(("resamplings", "jump"), [(1, 1), (4, 1), (3, 7)])
def test_repaint_draws_its_own_law(base, resamplings, jump, monkeypatch):
    sampler, eta = BASES[base]
    p = problem(KNOWN, [-1.2], 0.0)
    make = lambda o, s: RePaint(o, s, resamplings, jump)  # noqa: E731
    found = drawn(p, make, sampler, monkeypatch, Inpainting((3,), UNKNOWN))
    assert_same(found, law(p, "repaint", Chain(VP, sampler.steps, eta), resamplings=resamplings, jump=jump), 1e-6)
    assert float(found.mean[1]) == -1.2 and float(found.covariance[1].abs().max()) == 0


def test_repaint_is_exact_for_independent_pixels_and_its_bias_falls_with_resamplings():
    alone = problem(KNOWN, [-1.2], 0.0, covariance=torch.tensor(SIGMA).diagonal().diag().tolist())
    schedule = LinearSchedule(1000)
    # Up to the error of the chain itself, see the golden variances of ancestral sampling.
    assert_same(law(alone, "repaint", Chain(schedule, 1000)), alone.posterior, 5e-3)
    p, chain = problem(KNOWN, [-1.2], 0.0), Chain(schedule, 250)
    biases = [max(law(p, "repaint", chain, resamplings=n).distance(p.posterior)) for n in (1, 3, 10, 40)]
    assert biases == sorted(biases, reverse=True) and biases[0] > 4 * biases[-1]


def test_denoising_at_a_known_level_is_the_formula_of_tweedie(monkeypatch):
    """y + sigma^2 score, the mean of the posterior of noisy data; and its covariance."""
    s, schedule = 0.5, FINE
    p = problem(torch.eye(3).double(), [0.3, -1.0, 0.8], s)
    found = drawn(p, lambda o, b: MomentMatching(o, b, 5, 0.0), HEUN, monkeypatch, Identity((3,)), schedule)
    t = schedule.time_of(torch.tensor(s).double())
    score = denoiser_of(p, schedule).score(p.value[None], t[None])[0]
    torch.testing.assert_close(found.mean, p.value + s**2 * score, rtol=1e-3, atol=1e-3)
    assert_same(found, p.posterior, 1e-3)


# Contracts


def samplers(observation: Observation, base=None, resamplings: int = 2):
    base = base or DDIM(8, eta=1.0)
    return {
        "repaint": RePaint(observation, base, resamplings),
        "dps": DPS(observation, base),
        "pigdm": PiGDM(observation, base),
        "moment_matching": MomentMatching(observation, base),
    }


@pytest.mark.parametrize("method", ["repaint", "dps", "pigdm", "moment_matching"])
def test_known_coordinates_come_back_to_the_bit_and_sample_i_depends_on_i_alone(method):
    mixture = MixtureDenoiser(VP, [[-1.0, 0.3, 0.5], [1.0, -0.4, 0.2]], [0.05, 0.1])
    operator = Inpainting((3,), UNKNOWN)
    value = 0.1 + 0.7 * normal(6, 1)
    whole = samplers(Observation(operator, value))[method](mixture, 6, None, SampleStreams(0, range(6)))
    assert torch.equal(operator(whole.x), value) and bool(whole.x.isfinite().all())
    assert whole.x[:, 0].std() > 0.1
    part = samplers(Observation(operator, value[2:4]))[method](mixture, 2, None, SampleStreams(0, range(2, 4)))
    torch.testing.assert_close(part.x, whole.x[2:4])
    assert whole.nfe == {"repaint": 15, "dps": 16, "pigdm": 16, "moment_matching": 8 * 3}[method]


def test_the_posterior_of_a_mixture_picks_the_component_of_the_value():
    """Far from linear: the value of one coordinate determines the component, and with it the other coordinate."""
    mixture = MixtureDenoiser(VP, [[-1.0, -2.0], [1.0, 2.0]], [0.05, 0.05])
    operator = Inpainting((2,), torch.tensor([False, True]))
    for sign in (-1.0, 1.0):
        value = torch.full((64, 1), sign).double()
        right = {}
        for name, sampler in samplers(Observation(operator, value), DDIM(60, eta=1.0), 10).items():
            x = sampler(mixture, 64, None, generator("mixture")).x
            right[name] = float((x[:, 1] * sign > 0).double().mean())
        assert right["pigdm"] > 0.95 and right["moment_matching"] > 0.95 and right["repaint"] > 0.8, right


def test_weights_and_states_have_no_graph_and_a_learned_variance_is_kept():
    class Learned(DenoiserWrapper):
        def predict(self, x_t, t, y=None):
            return self.denoiser.predict(x_t, t, y)._replace(variance_weight=0.5 * torch.ones_like(x_t))

    p = problem()
    observation = Observation(Dense(p.A), p.value.expand(2, -1), p.s)
    base = Ancestral("learned", steps=10)
    for name, sampler in samplers(Observation(Inpainting((3,), UNKNOWN), normal(2, 1)), base).items():
        assert not sampler(Learned(denoiser_of(p)), 2).x.requires_grad, name
    guided = PosteriorDenoiser(Learned(denoiser_of(p)), observation, PiGDM(observation, base).correction)
    weight = guided.predict(normal(2, 3), torch.full((2,), 0.5)).variance_weight
    assert weight is not None and bool((weight == 0.5).all()) and not weight.requires_grad


def test_conjugate_gradients_solve_each_system_alone_and_stop_where_a_network_is_indefinite():
    M = torch.stack([torch.tensor(SIGMA).double(), torch.eye(3).double(), -torch.eye(3).double()])
    b = normal(3, 3)
    apply = lambda v: torch.einsum("bij,bj->bi", M, v)  # noqa: E731
    x, products = conjugate_gradients(apply, b, 3, 1e-12)
    torch.testing.assert_close(x[:2], torch.linalg.solve(M[:2], b[:2]))
    assert torch.equal(x[2], torch.zeros(3).double()) and products == 3
    one, products = conjugate_gradients(lambda v: v, b, 9, 1e-6)
    assert products == 1 and torch.equal(one, b)


def test_what_has_no_meaning_is_refused():
    p = problem()
    observation, inpainting = Observation(Dense(p.A), p.value.expand(2, -1), p.s), Inpainting((3,), UNKNOWN)
    exact = Observation(inpainting, torch.zeros(2, 1))
    for make, message in (
        (lambda: Inpainting((3,), torch.zeros(3, dtype=torch.bool)), "marks no pixel"),
        (lambda: Inpainting((3,), torch.ones(3, dtype=torch.bool)), "marks every pixel"),
        (lambda: Inpainting((3,), torch.ones(2, dtype=torch.bool)), "the event"),
        (lambda: Inpainting((3,), torch.ones(3)), "not bool"),
        (lambda: Downsampling((1, 6, 4), 4), "factor=4 must"),
        (lambda: Downsampling((8,), 2), "needs images"),
        (lambda: Grey((1, 6, 4)), "3 channels"),
        (lambda: Blur((1, 6, 4), 0.0), "std must be positive"),
        (lambda: Blur((1, 6, 4), math.nan), "std must be positive"),
        (lambda: Observation(inpainting, torch.zeros(2, 2)), "has shape"),
        (lambda: Observation(inpainting, torch.zeros(2, 1), -0.1), "sigma must be at least 0"),
        (lambda: RePaint(observation, Ancestral()), "known pixels without noise"),
        (lambda: RePaint(Observation(inpainting, torch.zeros(2, 1), 0.1), Ancestral()), "known pixels without noise"),
        (lambda: RePaint(exact, Heun(4)), "chain sampler"),
        (lambda: RePaint(exact, Ancestral(), 0), "at least 1"),
        (lambda: DPS(observation, Euler(4)), "chain sampler"),
        (lambda: DPS(observation, DDIM(4), -1.0), "zeta"),
        (lambda: PiGDM(observation, AdaptiveODE()), "fixed steps"),
        (lambda: PiGDM(observation, DDIM(4), 0.0), "std"),
        (lambda: MomentMatching(observation, DDIM(4), 0), "iterations"),
        (lambda: PiGDM(observation, DDIM(4))(denoiser_of(p), 3), "the observation is of 2"),
        (lambda: PiGDM(observation, DDIM(4))(MixtureDenoiser(VP, [[0.0]], [1.0]), 2), "of shape"),
        (lambda: PiGDM(observation, Euler(4))(FlowMatching((3,), pairing="optimal_transport"), 2), "independent noise"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_predictions_at_the_ends_of_a_path_are_finite():
    for name, schedule in SCHEDULES.items():
        p = problem(s=0.0)
        observation = Observation(Dense(p.A), p.value.expand(2, -1))
        for method in (PiGDM(observation, Heun(2)), MomentMatching(observation, Heun(2))):
            guided = PosteriorDenoiser(denoiser_of(p, schedule), observation, method.correction)
            for t in (0.0, 1.0):
                found = guided.predict(normal(2, 3), torch.full((2,), t))
                assert isinstance(found, Prediction) and bool(found.mean.isfinite().all()), (name, t)
