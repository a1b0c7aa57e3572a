"""Compilation of networks by ``torch.compile``."""

from __future__ import annotations

from typing import Any

from torch import nn

from genzoo.model import TrainableModel


def compile_networks(model: nn.Module, **options: Any) -> None:
    """Compile the networks of a model in place, each as a whole; copies of the model are not compiled.

    A module without a ``forward`` of its own, such as a list or the ladder of a hierarchical autoencoder, is never called:
    its parts are compiled one by one.

    Args:
        model: whose networks are called in training.
        options: as ``torch.compile`` takes them.
    """
    for name, part in model.named_children():
        if isinstance(part, TrainableModel) or type(part).forward is nn.Module.forward:
            compile_networks(part, **options)
        elif not isinstance(model, TrainableModel) or name not in model.eager:
            part.compile(**options)
