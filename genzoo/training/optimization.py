"""The networks that are trained, each with its optimiser, and what happens to a gradient between backward pass and step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genzoo.model import Adversarial, Stage, Staged, TrainableModel

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Player:
    """One network of one stage that is trained: its weights and their optimiser."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    base_lrs: list[float]  # of the groups of weights


def stages_of(model: TrainableModel) -> list[Stage]:
    """Return the stages of a model's training, one where it has no others."""
    return model.stages() if isinstance(model, Staged) else [Stage("train", model, 1.0)]


def parts_of(module: TrainableModel) -> Mapping[str, nn.Module]:
    """Return the networks of a stage that have optimisers of their own, by name."""
    return module.networks() if isinstance(module, Adversarial) else {"model": module}


def players_of(module: TrainableModel, make_optimizer: OptimizerFactory) -> dict[str, Player]:
    """Give each network of a stage its optimiser."""
    players = {}
    for name, part in parts_of(module).items():
        parameters = [p for p in part.parameters() if p.requires_grad]
        optimizer = make_optimizer(parameters)
        players[name] = Player(name, parameters, optimizer, [group["lr"] for group in optimizer.param_groups])
    return players


@contextlib.contextmanager
def only(player: Player, players: Iterable[Player]) -> Iterator[None]:
    """Compute gradients for one of the players alone."""
    others = [p for other in players if other is not player for p in other.parameters]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


@torch.no_grad()
def clip_gradient(player: Player, limit: float | None) -> Tensor:
    """Limit the norm of a network's gradient, and return what it was; as ``clip_grad_norm_``, in a third of its time."""
    gradients = [p.grad for p in player.parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    # Where the norm can be read without waiting, a factor of one is spared.
    if limit is not None and (norm.device.type != "cpu" or not norm.item() + 1e-6 <= limit):
        torch.nn.utils.clip_grads_with_norm_(player.parameters, limit, norm)
    return norm
