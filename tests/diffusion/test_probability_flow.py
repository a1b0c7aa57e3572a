r"""The probability-flow ODE against closed forms: its map, its divergence, its density and the errors that it states.

On Gaussian data the ODE is linear: it carries x from t to s by ``alpha_s mu + sqrt(C_s C_t^-1) (x - alpha_t mu)`` and its
divergence integrates to ``1/2 log det(C_s C_t^-1)``. The integrated Jacobian is a constant matrix M, so that Hutchinson's
estimate from signs e is ``e^T M e``, whose variance is ``2 sum_{i != j} M_ij^2``: with 2^D equally likely signs all of this is
checked by enumeration. On a mixture nothing is linear, and its density is known all the same.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.diffusion.path import Prediction
from genzoo.diffusion.probability_flow import ProbabilityFlow, ProbabilityFlowODE
from genzoo.diffusion.schedules import CondOT, VESchedule, VPSchedule
from genzoo.event import EventSpec
from genzoo.numerics.random import SampleStreams, generator
from tests.exact import MU, SCHEDULES, SIGMA, GaussianDenoiser, MixtureDenoiser, every_schedule


class ExactFlow(ProbabilityFlow):
    """The density of an exact denoiser, which a subclass inherits before it and which sets the event and the path."""

    def __init__(self):
        super().__init__(EventSpec((1,)))

    def _loss(self, x, y, rng):
        raise AssertionError("nothing is trained")

    def _sample(self, n, y, rng):
        raise AssertionError("drawn by the denoiser")


class GaussianFlow(GaussianDenoiser, ExactFlow):
    """The exact denoiser of Gaussian data, with the density of its ODE."""

    rtol = atol = 1e-7

    @property
    def interval(self) -> tuple[float, float]:
        """The times between which the ODE is solved."""
        s = self.path.schedule
        return (0.0, 1.0) if s.coordinates == "time" else (s.t_min, s.t_max)

    def exact_latent(self, x: Tensor) -> Tensor:
        return self.carry(x, *self.interval) / self.path.schedule.prior_std

    def exact_log_det(self) -> float:
        """Of the map from data to latents."""
        start, stop = (self.spread(t) for t in self.interval)
        return float(0.5 * (stop / start).log().sum()) - self.dim * math.log(self.path.schedule.prior_std)


class MixtureFlow(MixtureDenoiser, ExactFlow):
    """The exact denoiser of a mixture, with the density of its ODE."""

    rtol = atol = 1e-6


def standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def close(got: Tensor, expected: Tensor | float, atol: float) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64).expand_as(got), atol=atol, rtol=0)


# The map and its divergence


@every_schedule
@pytest.mark.parametrize(("t", "s"), [(0.3, 0.9), (0.9, 0.3)], ids=["to_noise", "to_data"])
def test_the_ode_carries_gaussian_data_by_the_closed_form(schedule, t, s):
    flow = GaussianFlow(schedule, MU, SIGMA)
    ode = ProbabilityFlowODE(flow)
    u, v = ode.variable_at(t), ode.variable_at(s)
    close(ode.time(torch.tensor([u, v], dtype=torch.float64)), torch.tensor([t, s], dtype=torch.float64), 1e-12)
    scale_u, scale_v = ode.scales([u, v])
    x = torch.randn(5, 3, dtype=torch.float64)
    got = scale_v * ode.solve(x / scale_u, u, v, 1e-9, 1e-9)
    expected = flow.carry(x, t, s)
    close(got, expected, 1e-7 * max(1.0, float(expected.abs().max())))


@every_schedule
def test_density_latent_and_log_determinant_are_the_closed_forms(schedule):
    flow = GaussianFlow(schedule, MU, SIGMA)
    x = flow.sample(6).x
    z, log_det = flow.forward_and_log_det(x)
    close(z, flow.exact_latent(x), 1e-6)
    close(log_det, flow.exact_log_det(), 1e-5)
    value, stderr = flow.log_prob(x, num_samples=3)
    close(value, standard_normal(flow.exact_latent(x)) + flow.exact_log_det(), 1e-5)
    assert not stderr.any()
    # The prior of a diffusion has neither the mean nor the variance that the data have left at the end of the path.
    exact = torch.distributions.MultivariateNormal(flow.mu, flow.covariance)
    close(value, exact.log_prob(x), 1e-5 if schedule.coordinates == "time" else 0.12)


@every_schedule
def test_latents_are_standard_normal_and_lead_back(schedule):
    """The map is affine: the image of the origin and of the unit vectors says where every latent goes."""
    flow = GaussianFlow(schedule, MU, SIGMA)
    x = flow.sample(4).x
    close(flow.decode(flow.encode(x)), x, 1e-5)
    corners = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    start, *columns = flow.decode(corners)
    expected = flow.carry(schedule.prior_std * corners, *reversed(flow.interval))
    close(start, expected[0], 1e-5)
    close(torch.stack(columns), expected[1:], 1e-5)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variances", [[1.0, 0.5, 2.0], [0.25] * 3, [1.0, 1e-2, 1e-4], [1e-4] * 3], ids=str)
def test_the_way_there_and_back_is_off_by_the_order_of_the_tolerance(schedule, variances, dtype):
    """Whatever the width of the data is. In float32 the noise-to-data ratio's largest states lose the last digits.

    Where the error of a step is all rounding, as on the straight part of a path to narrow data, float32 decides which steps are
    tried; about one sample in thirty then accepts one whose two orders agree by chance.
    """
    flow = GaussianFlow(schedule, [0.0] * 3, variances)
    exact = flow.exact
    flow.exact = lambda kind, x_t, t: exact(kind, x_t.double(), t).to(x_t.dtype)
    x = (flow.sample(10, rng=generator(0)).x).to(dtype)
    for tolerance in (1e-3, 1e-5):
        flow.rtol = flow.atol = tolerance
        errors = (flow.decode(flow.encode(x)) - x).abs().amax(1).sort().values
        most = 20 * tolerance
        assert float(errors[-2]) < most, (tolerance, errors / tolerance)
        assert float(errors[-1]) < (most if dtype == torch.float64 else most + 0.2 * max(variances) ** 0.5), errors


MEANS, VARIANCES = [[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]], [0.1, 0.3, 0.05]


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "edm", "cond_ot"])
def test_the_density_of_a_mixture_is_the_truth(name):
    flow = MixtureFlow(SCHEDULES[name], MEANS, VARIANCES)
    x = flow.sample(12).x
    # Noise of finite variance stands for that of all data: a relative error of Var[x]/sigma_max^2 in the prior.
    prior = {"vp": 1e-3, "sub_vp": 1e-3, "ve": 1e-2, "edm": 5e-3, "cond_ot": 1e-4}[name]
    close(flow.log_prob(x, num_samples=2).value, flow.log_mixture(x), prior)


# Hutchinson's estimate


@pytest.mark.parametrize("schedule", [VPSchedule(), VESchedule(), CondOT()], ids=lambda s: type(s).__name__)
def test_hutchinsons_estimate_has_the_variance_of_its_quadratic_form(schedule):
    flow = GaussianFlow(schedule, MU, SIGMA)
    ode = ProbabilityFlowODE(flow)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3))).double()[:, None]
    scale_start, scale_stop = ode.scales(ode.ends)
    x = flow.sample(1).x
    _, integrals = ode.solve_with_divergence(x / scale_start, *ode.ends, signs, 1e-8, 1e-8)
    start, stop = (flow.spread(t) for t in flow.interval)
    # In the state's own units, x/alpha.
    along = 0.5 * (stop / start).log() - math.log(scale_stop / scale_start)
    M = flow.axes @ along.diag() @ flow.axes.T
    close(integrals[0], torch.einsum("ki,ij,kj->k", signs[:, 0], M, signs[:, 0]), 1e-5)
    close(integrals.mean(), M.trace(), 1e-5)
    off_diagonal = M - M.diag().diag()
    assert off_diagonal.abs().max() > 0.1
    close(integrals.var(correction=0), 2 * off_diagonal.square().sum(), 1e-5)


def test_the_error_of_a_density_is_honest():
    """1000 repetitions with 8 probes in 12 correlated dimensions: unbiased, spread as said, and covered as often as is due."""
    D, probes, n = 12, 8, 1000
    A = torch.randn(D, D, dtype=torch.float64, generator=generator("covariance"))
    flow = GaussianFlow(CondOT(), [0.0] * D, 10 * (A @ A.T / D + 0.1 * torch.eye(D)))
    flow.rtol = flow.atol = 1e-5
    x = flow.sample(1).x
    value, stderr = flow.log_prob(x.expand(n, D), num_samples=probes, rng=generator("probes"))
    truth = torch.distributions.MultivariateNormal(flow.mu, flow.covariance).log_prob(x)
    M = flow.axes @ (-0.5 * flow.lam.log()).diag() @ flow.axes.T
    variance = 2 * (M - M.diag().diag()).square().sum() / probes
    error = value - truth
    assert float(error.mean()) == pytest.approx(0.0, abs=4 * math.sqrt(variance / n))
    assert float(value.var() / variance) == pytest.approx(1.0, abs=0.2)
    assert float(stderr.square().mean() / variance) == pytest.approx(1.0, abs=0.1)
    # Student's t with 7 degrees of freedom lies within one and within two standard errors with these probabilities.
    for width, share in ((1, 0.649), (2, 0.914)):
        assert float((error.abs() < width * stderr).double().mean()) == pytest.approx(share, abs=0.05)


def test_one_probe_knows_no_error_and_as_many_as_dimensions_need_no_noise():
    flow = GaussianFlow(CondOT(), MU, SIGMA)
    x, rng = flow.sample(3).x, generator(0)
    assert flow.log_prob(x, num_samples=1, rng=rng).stderr is None
    state = rng.get_state()
    first = flow.log_prob(x, num_samples=3, rng=rng).value
    assert torch.equal(rng.get_state(), state)
    assert torch.equal(flow.log_prob(x, num_samples=50).value, first)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        flow.log_prob(x, num_samples=0)


# Rows


class ByClass(ProbabilityFlow):
    """Data of class y are N(m_y, s_y Sigma), so that a row with its neighbour's class gives another result."""

    M, S = (0.0, 3.0, -2.0), (1.0, 0.01, 9.0)
    rtol = atol = 1e-6

    def __init__(self, schedule):
        super().__init__(EventSpec((3,)), ClassLabels(3))
        self.flows = [
            GaussianFlow(schedule, [m] * 3, s * torch.tensor(SIGMA)) for m, s in zip(self.M, self.S, strict=True)
        ]
        self.path = self.flows[0].path
        self.double()

    def predict(self, x_t, t, y=None):
        rows = [self.flows[label].exact("eps", x_t[i : i + 1], t[i : i + 1]) for i, label in enumerate(y.tolist())]
        return Prediction("eps", torch.cat(rows))

    def _loss(self, x, y, rng):
        raise AssertionError("nothing is trained")

    def _sample(self, n, y, rng):
        raise AssertionError("nothing is drawn")


