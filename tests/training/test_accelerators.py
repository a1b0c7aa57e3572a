"""What makes steps faster changes what they compute by no more than roundings, and leaves copies alone."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.event import EventSpec
from genzoo.model import Adversarial, GenerativeModel, Staged
from genzoo.numerics.random import generator
from genzoo.training.budget import Budget
from genzoo.training.compilation import compile_networks
from genzoo.training.module import GenerativeModule
from tests.captions import SQUARES
from tests.conftest import CAPTIONED, CONDITIONED
from tests.conftest import FAMILIES as ALL
from tests.shares import examine
from tests.test_interface import Case, conditions
from tests.toys import Mean

# With a U-Net, a chain of invertible steps, a second derivative, and a network that is called by its methods.
FAMILIES = ("ddpm", "glow", "wgan_gp", "hvae")


def case_of(family: str) -> Case:
    """A family on digits, or on pictures with captions; conditional only if it must be."""
    captioned = family in CAPTIONED
    return Case(family, "image", SQUARES if captioned else ("data=digits",), captioned or family in CONDITIONED)


def model_of(family: str) -> GenerativeModel:
    return copy.deepcopy(case_of(family).model()).train()


def batch() -> Tensor:
    return 2 * torch.rand(4, 1, 8, 8, generator=generator("images")) - 1


def differences(one: list, other: list) -> list[float]:
    """List how far the gradients and terms of two examinations are apart, of their own size."""
    pairs = [
        (a[part][name], b[part][name])
        for a, b in zip(one, other, strict=True)
        for part in ("gradients", "terms")
        for name in a[part]
    ]
    return [float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_networks_learn_the_same(family):
    plain, compiled = model_of(family).double(), model_of(family).double()
    compile_networks(compiled, backend="aot_eager", dynamic=False)
    x = batch().double()
    assert max(differences(examine(plain, x, None), examine(compiled, x, None))) < 1e-9


def test_all_networks_are_compiled_but_those_that_cannot_be_and_no_copy_is():
    def names(model: nn.Module) -> list[str]:
        return [name for name, part in model.named_modules() if part._compiled_call_impl is not None]

    ddpm, critics = model_of("ddpm"), model_of("wgan_gp")
    for model in (ddpm, critics):
        compile_networks(model, backend="eager")
    assert names(ddpm) == ["network"] and names(copy.deepcopy(ddpm)) == []
    assert names(critics) == ["generator"]


@pytest.mark.parametrize("family", ALL)
def test_every_weight_of_a_network_is_compiled_where_it_is_called(family, monkeypatch):
    """A compiled module that is never called, because its methods are used instead, would speed up nothing."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda part, **_: compiled.append(part))
    model = model_of(family)
    compile_networks(model)
    called: set[nn.Module] = set()
    for part in compiled:
        part.register_forward_pre_hook(lambda part, _: called.add(part))
    examine(model, batch(), conditions(model, 4))
    covered = {id(p) for part in called for p in part.parameters()}
    owners = [part for part in model.modules() if isinstance(part, GenerativeModel)]
    uncompiled = {id(p) for owner in owners for name in owner.eager for p in getattr(owner, name).parameters()}
    containers = [part for part in model.modules() if type(part).forward is nn.Module.forward]
    # A weight of the family itself, or of a part that is never called as a whole.
    own = {id(p) for owner in (*owners, *containers) for p in owner.parameters(recurse=False)}
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in covered | uncompiled | own]
    assert (compiled or uncompiled) and not lacking


def test_pixels_side_by_side_change_roundings_alone():
    seen = []

    class Seen(Mean):
        def loss(self, x, *arguments, **named):
            seen.append(x)
            return super().loss(x, *arguments, **named)

    def module(model: GenerativeModel, channels_last: bool) -> GenerativeModule:
        batches = Batches(Split(torch.zeros(8, *model.shape), None), 4, seed=0)
        made = GenerativeModule(model, torch.optim.SGD, batches, Budget(images=40), channels_last=channels_last)
        made.make_plan()
        made.step()
        return made

    for channels_last in (False, True):
        module(Seen(EventSpec((3, 4, 4))), channels_last)
        assert seen[-1].is_contiguous(memory_format=torch.channels_last) == channels_last
    plain, model = model_of("ddpm"), model_of("ddpm").to(memory_format=torch.channels_last)
    x = batch()
    assert max(differences(examine(plain, x, None), examine(model, x, None))) < 1e-4


@pytest.mark.parametrize("family", ALL)
def test_no_loss_waits_for_the_device(family, monkeypatch):
    # On tensors that have a device but no values, any look at a value is an error.
    model = case_of(family).fresh()
    y = conditions(model, 4)
    parts = [stage.module for stage in model.stages()] if isinstance(model, Staged) else [model]
    turns = [
        (part, {"turn": turn} if turn else {})
        for part in parts
        for turn in (part.networks() if isinstance(part, Adversarial) else [None])
    ]
    for part, _ in turns:  # what happens once, on the first batch, may wait
        part.initialize(batch(), y if part.condition else None, rng=torch.Generator())
    # Gradients are torch's own, and want a driver.
    monkeypatch.setattr(torch.autograd, "grad", lambda _, x, **__: (torch.zeros_like(x),))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda")
        y = None if y is None else y.to("cuda")
        for part, turn in turns:
            terms = part.loss(batch().to("cuda"), y if part.condition else None, rng=torch.Generator(), **turn)
            assert terms.total.device.type == "cuda"
            with pytest.raises(DataDependentOutputException):
                float(terms.total)


# Prints how many bytes the heap holds once eight blocks of 16 MiB were taken and given back: mallinfo2's first number.
HELD = """
import ctypes, sys
from genzoo.jobs.allocator import tune
if sys.argv[1] == "tuned":
    assert tune() == "glibc, keeping freed blocks"
class Info(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Info
for block in [libc.malloc(ctypes.c_size_t(2**24)) for _ in range(8)]:
    libc.free(ctypes.c_void_p(block))
print(getattr(libc.mallinfo2(), "0"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="of glibc's own allocator")
def test_the_tuned_allocator_keeps_what_is_given_back():
    def held(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", HELD, how], capture_output=True, check=True).stdout)

    assert held("tuned") >= 8 * 2**24 > held("plain")
