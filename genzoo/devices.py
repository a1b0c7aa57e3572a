"""Devices: which one is used, in which precision, and how records describe it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from genzoo.errors import UsageError

DRIVER = Path("/proc/driver/nvidia/version")  # where NVIDIA's kernel module describes itself


def device_name(device: Any) -> str:
    """Name a ``torch.device`` for a protocol: a GPU by its model, since speeds of unlike GPUs are not comparable."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def gpu_facts(device: Any) -> dict[str, Any] | None:
    """Describe a GPU and its software: model, memory in bytes, capability, driver, CUDA and cuDNN; None for a CPU."""
    import torch

    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    driver = None
    with contextlib.suppress(OSError):
        words = DRIVER.read_text().partition("\n")[0].split()
        driver = next((word for word in words if word[0].isdigit()), None)
    return {
        "name": facts.name,
        "memory": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def pick_precision(name: str, device: str) -> str:
    """Turn "auto" into bf16 autocast where the processor computes in it, else float32; older GPUs (V100, T4) emulate it."""
    import torch

    if name != "auto":
        return name
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16-mixed" if native else "32-true"


def pick_device(name: str, key: str = "device") -> str:
    """Turn "auto" into what this machine has.

    Args:
        name: "auto", "cpu" or "cuda".
        key: where the name stands, for messages.

    Raises:
        UsageError: for a device that is not there.
    """
    import torch

    if name.partition(":")[0] == "mps":
        raise UsageError(f"{key}={name}: the GPUs of Apple's machines are not supported; say {key}=cpu")
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UsageError(f"{key}={name}: choose from auto, cpu, cuda")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{key}=cuda: torch finds no CUDA device here; say {key}=cpu")
    return name
