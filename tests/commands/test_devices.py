"""What is written down of a GPU, what is chosen for it, and what is refused on it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from genzoo import devices
from genzoo.data import loader
from genzoo.data.dataset import DataError, Split
from genzoo.data.loader import Batches, check_room
from genzoo.devices import pick_precision
from genzoo.errors import UsageError
from genzoo.jobs.resources import resources
from genzoo.jobs.resume import gpu
from genzoo.report.texts import hardware
from genzoo.runs import ResourceError

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch, tmp_path):
    facts = SimpleNamespace(name="NVIDIA H100", total_memory=2**36, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: facts.name)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Tue Jan 1\nGCC version: 12\n")
    monkeypatch.setattr(devices, "DRIVER", version)


def test_a_gpu_is_named_with_its_software(card):
    facts = devices.gpu_facts(CUDA)
    assert facts is not None and facts["name"] == "NVIDIA H100" and facts["driver"] == "570.86.10"
    assert facts["capability"] == "9.0" and {"cuda", "cudnn", "memory"} <= facts.keys()
    assert devices.device_name(CUDA) == "NVIDIA H100" and devices.device_name(torch.device("cpu")) == "cpu"
    assert devices.gpu_facts(torch.device("cpu")) is None


def test_a_run_that_goes_on_with_another_gpu_or_driver_can_say_so(card):
    one = devices.gpu_facts(CUDA)
    other = {**one, "driver": "580.1"}
    assert {name for name in gpu(one) if gpu(one)[name] != gpu(other)[name]} == {"GPU driver"}
    assert set(gpu(None).values()) == {None}


def test_a_comparison_names_the_gpu_or_the_processor():
    assert hardware({"gpu": {"name": "NVIDIA H100"}, "machine": {"cpu": "EPYC"}}, threads=True) == "NVIDIA H100"
    assert hardware({"gpu": None, "machine": {"cpu": "EPYC"}, "threads": 2}, threads=True) == "EPYC, 2 threads"
    assert hardware({"machine": {"cpu": "EPYC"}}) == "EPYC" and hardware({"machine": 3}) == ""


@pytest.mark.parametrize(("emulates", "expected"), [(True, "32-true"), (False, "bf16-mixed")])
def test_bfloat16_is_chosen_where_the_gpu_computes_in_it(monkeypatch, emulates, expected):
    """torch calls bfloat16 supported on a V100 or a T4 too, which emulate it."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulates
    )
    assert pick_precision("auto", "cuda") == expected
    assert pick_precision("bf16-mixed", "cuda") == "bf16-mixed"


def test_data_beyond_the_memory_of_a_gpu_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**6, 10**7))
    check_room(torch.zeros(8 * 10**5 - 1, dtype=torch.uint8), CUDA)
    check_room(torch.zeros(10**6), torch.device("cpu"))
    with pytest.raises(DataError, match=r"0\.0 GB.*trainer\.workers=2"):
        check_room(torch.zeros(8 * 10**5 + 1, dtype=torch.uint8), CUDA)


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_of_loader_workers_are_pinned_for_a_gpu_and_copied_without_waiting(monkeypatch, device, pinned):
    made = {}

    def data_loader(*_, **options):
        made.update(options)
        return []

    monkeypatch.setattr(loader, "DataLoader", data_loader)
    batches = Batches(Split(torch.zeros(4, 2), None), 2, seed=0, workers=1)
    batches.to(device)
    batches._prefetched(0)
    assert made["pin_memory"] is pinned


def test_memory_that_gives_out_names_the_batch_of_the_work_that_was_done(tmp_path):
    with (
        pytest.raises(ResourceError, match=r"metrics\.batch_size=250: try metrics\.batch_size=125: "),
        resources(tmp_path, 250, "metrics.batch_size"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_operator_without_a_deterministic_implementation_is_named(tmp_path):
    error = "cumsum_cuda_kernel does not have a deterministic implementation, but you set ..."
    with pytest.raises(UsageError, match=r"trainer\.deterministic=true: cumsum_cuda_kernel"), resources(tmp_path, 1):
        raise RuntimeError(error)