@pytest.mark.parametrize("schedule", [VPSchedule(), CondOT()], ids=["vp", "cond_ot"])
def test_every_row_keeps_its_class_its_probes_and_its_own_pace(schedule):
    flow, y = ByClass(schedule), torch.tensor([2, 1, 0])
    x = torch.randn(3, 3, dtype=torch.float64)

    def answers(rows: list[int]) -> tuple[Tensor, ...]:
        z, labels, rng = x[rows], y[rows], SampleStreams(5, rows)
        return flow.encode(z, labels), flow.decode(z, labels), flow.log_prob(z, labels, num_samples=2, rng=rng).value

    whole = answers([0, 1, 2])
    for i in range(3):
        for together, single in zip(whole, answers([i]), strict=True):
            torch.testing.assert_close(together[i : i + 1], single, atol=1e-10, rtol=1e-10)
        latent = flow.flows[y[i]].exact_latent(x[i : i + 1])
        torch.testing.assert_close(whole[0][i : i + 1], latent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("evaluations", [1, 2])
@pytest.mark.parametrize("kind", ["velocity", "eps", "x0"])
def test_evaluations_are_counted_as_they_are_made(kind, evaluations):
    """On the straight path the ends are asked about, where a prediction of eps or x0 takes a second look."""
    for schedule in (VPSchedule(), CondOT()):
        flow = GaussianFlow(schedule, MU, SIGMA, kind)
        flow.evaluations = evaluations
        ode = ProbabilityFlowODE(flow)
        ode.solve(torch.randn(2, 3, dtype=torch.float64), *ode.ends, 1e-3, 1e-3)
        assert ode.nfe == evaluations * flow.calls > 0
