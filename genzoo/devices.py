"""Choice and description of devices and precision."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from genzoo.errors import UsageError

DRIVER = Path("/proc/driver/nvidia/version")  # of NVIDIA's kernel module


def device_name(device: Any) -> str:
    """Name of a ``torch.device`` in a protocol: the model of a GPU, since speeds of different GPUs are not comparable."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def gpu_facts(device: Any) -> dict[str, Any] | None:
    """Properties of a GPU: model, memory in bytes, capability, driver, CUDA and cuDNN; None for a CPU."""
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
    """Resolve "auto" to bf16 autocast with native support, else float32; older GPUs (V100, T4) emulate bf16."""
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
    """Resolve "auto" to the device of this machine.

    Args:
        name: "auto", "cpu" or "cuda".
        key: configuration key, for messages.

    Raises:
        UsageError: for an unavailable device.
    """
    import torch

    if name.partition(":")[0] == "mps":
        raise UsageError(f"{key}={name}: Apple GPUs are not supported; set {key}=cpu")
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UsageError(f"{key}={name}: choose from auto, cpu, cuda")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{key}=cuda: no CUDA device available; set {key}=cpu")
    return name
