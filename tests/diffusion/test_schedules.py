"""Schedules against the formulas of their papers, their derivatives against finite differences, and the one clock."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genzoo.diffusion.schedules import (
    CondOT,
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    LinearSchedule,
    SubVPSchedule,
    VESchedule,
    VPSchedule,
)
from tests.exact import every_schedule


def linear_betas(T: int) -> np.ndarray:
    return np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)


def cosine_betas(T: int, s: float = 0.008) -> np.ndarray:
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


FORMULAS = {"linear": (LinearSchedule, linear_betas), "cosine": (CosineSchedule, cosine_betas)}
every = pytest.mark.parametrize(("schedule", "formula"), FORMULAS.values(), ids=FORMULAS)
lengths = pytest.mark.parametrize("T", [10, 1000, 4000])


@every
@lengths
def test_betas_are_those_of_the_paper(schedule, formula, T):
    np.testing.assert_allclose(schedule(T).betas.numpy(), formula(T), rtol=1e-10)


@every
@lengths
def test_alpha_squared_is_exactly_the_running_product_at_every_index(schedule, formula, T):
    """Index i is the time (i + 1)/T; a table in float32 would be off by 1e-7."""
    t = (torch.arange(T) + 1).double() / T
    c = schedule(T).at(t)
    abar = np.cumprod(1 - formula(T))
    np.testing.assert_allclose(c.alpha.numpy() ** 2, abar, rtol=1e-11)
    np.testing.assert_allclose(c.sigma.numpy() ** 2, 1 - abar, rtol=1e-11)


@every
@lengths
def test_a_rounded_time_is_the_index_that_it_stands_for(schedule, formula, T):
    t = (torch.arange(T) + 1).double() / T
    for nudge in (-1e-13, 1e-13):
        assert torch.equal(schedule(T).at(t[:-1] + nudge).d_alpha, schedule(T).at(t[:-1]).d_alpha)


@every
def test_data_have_no_noise_and_signal_and_noise_share_one_variance(schedule, formula):
    c = schedule(1000).at(torch.cat([torch.zeros(1), torch.rand(500)]).double())
    assert c.alpha[0] == 1
    assert c.sigma[0] == 0
    assert c.d_sigma[0] == math.inf
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones(501).double(), atol=1e-14, rtol=0)
    assert schedule(1000).prior_std == 1.0


@every
@lengths
def test_noise_only_grows(schedule, formula, T):
    c = schedule(T).at(torch.linspace(0, 1, 3 * T + 1, dtype=torch.float64))
    assert ((c.alpha / (1 + c.sigma)).diff() < 0).all()


@every_schedule
def test_derivatives_are_the_limits_of_differences(schedule):
    T, h = 1000, 1e-7
    inside = (torch.arange(T) + 0.1 + 0.8 * torch.rand(T)).double() / T  # the slope jumps on the grid
    c, after, before = schedule.at(inside), schedule.at(inside + h), schedule.at(inside - h)
    torch.testing.assert_close(c.d_alpha, (after.alpha - before.alpha) / (2 * h), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(c.d_sigma, (after.sigma - before.sigma) / (2 * h), atol=1e-6, rtol=1e-5)


# The SDE of a path: dx = f x dt + g dw with f = alpha'/alpha and g^2 = (sigma^2)' - 2 f sigma^2. Here in the words of the
# papers, for VP and sub-VP with beta(t) = .1 + 19.9 t, whose integral is B(t).
def beta(t):
    return 0.1 + 19.9 * t


def B(t):
    return 0.1 * t + 19.9 * t**2 / 2


RATE = math.log(50 / 0.01)
SDES = {
    "vp": (VPSchedule(), lambda t: -beta(t) / 2, beta),
    "sub_vp": (SubVPSchedule(), lambda t: -beta(t) / 2, lambda t: beta(t) * (1 - np.exp(-2 * B(t)))),
    "ve": (VESchedule(), lambda t: 0 * t, lambda t: 2 * RATE * 0.01**2 * (50 / 0.01) ** (2 * t)),
    "edm": (EDMSchedule(), lambda t: 0 * t, lambda t: 2 * (80 * t**7) * (80 * 7 * t**6)),
    "cond_ot": (CondOT(), lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
}
every_sde = pytest.mark.parametrize(("schedule", "drift", "diffusion"), SDES.values(), ids=SDES)


@every_sde
def test_a_schedule_solves_the_sde_of_its_paper(schedule, drift, diffusion):
    t = np.linspace(0.01, 0.99, 99)
    c = schedule.at(torch.from_numpy(t))
    alpha, sigma, d_alpha, d_sigma = (v.numpy() for v in c)
    np.testing.assert_allclose(d_alpha / alpha, drift(t), rtol=1e-12, atol=1e-12)
    # As sigma^2 f may nearly cancel (sigma^2)', the tolerance is relative to the greater.
    g2 = 2 * sigma * d_sigma - 2 * d_alpha / alpha * sigma**2
    np.testing.assert_allclose(g2, diffusion(t), rtol=1e-9, atol=0)


def test_kernels_are_those_of_the_papers():
    """What is left of the data and what noise they have, written out (Song et al. 2021, eq. 29)."""
    t = np.linspace(0.01, 1, 100)
    vp, sub_vp, ve = (schedule().at(torch.from_numpy(t)) for schedule in (VPSchedule, SubVPSchedule, VESchedule))
    for c in (vp, sub_vp):
        np.testing.assert_allclose(c.alpha.numpy(), np.exp(-B(t) / 2), rtol=1e-12)
    np.testing.assert_allclose(vp.sigma.numpy() ** 2, 1 - np.exp(-B(t)), rtol=1e-10)
    np.testing.assert_allclose(sub_vp.sigma.numpy(), 1 - np.exp(-B(t)), rtol=1e-10)
    np.testing.assert_allclose(ve.sigma.numpy() ** 2, 0.01**2 * ((50 / 0.01) ** (2 * t) - 1), rtol=1e-10)
    assert (ve.alpha == 1).all()


def test_priors_are_those_of_the_papers():
    assert [s().prior_std for s in (VPSchedule, SubVPSchedule, CondOT, LinearSchedule)] == [1.0] * 4
    assert VESchedule().prior_std == pytest.approx(50, rel=1e-7)
    assert EDMSchedule().prior_std == 80


def test_ddpms_chain_is_vp_in_many_steps():
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    for T, rel in ((1000, 0.02), (4000, 0.005)):
        chain, limit = LinearSchedule(T).at(t).alpha.log(), VPSchedule().at(t).alpha.log()
        torch.testing.assert_close(chain, limit, rtol=rel, atol=0)


def test_edms_steps_are_those_of_karras():
    """Equation 5 with rho = 7, from 80 to .002."""
    schedule, N = EDMSchedule(), 18
    sigma = schedule.at(schedule.times(N)).sigma
    for i in range(N):
        root = 80 ** (1 / 7) + i / (N - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))
        assert float(sigma[i]) == pytest.approx(root**7, rel=1e-10)
    assert sigma[N] == 0


@every_schedule
def test_a_ratio_knows_its_time_and_beyond_the_last_is_the_last(schedule):
    t = torch.linspace(schedule.t_min, schedule.t_max, 301, dtype=torch.float64)
    ratio = schedule.ratio(t)
    assert (ratio.diff() > 0).all()
    torch.testing.assert_close(schedule.time_of(ratio), t, atol=1e-10, rtol=1e-9)
    assert float(schedule.time_of(torch.tensor(1e12))) == pytest.approx(1.0, abs=1e-11)
    assert float(schedule.time_of(torch.tensor(0.0))) == 0.0


@pytest.mark.parametrize("make", [VPSchedule, SubVPSchedule, VESchedule, EDMSchedule])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_ends_are_positive_and_in_order(make, ends):
    with pytest.raises(ValueError, match=str(ends[0])):
        make(*ends)


def test_edms_rho_is_at_least_one():
    with pytest.raises(ValueError, match=r"0\.5"):
        EDMSchedule(rho=0.5)


def test_between_two_steps_log_alpha_is_linear():
    schedule = LinearSchedule(10)
    t = torch.tensor([0.30, 0.325, 0.35, 0.40], dtype=torch.float64)
    log_alpha = schedule.at(t).alpha.log()
    assert float(log_alpha[1]) == pytest.approx(float(0.75 * log_alpha[0] + 0.25 * log_alpha[3]), abs=1e-14)
    assert float(log_alpha[2]) == pytest.approx(float(0.5 * log_alpha[0] + 0.5 * log_alpha[3]), abs=1e-14)


@pytest.mark.parametrize("T", [100, 1000, 4000])
def test_a_chain_of_another_length_destroys_as_much(T):
    """Betas scale by 1000/T: log abar(1) stays near minus the integral of beta, -10.05, whatever T."""
    assert float(2 * LinearSchedule(T).at(torch.ones(())).alpha.log()) == pytest.approx(-10.05, rel=0.09)
    assert float(LinearSchedule(T).betas.sum()) == pytest.approx(10.05, abs=1e-9)


def test_betas_are_capped():
    assert float(CosineSchedule(1000).betas[-1]) == 0.999
    assert (CosineSchedule(1000).betas[:-1] < 0.999).all()
    assert float(LinearSchedule(10).betas.max()) == 0.999


@pytest.mark.parametrize("schedule", [LinearSchedule(1000), CosineSchedule(4000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_a_sampler_visits_indices_0_T_over_S_2T_over_S_downwards_and_then_the_data(schedule, steps):
    T = schedule.num_steps
    indices = [i * T // steps for i in range(steps)]
    times = schedule.times(steps)
    assert times.dtype == torch.float64
    assert times.tolist() == [(i + 1) / T for i in reversed(indices)] + [0.0]


def test_without_a_number_of_steps_the_whole_chain_is_visited():
    assert LinearSchedule(10).times().tolist() == [i / 10 for i in range(10, -1, -1)]


def test_continuous_time_runs_from_its_first_time_to_its_last_and_then_to_the_data():
    times = CondOT().times(5)
    assert times[[0, -2, -1]].tolist() == [CondOT.t_first, CondOT.t_last, 0.0]
    torch.testing.assert_close(times[:-1].diff().diff(), torch.zeros(3).double(), atol=1e-15, rtol=0)


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_a_chain_cannot_be_walked_in_no_step_nor_in_more_than_it_has(steps):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        LinearSchedule(10).times(steps)


@pytest.mark.parametrize("steps", [0, None])
def test_continuous_time_needs_a_number_of_steps(steps):
    with pytest.raises(ValueError, match="steps >= 1"):
        CondOT().times(steps)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.0], [-0.1], [math.nan]], ids=str)
def test_betas_lie_between_zero_and_one(betas):
    with pytest.raises(ValueError, match="betas must be"):
        DiscreteSchedule(torch.tensor(betas))


def test_a_vector_in_float32_is_answered_in_float64():
    assert {c.dtype for c in LinearSchedule(10).at(torch.rand(3))} == {torch.float64}
