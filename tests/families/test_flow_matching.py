r"""Flow matching with the exact velocity, and what pairing does to it.

On N(mu, Sigma) with eigenvalues lambda and ``c = alpha^2 lambda + sigma^2`` the least mean squared error of the velocity is,
per dimension, ``lambda (alpha' sigma - alpha sigma')^2 / c``; on the straight path, averaged over uniform times, that is
``(pi/2) sqrt(lambda)``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.diffusion.noise_levels import LogitNormalTime
from genzoo.diffusion.samplers import Ancestral, Euler, Heun
from genzoo.diffusion.schedules import CondOT, VESchedule, VPSchedule
from genzoo.families.flow_matching import FlowMatching, minibatch_ot
from genzoo.metrics.sliced_wasserstein import sliced_wasserstein
from genzoo.nn.mlp import TimeMLP
from genzoo.numerics.random import generator
from genzoo.training.ema import EMA
from tests.exact import MU, SCHEDULES, SIGMA, GaussianDenoiser, MixtureDenoiser, network
from tests.toys import Mean

LAM = [1.0, 0.25, 4.0]


def exact_model(schedule, covariance=SIGMA, **kwargs) -> tuple[FlowMatching, GaussianDenoiser]:
    denoiser = GaussianDenoiser(schedule, MU, covariance, "velocity")
    answer = network(lambda x_t, t, y: denoiser.exact("velocity", x_t, t))
    return FlowMatching((3,), network=answer, schedule=schedule, **{"tolerance": 1e-7, **kwargs}).double(), denoiser


def zero(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return torch.zeros_like(x_t)


# The loss and the density


def test_the_least_loss_on_the_straight_path_is_the_trace_of_a_root():
    model, denoiser = exact_model(CondOT())
    x = denoiser.sample(200_000).x
    floor = math.pi / 2 * float(denoiser.lam.sqrt().mean())
    assert float(model.loss(x, rng=generator(0)).total) == pytest.approx(floor, rel=0.02)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "cond_ot", "linear"])
@pytest.mark.parametrize("law", [None, LogitNormalTime()], ids=["uniform", "logit_normal"])
def test_the_least_loss_is_the_closed_form_on_any_path(name, law):
    schedule = SCHEDULES[name]
    model, denoiser = exact_model(schedule, LAM, noise_levels=law)
    x = denoiser.sample(200_000).x
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * u if law is None else torch.sigmoid(torch.special.ndtri(u))
    c = schedule.at(t.clamp(schedule.t_min, schedule.t_max))
    alpha, sigma, d_alpha, d_sigma = (v[:, None] for v in c)
    lam = torch.tensor(LAM).double()
    floor = (lam * (d_alpha * sigma - alpha * d_sigma) ** 2 / (alpha**2 * lam + sigma**2)).mean()
    assert float(model.loss(x, rng=generator(0)).total) == pytest.approx(float(floor), rel=0.02)


def test_any_other_velocity_costs_more():
    schedule, losses = CondOT(), {}
    denoiser = GaussianDenoiser(schedule, MU, LAM, "velocity")
    x = denoiser.sample(50_000).x
    for k in (0.9, 1.0, 1.1):
        answer = network(lambda x_t, t, y, k=k: k * denoiser.exact("velocity", x_t, t))
        losses[k] = float(FlowMatching((3,), network=answer).double().loss(x, rng=generator(0)).total)
    assert losses[1.0] < min(losses[0.9], losses[1.1])


@pytest.mark.parametrize("name", ["cond_ot", "vp"])
def test_density_and_latents_are_the_closed_forms(name):
    schedule = SCHEDULES[name]
    model, denoiser = exact_model(schedule)
    x = denoiser.sample(5).x
    start, stop = (0.0, 1.0) if name == "cond_ot" else (schedule.t_min, schedule.t_max)
    z = denoiser.carry(x, start, stop)
    volume = 0.5 * float((denoiser.spread(stop) / denoiser.spread(start)).log().sum())
    expected = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1) + volume
    torch.testing.assert_close(model.log_prob(x, num_samples=3).value, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.encode(x), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(z), x, atol=1e-4, rtol=0)
    if name == "cond_ot":  # where nothing of the data is left in the prior
        truth = torch.distributions.MultivariateNormal(denoiser.mu, denoiser.covariance).log_prob(x)
        torch.testing.assert_close(expected, truth, atol=1e-9, rtol=0)


# Optimal transport


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_transport_is_the_best_of_all_permutations(n):
    for seed in range(5):
        x, eps = torch.randn(2, n, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = min(float((x - eps[list(order)]).square().sum()) for order in itertools.permutations(range(n)))
        moved = minibatch_ot(x, eps)
        assert float((x - moved).square().sum()) == pytest.approx(best, rel=1e-6)
        assert {tuple(row) for row in moved.flatten(1).tolist()} == {tuple(row) for row in eps.flatten(1).tolist()}


def pairs_of(model: FlowMatching, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which data, noise and classes the loss pairs, from what it asks of the path and of the network."""
    seen, path, inner = {}, model.path.sample, model.network.function

    def sample(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        seen["x"], seen["eps"] = x, eps
        return path(x, eps, t)

    def watch(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen["y"] = y
        return inner(x_t, t, y)

    model.path.sample, model.network.function = sample, watch
    model.loss(x, y, rng=generator(3))
    model.path.sample, model.network.function = path, inner
    return seen["x"], seen["eps"], seen["y"]


def test_pairing_by_transport_lowers_the_paths_energy_and_keeps_data_and_classes_together():
    y = torch.randint(4, (256,))
    x = y[:, None] + torch.randn(256, 2, dtype=torch.float64)
    energy = {}
    for pairing in ("independent", "optimal_transport"):
        model = FlowMatching(
            (2,), ClassLabels(4), network=network(zero), pairing=pairing, condition_dropout=0.0
        ).double()
        data, eps, labels = pairs_of(model, x, y)
        assert torch.equal(data, x)
        assert torch.equal(labels, y)
        energy[pairing] = float((eps - data).square().sum(1).mean())
        assert float(model.loss(x, y, rng=generator(3)).total) == pytest.approx(energy[pairing] / 2)
    # Two independent normal laws whose means differ by the class in both dimensions, 0 to 3.
    assert energy["independent"] == pytest.approx(4.0 + 2 * 3.5, rel=0.15)
    # The squared 2-Wasserstein distance of the two is that of their means.
    assert energy["optimal_transport"] == pytest.approx(2 * 3.5, rel=0.2)


def test_pairing_leaves_the_noise_itself_normal():
    x = 5 + torch.randn(512, 2, dtype=torch.float64)
    same = [
        pairs_of(FlowMatching((2,), network=network(zero), pairing=p).double(), x)[1]
        for p in ("independent", "optimal_transport")
    ]
    torch.testing.assert_close(*(eps.sort(0).values for eps in same))


@pytest.mark.parametrize("counts", [[256, 256], [500, 11, 1], [1, 1, 1, 1], [0, 6, 0, 1], [1]], ids=str)
def test_a_class_is_paired_with_its_own_noise_in_the_best_way(counts):
    """Labels decide where the data are, so that noise that changed classes would show."""
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y = y[torch.randperm(len(y))]
    x = (3.0 * y[:, None] - 1.5 + 0.1 * torch.randn(len(y), 2)).double()
    models = [
        FlowMatching((2,), ClassLabels(len(counts)), network=network(zero), pairing=p).double()
        for p in ("independent", "optimal_transport")
    ]
    (_, drawn, before), (_, eps, after) = (pairs_of(model, x, y) for model in models)
    assert torch.equal(before, after), "whose labels are dropped does not depend on the pairing"
    for c in range(len(counts)):
        mine, noise = eps[y == c], drawn[y == c]
        assert {tuple(row) for row in mine.tolist()} == {tuple(row) for row in noise.tolist()}
        torch.testing.assert_close(mine, minibatch_ot(x[y == c], noise))


def test_the_noise_of_each_class_is_standard_normal():
    model = FlowMatching((2,), ClassLabels(2), network=network(zero), pairing="optimal_transport").double()
    n = 1024
    y = torch.arange(n) % 2
    x = (3.0 * y[:, None] - 1.5 + 0.1 * torch.randn(n, 2)).double()
    _, eps, _ = pairs_of(model, x, y)
    for c in range(2):
        noise = eps[y == c]
        assert noise.mean(0).abs().max() < 5 / math.sqrt(n / 2)
        assert (noise.T.cov() - torch.eye(2)).abs().max() < 5 * math.sqrt(2 / (n / 2))


def test_samples_of_a_class_have_its_law_where_training_pairs_by_transport():
    """Two narrow classes at +-1.5: paired across classes the samples came out at +-0.36."""
    torch.manual_seed(0)
    network = functools.partial(TimeMLP, width=32, depth=2)
    model = FlowMatching((2,), ClassLabels(2), network=network, pairing="optimal_transport", condition_dropout=0.1)
    y = torch.arange(64) % 2
    steps = 1200
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = 3.0 * y[:, None] - 1.5 + 0.1 * torch.randn(64, 2, generator=generator("data", step))
        model.loss(x, y, rng=generator("noise", step)).total.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    n = 1000
    for c in range(2):
        x = model.sample(n, torch.full((n,), c), rng=generator("samples")).x.detach()
        law = 3.0 * c - 1.5 + 0.1 * torch.randn(n, 2, generator=generator("test", c))
        assert sliced_wasserstein(x, law) < 0.03


@pytest.mark.parametrize("paired", ["optimal_transport", "reflow"])
def test_a_paired_path_has_no_score_and_takes_no_stochastic_sampler(paired):
    setting = (
        {"pairing": paired}
        if paired == "optimal_transport"
        else {"teacher": MixtureDenoiser(CondOT(), [[0.0, 0.0]], [1.0])}
    )
    model = FlowMatching((2,), network=network(zero), sampler=Ancestral(steps=5), **setting).double()
    assert not model.path.independent
    with pytest.raises(ValueError, match="no score"):
        model.score(torch.zeros(1, 2).double(), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="needs an ODE sampler"):
        model.sample(2)
    model.sampler = Heun(2)
    assert model.sample(2).nfe == 4
    assert FlowMatching((2,), network=network(zero)).path.independent


# Reflow


@pytest.mark.parametrize("schedule", [CondOT(), VPSchedule()], ids=["cond_ot", "vp"])
def test_pairs_of_a_teacher_lie_on_its_ode(schedule):
    teacher = GaussianDenoiser(schedule, MU, SIGMA, "velocity")
    model = FlowMatching((3,), network=network(zero), teacher=teacher, pool=700).double()
    x, eps, _ = pairs_of(model, torch.full((64, 3), math.nan, dtype=torch.float64))  # the data are not used
    last = 0.0 if schedule.coordinates == "time" else schedule.t_last
    expected = teacher.carry(eps, 1.0, last)
    torch.testing.assert_close(x, teacher.exact("x0", expected, torch.tensor([last]).double()), atol=5e-3, rtol=1e-3)
    pool = model.pairs.tensors
    assert len(pool["x"]) == len(pool["eps"]) == 700
    assert (pool["eps"].mean(0).abs() < 5 / math.sqrt(700)).all()
    assert len(pool["eps"].unique(dim=0)) == 700
    model.loss(torch.zeros(2, 3).double(), rng=generator(0))
    assert model.pairs.tensors is pool  # made once


def test_the_pool_does_not_depend_on_how_it_is_cut():
    teacher = GaussianDenoiser(CondOT(), MU, SIGMA, "velocity")
    whole, cut = (
        model.pairs.simulate(model, chunk)
        for model in [FlowMatching((3,), network=network(zero), teacher=teacher, pool=30).double()]
        for chunk in (500, 7)
    )
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], atol=1e-9, rtol=0)


