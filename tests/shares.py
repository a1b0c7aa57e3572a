"""What a process finds on its share of a batch: ``python -m tests.shares FOLDER RANK RANKS`` is one rank of test_ranks."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genzoo.model import Adversarial, GenerativeModel, Staged
from genzoo.numerics import distributed
from genzoo.numerics.random import batch_generator, reseed

TIMEOUT = 60  # seconds that a rank waits for another, so that a hang is a failure


def examine(model: GenerativeModel, x: Tensor, y: Tensor | None) -> list[dict[str, Any]]:
    """Give every player of every stage two turns, and list what each finds; no weight moves by its gradient.

    Args:
        model: in training mode.
        x, y: the share; the noise of its examples and the masks of dropout are drawn as the trainer draws them.

    Returns:
        For each turn the gradients of the player's weights, the terms of its loss, and what the turn left of the model.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for repetition in range(2):
        for part in [stage.module for stage in model.stages()] if isinstance(model, Staged) else [model]:
            for turn, player in (part.networks() if isinstance(part, Adversarial) else {None: part}).items():
                own = {name: p for name, p in player.named_parameters() if any(p is other for other in trained)}
                model.requires_grad_(False)
                for p in own.values():
                    p.requires_grad_(True)
                reseed(torch.default_generator, "layers", repetition)
                conditions = y if part.condition else None
                if repetition == 0 and turn in (None, "critic"):
                    part.initialize(x, conditions, rng=batch_generator("noise", repetition))
                rng, of_turn = batch_generator("noise", repetition), {} if turn is None else {"turn": turn}
                total, terms, aux = part.loss(x, conditions, rng=rng, **of_turn)
                total.backward()
                terms = {**terms, **part.after_step(aux, distributed.world_size() * len(x), rng=rng)}
                gradients = {name: p.grad for name, p in own.items()}
                state = {name: value.clone() for name, value in model.state_dict().items()}
                found.append({"gradients": gradients, "terms": {"total": total.detach(), **terms}, "state": state})
                for p in own.values():
                    p.grad = None
    for p in trained:
        p.requires_grad_(True)
    return found


def main(folder: Path, rank: int, ranks: int) -> None:
    """Examine the share of one rank in every model of a folder."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timeout=wait, rank=rank, world_size=ranks)
    found = {}
    for name, (model, x, y) in torch.load(folder / "models.pt", weights_only=False).items():
        x, y = x.chunk(ranks)[rank], None if y is None else y.chunk(ranks)[rank]
        found[name] = examine(model, x, y)
    dist.destroy_process_group()
    torch.save(found, folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
