"""What the machine computes on, for records that are compared with those of other machines."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

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