def test_pairs_of_a_conditional_teacher_keep_the_class_that_made_them():
    centre = torch.tensor([[-4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])

    def velocity(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return (x_t - centre.to(x_t)[y]) / t.clamp(min=1e-3)[:, None]  # all of a class are one point

    teacher = FlowMatching((2,), ClassLabels(3), network=network(velocity)).double()
    model = FlowMatching(
        (2,), ClassLabels(3), network=network(zero), teacher=teacher, pool=200, condition_dropout=0.0
    ).double()
    x, _, y = pairs_of(model, torch.zeros(128, 2).double(), torch.zeros(128, dtype=torch.int64))
    assert set(y.tolist()) == {0, 1, 2}
    torch.testing.assert_close(x, centre.double()[y], atol=0.05, rtol=0)


def test_a_teacher_is_no_part_of_its_pupil_and_is_left_as_it_is():
    teacher = FlowMatching((2,), network=lambda *shapes: TimeMLP(*shapes, width=8, depth=1))
    model = FlowMatching((2,), network=lambda *shapes: TimeMLP(*shapes, width=8, depth=1), teacher=teacher, pool=8)
    before = copy.deepcopy(teacher.state_dict())
    assert len(list(model.parameters())) == len(list(teacher.parameters()))
    assert not any("teacher" in name for name in (*model.state_dict(), *dict(model.named_modules())))
    model.train().loss(torch.zeros(4, 2)).total.backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is not None for p in model.parameters())
    average = EMA(model, 0.9).model
    assert average.pairs is model.pairs, "an average holds no second teacher and no second pool"
    assert copy.deepcopy(model).pairs.tensors is model.pairs.tensors


def test_pairs_that_a_teacher_cannot_have_made_are_refused():
    teacher = FlowMatching((2,), ClassLabels(3), network=network(zero))
    model = FlowMatching((2,), ClassLabels(3), network=network(zero), teacher=teacher, pool=4)
    assert model.precomputed_shapes() == {"x": (4, 2), "eps": (4, 2), "y": (4,)}
    pairs = model.precompute()
    assert {name: tuple(t.shape) for name, t in pairs.items()} == model.precomputed_shapes()
    for y in (torch.tensor([0, 1, 2, 3]), torch.zeros(4)):
        with pytest.raises(ValueError, match="y must"):
            model.set_precomputed({**pairs, "y": y})
    assert teacher.precomputed_shapes() == teacher.precompute() == {}


@pytest.mark.parametrize(
    ("teacher", "what"),
    [
        (lambda: GaussianDenoiser(CondOT(), [0.0] * 4, [1.0] * 4), r"shape=\(4,\).* not .*shape=\(3,\)"),
        (lambda: GaussianDenoiser(CondOT(), MU, SIGMA, levels=8), "8"),
        (lambda: GaussianDenoiser(VESchedule(), MU, SIGMA), "standard deviation 50, not 1"),
        (lambda: Mean((3,)), "Mean is not a denoiser"),
    ],
    ids=["shape", "levels", "prior", "family"],
)
def test_a_teacher_of_something_else_is_refused(teacher, what):
    with pytest.raises(ValueError, match=what):
        FlowMatching((3,), network=network(zero), teacher=teacher())


def bend(denoiser, n: int = 500, steps: int = 40) -> float:
    """How far a model's trajectories are from straight, E int |v(x_t, t) - (x_1 - x_0)|^2 dt (Liu et al. 2023, eq. 3)."""
    states = Euler(steps, trajectory=True)(denoiser, n, rng=generator("straightness")).trajectory.double()
    speeds = -states.diff(dim=0) * steps
    return float((speeds - (states[0] - states[-1])).square().sum(2).mean())


def test_reflow_straightens_the_teachers_trajectories():
    """The exact flow to four blobs bends; a small network that learns its pairs bends far less, and so takes fewer steps."""
    teacher = MixtureDenoiser(CondOT(), [[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]], [0.05] * 4)
    pupil = FlowMatching((2,), network=lambda *shapes: TimeMLP(*shapes, width=64, depth=2), teacher=teacher, pool=2000)
    teacher.double()
    optimizer = torch.optim.Adam(pupil.parameters(), lr=5e-3)
    for step in range(300):
        optimizer.zero_grad()
        pupil.loss(torch.zeros(256, 2), rng=generator("reflow", step)).total.backward()
        optimizer.step()
    teacher.double()
    assert bend(pupil) < 0.25 * bend(teacher)


# Classes and settings


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_classes_become_the_null_label_as_often_as_asked(dropout):
    y = torch.arange(4).repeat(10_000)
    model = FlowMatching((2,), ClassLabels(4), network=network(zero), condition_dropout=dropout)
    labels = pairs_of(model, torch.zeros(40_000, 2), y)[2]
    dropped = labels != y
    assert (labels[dropped] == 4).all()
    assert float(dropped.double().mean()) == pytest.approx(dropout, abs=5 * math.sqrt(dropout * (1 - dropout) / 40_000))


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ({"pairing": "sinkhorn"}, "'sinkhorn'"),
        ({"condition_dropout": -0.1}, "not -0.1"),
        ({"tolerance": 0.0}, "not 0.0"),
        ({"pool": 0}, "and 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, what):
    with pytest.raises(ValueError, match=what):
        FlowMatching((2,), network=network(zero), **setting)
