"""Floating-point operations of training steps.

What torch's ``FlopCounterMode`` counts: matrix products, convolutions and attention, forward and backward, a multiplication
with its addition as two. Point-wise operations, norms and the optimiser are not counted; they are of lower order.

Steps of one kind, the turns of a player in a stage, all cost the same: one is counted for all.

The step that is counted is not computed. Weights are replaced by fake tensors, which have a shape, a type and a device but no
storage, and so is whatever depends on them; data, noise and small buffers stay real, so that what a loss decides by their
values is decided as in training. The count needs neither the time nor the memory of a step, and changes no weight, no buffer
and no state of a generator.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from genzoo.numerics import distributed

Module = TypeVar("Module", bound=nn.Module)
SMALL = 2**20  # elements of a buffer that a copy for counting holds for real

COUNTED = "torch.utils.flop_counter, forward and backward of one step of each kind times their number"


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _mapping() -> dict[Any, Callable[..., int]]:
    """Name what torch computes on a CPU and does not count."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }


class _Whole(contextlib.nullcontext[None]):
    """Stands in for the tracker of modules, whose hooks refuse the second derivatives of a gradient penalty."""

    parents = ("Global",)


def count(work: Callable[[], object]) -> int:
    """Return the operations of some work.

    What is counted is computed in other kernels and may differ in its last bits.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_mapping())
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    with counter:
        work()
    return counter.get_total_flops()


def _any_fake(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, FakeTensor) or (isinstance(value, list | tuple) and _any_fake(value)) for value in values
    )


class FakeWeightsMode(FakeTensorMode):
    """Computes only the shapes of what depends on fake tensors; computes everything else."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _any_fake(args) or _any_fake(kwargs.values()):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


class _FakeCopies(TorchFunctionMode):
    """Makes ``copy.deepcopy`` copy weights and large buffers as fake tensors."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone:  # by which a parameter copies its data
            return self.mode.from_tensor(args[0])
        if func is Tensor.__deepcopy__ and args[0].numel() > SMALL:
            return args[1].setdefault(id(args[0]), self.mode.from_tensor(args[0]))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_weights(module: Module) -> Iterator[Module]:
    """Copy a module without the storage of its weights, and compute nothing that depends on them in this context."""
    mode = FakeWeightsMode()
    with _FakeCopies(mode):
        fake = copy.deepcopy(module)
    with mode:
        yield fake


def count_step(module: nn.Module, step: Callable[[Any], object], repetitions: int = 1) -> int:
    """Return the operations of a step of training, which changes neither the module nor a generator of torch's.

    A loss that decides by values that depend on weights cannot be followed without them: it is computed, on a copy.

    Args:
        module: what is trained.
        step: computes a loss and its gradients, given a copy of the module.
        repetitions: of which the last is counted, since the first step may do once what later ones share.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), distributed.single_process():
        try:
            with fake_weights(module) as fake:
                return [count(lambda: step(fake)) for _ in range(repetitions)][-1]
        except Exception:  # which an error of the loss itself raises again
            real = copy.deepcopy(module)
            return [count(lambda: step(real)) for _ in range(repetitions)][-1]
