"""The normaliser of an energy-based model between two stochastic bounds, and with it a bound of its density.

Annealed importance sampling goes from N(0, s^2 I) to p(x | y) and back, with Metropolis-adjusted Langevin steps. Their sizes
are adapted to each temperature in a run of their own, so that the runs that are weighted have fixed kernels. The chains back
start from particles of a further run that are resampled by their weights and moved on at the last temperature. They are samples
of the model up to the convergence of those chains, and so the bound from above is one up to that.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.console import status_line
from genzoo.distributions.annealing import Sandwich, annealed_log_weights, sandwich, sigmoid_schedule
from genzoo.distributions.langevin import at, mala_step
from genzoo.evaluation.density import split_sha256, truth
from genzoo.evaluation.records import to_record
from genzoo.evaluation.samples import subset
from genzoo.evaluation.settings import EvalSettings
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.model import Bound, Unnormalised
from genzoo.numerics.random import generator, rand, randn

CHAINS, STEPS = 200, 300  # of an evaluation, for each condition
MAX_DIM = 8  # of vectors whose density is bounded; the bounds drift apart with the dimension
MAX_CLASSES = 16
TARGET = 0.574  # acceptance rate of the optimal step size (Roberts, Rosenthal 1998)


def log_partition(
    model: Unnormalised,
    y: Tensor | None = None,
    *,
    chains: int = CHAINS,
    steps: int = STEPS,
    rng: torch.Generator | None = None,
) -> Sandwich:
    """Bound log Z(y) = log of the integral of exp(-E(x, y)/T) dx from both sides, in float64.

    Args:
        model: in evaluation mode.
        y: the condition, (1, *condition.shape), of a conditional model.
        chains: in each direction.
        steps: temperatures of each chain.
        rng: source of randomness.

    Raises:
        ValueError: for fewer than two chains or one step, and invalid conditions, as in ``energy``.
    """
    if chains < 2:
        raise ValueError(f"chains must be at least 2, not {chains}")
    model.conditioner.check(y, 1)
    many = None if y is None else y.expand(chains, *y.shape[1:])
    std, constant = model.reference_std, 0.5 * model.dim * math.log(2 * math.pi * model.reference_std**2)
    betas = sigmoid_schedule(steps)

    def log_reference(x: Tensor) -> Tensor:
        return -x.square().flatten(1).sum(1) / (2 * std**2) - constant

    def log_target(x: Tensor) -> Tensor:
        return -model.energy(x.to(model.dtype), many).to(x.dtype) / model.temperature

    def potential(x: Tensor, beta: float) -> Tensor:
        return -(1 - beta) * log_reference(x) - (beta * log_target(x) if beta else 0.0)

    def start() -> Tensor:
        return std * randn((chains, *model.shape), rng=rng, device=model.device, dtype=torch.float64)

    def move(x: Tensor, beta: float, sizes: dict[float, float]) -> Tensor:
        at_beta = functools.partial(potential, beta=beta)
        return mala_step(at_beta, at(at_beta, x), sizes[beta], rng)[0].x

    @torch.no_grad()
    def log_ratio(x: Tensor) -> Tensor:
        return log_target(x) - log_reference(x)

    sizes, log_size, x = dict[float, float](), math.log(std**2 / model.dim), start()
    for beta in betas.tolist():  # adaptation
        at_beta = functools.partial(potential, beta=beta)
        for _ in range(2):
            point, probability = mala_step(at_beta, at(at_beta, x), math.exp(log_size), rng)
            log_size, x = log_size + 0.5 * (float(probability.mean()) - TARGET), point.x
        sizes[beta] = math.exp(log_size)
    kernel = functools.partial(move, sizes=sizes)
    forward, _ = annealed_log_weights(start(), betas, log_ratio, kernel)
    log_w, x = annealed_log_weights(start(), betas, log_ratio, kernel)
    x = x[resampled(log_w, rng)]
    for _ in range(steps):
        x = kernel(x, 1.0)
    reverse, _ = annealed_log_weights(x, betas.flip(0), log_ratio, kernel)
    return sandwich(forward, reverse)


def resampled(log_w: Tensor, rng: torch.Generator | None) -> Tensor:
    """Draw as many rows as there are weights, in proportion to them, (B,) int64, by systematic resampling."""
    n = len(log_w)
    cdf = log_w.softmax(0).cumsum(0)
    u = (torch.arange(n, device=log_w.device) + rand((1,), rng=rng, device=log_w.device, dtype=torch.float64)) / n
    return torch.searchsorted(cdf / cdf[-1], u).clamp_(max=n - 1)


def partition_scores(model: Unnormalised, data: Any, settings: EvalSettings, setting: dict[str, Any]) -> dict[str, Any]:
    """Bound log Z, and the negative log density of the test split from above by its upper bound.

    For vectors of few dimensions, without conditions or for few classes, where the bounds can be expected to meet; otherwise
    there are no scores.
    """
    condition = model.condition
    if model.levels is not None or model.dim > MAX_DIM:
        return {}
    if condition is not None and not (isinstance(condition, ClassLabels) and condition.n <= MAX_CLASSES):
        return {}
    bounds = []
    for c in range(condition.n if isinstance(condition, ClassLabels) else 1):
        status_line(f"bounding log Z {c + 1}")
        y = None if condition is None else torch.tensor([c], device=model.device)
        bounds.append(log_partition(model, y, rng=generator("partition", setting["seed"], c, device=model.device)))
    split, of = data.scored
    chosen = subset(len(of.x), settings.events)
    x, y = of.x[chosen], of.y[chosen] if condition is not None else torch.zeros(len(chosen), dtype=torch.int64)
    energies = []
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(settings.batch_size):
            labels = None if condition is None else y[rows].to(model.device)
            energies.append(model.energy(x[rows].to(model.device, model.dtype), labels).double().cpu())
    fractions = torch.bincount(y, minlength=len(bounds)).double() / len(y)

    def mean(values: list[float]) -> float:
        return float(fractions @ torch.tensor(values, dtype=torch.float64))

    def mean_error(errors: list[float]) -> float:
        return float((fractions * torch.tensor(errors, dtype=torch.float64)).square().sum().sqrt())

    lower, lower_error = mean([b.lower for b in bounds]), mean_error([b.lower_stderr for b in bounds])
    upper, upper_error = mean([b.upper for b in bounds]), mean_error([b.upper_stderr for b in bounds])
    at_upper = torch.cat(energies) / model.temperature + torch.tensor([b.upper for b in bounds], dtype=torch.float64)[y]
    nll = mean_and_stderr(at_upper)
    annealing = {
        "estimator": "annealed importance sampling, forward and reverse",
        "chains": CHAINS,
        "temperatures": STEPS,
    }
    of_z = {**annealing, "kernel": "MALA", "start": f"N(0, {model.reference_std}^2 I)", "conditions": len(bounds)}
    setting = {
        **setting,
        "temperature": model.temperature,
        "log_z": [lower, upper],
        "log_z_stderr": [lower_error, upper_error],
    }
    bound = str((Bound.LOWER | Bound.ESTIMATE).name)
    split_of = {"split": split, "split_sha256": split_sha256(x), "n": len(x)}
    protocol = {"bound": bound, **split_of, "levels": None, "dequantization": None}
    name = f"{data.held_out}/nll{(Bound.LOWER | Bound.ESTIMATE).suffix}"
    stderr = None if nll.stderr is None else math.hypot(nll.stderr, upper_error)
    return {
        "partition/log_z_lower": to_record("partition/log_z_lower", lower, lower_error, of_z, setting),
        "partition/log_z_upper": to_record("partition/log_z_upper", upper, upper_error, of_z, setting),
        name: to_record(name, nll.value, stderr, {**protocol, **annealing}, setting),
        **truth(data, x, protocol),
    }
