r"""Energy-based models, trained by contrastive divergence with persistent chains; also jointly with a classifier (JEM).

A network f tilts a normal distribution,

    p(x) = exp(-E(x)/T)/Z,    E(x) = f(x) + T |x|^2/(2 s^2),

which can be normalised for any f that grows at most linearly, as those of networks with linear tails do. The gradient of the
negative log-likelihood, up to the factor 1/T, is a difference of two phases,

    grad L = E_data grad f(x) - E_p grad f(x),

where samples of p come from Langevin dynamics of the energy, with step size l at temperature T,

    x <- x - l grad E(x) + w xi,    w = sqrt(2 l T),    xi ~ N(0, I).

Published models choose l and w apart, that is a temperature w^2/(2 l) far below 1: 5e-5 in JEM. With ``metropolis`` each step
is accepted or rejected (MALA), so that the chains have no bias of the step size; those of a chain's first training step, and of
the first half of sampling, are accepted all.

The chains persist in a replay buffer: each training step takes some of them out, restarts a few from N(0, s^2 I), moves all by
some steps and puts them back. The buffer is part of the model's state. Several processes move different chains and share the
results, so that all hold the same buffer as one process would. Samples are drawn from fresh chains alone, never from the
buffer, whose chains have run for much longer.

The loss is ``E(x_data) - E(x_chain) + a (f(x_data)^2 + f(x_chain)^2)``; the penalty fixes the free constant of f and keeps
energies small. Its value is no likelihood, and not a measure of progress.

``JEM``: a classifier's logits g define ``E(x, y) = -g_y(x) + T |x|^2/(2 s^2)`` and, summed over the classes at temperature 1,
``E(x) = -log sum_y exp(g_y(x)) + T |x|^2/(2 s^2)``. The cross-entropy of ``p(y | x) = softmax(g(x))`` is added to the loss of
E(x). Chains run in E(x, y), with classes as frequent as in the data, and so do samples of a class.

References:
    Hinton, "Training Products of Experts by Minimizing Contrastive Divergence", 2002,
    https://doi.org/10.1162/089976602760128018.
    Tieleman, "Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient", 2008,
    https://doi.org/10.1145/1390156.1390290 (persistent chains).
    Xie et al., "A Theory of Generative ConvNet", 2016, https://arxiv.org/abs/1602.03264 (tilting of a normal distribution).
    Du, Mordatch, "Implicit Generation and Modeling with Energy Based Models", 2019, https://arxiv.org/abs/1903.08689
    (algorithm 1: the replay buffer, and regularised energies).
    Nijkamp et al., "On the Anatomy of MCMC-Based Maximum Likelihood Learning of Energy-Based Models", 2020,
    https://arxiv.org/abs/1903.12370.
    Grathwohl et al., "Your classifier is secretly an energy based model and you should treat it like one", 2020,
    https://arxiv.org/abs/1912.03263 (section 4; algorithm 1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Condition
from genzoo.distributions.langevin import Point, at, mala_step, propose
from genzoo.event import EventSpec
from genzoo.model import Classifier, Diagnostic, Loss, Samples, Unnormalised, eval_mode
from genzoo.nn import defaults
from genzoo.numerics import distributed
from genzoo.numerics.random import choice, rand, randn


class Chains(NamedTuple):
    """Chains taken out of the replay buffer."""

    rows: Tensor  # (B,) int64, places in the buffer
    x: Tensor  # (B, *shape)
    y: Tensor | None  # (B, *condition.shape)
    age: Tensor  # (B,) int64, training steps since the start of each chain


class PersistentChains(Unnormalised):
    """Common base of energy-based models: contrastive divergence, and sampling by Langevin dynamics.

    Args:
        event, condition: as in ``GenerativeModel``.
        temperature: T.
        step_size: l, of a step of Langevin dynamics.
        steps: of each chain in a training step.
        sampling_steps: of a fresh chain.
        metropolis: whether steps are accepted or rejected.
        buffer_size: number of persistent chains, at least the batch size.
        restart: probability of restarting a chain.
        data_noise: standard deviation of normal noise that is added to data in training.
        energy_penalty: a.
        reference_std: s.

    Raises:
        ValueError: for values out of their range.
    """

    diagnostics: Mapping[str, Diagnostic] = {
        "contrast": Diagnostic("mean energy of data less that of the chains", "energy, 0 in equilibrium"),
        "penalty": Diagnostic("mean squared output of the network", "squared energy"),
        "accepted": Diagnostic("accepted steps of the chains", "fraction"),
        "age": Diagnostic("mean age of the chains", "training steps"),
        "cross_entropy": Diagnostic("cross-entropy of the classifier", "nats", "lower"),
        "accuracy": Diagnostic("accuracy of the classifier", "fraction", "higher"),
    }

    chains: Tensor
    chain_ages: Tensor
    chain_y: Tensor

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None,
        temperature: float,
        step_size: float,
        steps: int,
        sampling_steps: int,
        metropolis: bool,
        buffer_size: int,
        restart: float,
        data_noise: float,
        energy_penalty: float,
        reference_std: float,
    ):
        super().__init__(event, condition)
        positive = {"temperature": temperature, "step_size": step_size, "reference_std": reference_std}
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive, not {value}")
        for name, count in {"steps": steps, "sampling_steps": sampling_steps, "buffer_size": buffer_size}.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        if not 0 <= restart <= 1:
            raise ValueError(f"restart must be in [0, 1], not {restart}")
        if data_noise < 0 or energy_penalty < 0:
            raise ValueError(
                f"data_noise and energy_penalty must not be negative, not {data_noise} and {energy_penalty}"
            )
        self.temperature, self.step_size, self.reference_std = temperature, step_size, reference_std
        self.steps, self.sampling_steps, self.metropolis = steps, sampling_steps, metropolis
        self.restart, self.data_noise, self.energy_penalty = restart, data_noise, energy_penalty
        self.buffer_size = buffer_size
        self.register_buffer("chains", torch.zeros(buffer_size, *self.shape))
        self.register_buffer("chain_ages", torch.zeros(buffer_size, dtype=torch.int64))
        if condition is not None:
            empty = condition.empty(buffer_size, torch.device("cpu"), torch.get_default_dtype())
            self.register_buffer("chain_y", empty.zero_())

    @abstractmethod
    def tilt(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the part of the energy that is learned, f(x, y), (B,)."""

    @abstractmethod
    def phases(
        self, x: Tensor, y: Tensor | None, chains: Tensor, chain_y: Tensor | None
    ) -> tuple[Tensor, Tensor, Loss]:
        """Return f of data and of chains, (B,) each, and a further loss."""

    def reference(self, x: Tensor) -> Tensor:
        """Return the fixed part of the energy, T |x|^2/(2 s^2), (B,)."""
        return x.square().flatten(1).sum(1) * (self.temperature / (2 * self.reference_std**2))

    def _energy(self, x: Tensor, y: Tensor | None) -> Tensor:
        return self.tilt(x, y) + self.reference(x)

    def start(self, n: int, rng: torch.Generator | None) -> Tensor:
        """Draw first states of chains, (n, *shape)."""
        return self.reference_std * randn((n, *self.shape), rng=rng, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def run(
        self, x: Tensor, y: Tensor | None, steps: int, rng: torch.Generator | None, fresh: Tensor, burn_in: int
    ) -> tuple[Tensor, Tensor]:
        """Move chains by Langevin dynamics.

        Args:
            x: states, (B, *shape).
            y: conditions, (B, *condition.shape), of a conditional model.
            steps: of each chain.
            rng: source of randomness.
            fresh: which chains start here, (B,) bool.
            burn_in: number of their first steps that are all accepted.

        Returns:
            The last states, and the mean acceptance probability, ().
        """

        def potential(x: Tensor) -> Tensor:
            return self._energy(x, y) / self.temperature

        y = y.clone() if y is not None and y.is_inference() else y  # a graph may hold no tensor of an inference mode
        h = self.step_size * self.temperature
        accepted = torch.ones((), dtype=x.dtype, device=x.device)
        with eval_mode(self):
            if not self.metropolis:
                for _ in range(steps):
                    x = propose(at(potential, x), h, rng)
                return x, accepted
            point: Point = at(potential, x)
            total = torch.zeros_like(accepted)
            for i in range(steps):
                point, probability = mala_step(potential, point, h, rng, fresh if i < burn_in else None)
                total += probability.mean()
            return point.x, total / steps

    def take(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Chains:
        """Take chains out of the buffer, as many as data x; restarted ones get the conditions y of the data."""
        n = len(x)
        if n * distributed.world_size() > self.buffer_size:
            raise ValueError(
                f"buffer_size={self.buffer_size}: must be at least the batch size, {n * distributed.world_size()}"
            )
        rows = choice(self.buffer_size, n, rng=rng, device=x.device)
        fresh = rand((n,), rng=rng, device=x.device) < self.restart
        age = self.chain_ages[rows]
        fresh = fresh | (age == 0)
        start = self.start(n, rng)
        states = torch.where(fresh.view(-1, *[1] * (x.ndim - 1)), start, self.chains[rows])
        if y is not None:
            y = torch.where(fresh.view(-1, *[1] * (y.ndim - 1)), y, self.chain_y[rows])
        return Chains(rows, states, y, torch.where(fresh, 0, age))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        taken = self.take(x, y, rng)
        if self.data_noise:
            x = x + self.data_noise * randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
        samples, accepted = self.run(taken.x, taken.y, self.steps, rng, taken.age == 0, self.steps)
        on_data, on_chains, further = self.phases(x, y, samples, taken.y)
        contrast = (on_data + self.reference(x)).mean() - (on_chains + self.reference(samples)).mean()
        penalty = 0.5 * (on_data.square().mean() + on_chains.square().mean())
        terms = {"contrast": contrast.detach(), "penalty": penalty.detach(), "age": taken.age.to(x.dtype).mean()}
        if self.metropolis:
            terms["accepted"] = accepted
        aux = {"rows": taken.rows, "chains": samples, "ages": taken.age + 1}
        if taken.y is not None:
            aux["chain_y"] = taken.y
        return Loss(contrast + 2 * self.energy_penalty * penalty + further.total, {**terms, **further.terms}, aux)

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Put the chains of all processes back into the buffer."""
        gathered = {name: distributed.all_gather(value).flatten(0, 1) for name, value in aux.items()}
        rows = gathered["rows"]
        self.chains[rows] = gathered["chains"].to(self.chains.dtype)
        self.chain_ages[rows] = gathered["ages"]
        if "chain_y" in gathered:
            self.chain_y[rows] = gathered["chain_y"].to(self.chain_y.dtype)
        return {}

    def chain_settings(self) -> dict[str, Any]:
        return {
            "name": "MALA" if self.metropolis else "LangevinDynamics",
            "steps": self.sampling_steps,
            "step_size": self.step_size,
            "temperature": self.temperature,
            "start": f"N(0, {self.reference_std}^2 I)",
        }

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        fresh = torch.ones(n, dtype=torch.bool, device=self.device)
        x, _ = self.run(self.start(n, rng), y, self.sampling_steps, rng, fresh, self.sampling_steps // 2)
        return Samples(x if self.levels is None else x.clamp(-1, 1), nfe=self.sampling_steps + self.metropolis)


class EBM(PersistentChains):
    """An energy-based model; conditions are an input of the network. Built by ``ebm``.

    Args:
        network: factory of f, called as ``network(in_shape, (1,), condition)``, for ``(x, y)``; without batch norm.
        event, condition, **settings: as in ``PersistentChains``.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.critic_without_norm,
        **settings: Any,
    ):
        super().__init__(event, condition, **settings)
        self.network = network(self.shape, (1,), condition)

    def tilt(self, x: Tensor, y: Tensor | None) -> Tensor:
        return self.network(x, y).view(len(x)).to(x.dtype)

    def phases(
        self, x: Tensor, y: Tensor | None, chains: Tensor, chain_y: Tensor | None
    ) -> tuple[Tensor, Tensor, Loss]:
        both = None if y is None or chain_y is None else torch.cat([y, chain_y])
        on_data, on_chains = self.tilt(torch.cat([x, chains]), both).chunk(2)
        return on_data, on_chains, Loss(on_data.new_zeros(()), {})


class JEM(PersistentChains, Classifier):
    """A joint energy-based model: a classifier that is also a generator of its classes. Built by ``ebm``.

    At a temperature below 1 the samples of a class are sharper than the classifier's own distribution.

    Args:
        network: factory of g, called as ``network(in_shape, (n,), None)``, for ``(x, None)``; without batch norm.
        condition: the classes.
        event, **settings: as in ``PersistentChains``.

    Raises:
        ValueError: for a condition other than classes.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.critic_without_norm,
        **settings: Any,
    ):
        if not isinstance(condition, ClassLabels):
            raise ValueError(f"labels=joint needs data with classes, not {condition}; set data.conditional=true")
        super().__init__(event, condition, **settings)
        self.network = network(self.shape, (condition.n,), None)

    def logits(self, x: Tensor) -> Tensor:
        """Return g(x), (B, n)."""
        return self.network(x, None).to(x.dtype)

    def tilt(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return -self.logits(x).gather(1, y[:, None])[:, 0]

    def _class_log_probs(self, x: Tensor) -> Tensor:
        return self.logits(x).log_softmax(1)

    def phases(
        self, x: Tensor, y: Tensor | None, chains: Tensor, chain_y: Tensor | None
    ) -> tuple[Tensor, Tensor, Loss]:
        assert y is not None
        of_data, of_chains = self.logits(torch.cat([x, chains])).chunk(2)
        cross_entropy = F.cross_entropy(of_data, y)
        accuracy = (of_data.detach().argmax(1) == y).to(x.dtype).mean()
        terms = {"cross_entropy": cross_entropy.detach(), "accuracy": accuracy}
        return -of_data.logsumexp(1), -of_chains.logsumexp(1), Loss(cross_entropy, terms)


def ebm(
    event: EventSpec,
    condition: Condition | None = None,
    *,
    network: Callable[..., nn.Module] = defaults.critic_without_norm,
    labels: Literal["condition", "joint"] = "condition",
    temperature: float = 1.0,
    step_size: float = 0.01,
    steps: int = 20,
    sampling_steps: int = 500,
    metropolis: bool = False,
    buffer_size: int = 10_000,
    restart: float = 0.05,
    data_noise: float = 0.0,
    energy_penalty: float = 0.01,
    reference_std: float = 1.0,
) -> EBM | JEM:
    """Build an energy-based model.

    Args:
        labels: whether conditions are an input of the network, or classes its outputs: ``EBM`` or ``JEM``.
        event, condition, network and all others: as in ``EBM`` and ``JEM``.

    Raises:
        ValueError: for values out of their range, and joint labels without classes.
    """
    kinds: dict[str, type[EBM] | type[JEM]] = {"condition": EBM, "joint": JEM}
    if labels not in kinds:
        raise ValueError(f"labels must be condition or joint, not {labels!r}")
    return kinds[labels](
        event,
        condition,
        network=network,
        temperature=temperature,
        step_size=step_size,
        steps=steps,
        sampling_steps=sampling_steps,
        metropolis=metropolis,
        buffer_size=buffer_size,
        restart=restart,
        data_noise=data_noise,
        energy_penalty=energy_penalty,
        reference_std=reference_std,
    )
