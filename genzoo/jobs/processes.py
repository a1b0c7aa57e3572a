"""Processes of a distributed training: ranks, threads, batch division, and the claim of their job."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from genzoo.environment import usable_cores
from genzoo.errors import UsageError
from genzoo.runs import RunError, claims
from genzoo.training.settings import TrainerSettings


@contextlib.contextmanager
def claimed(outputs: str, job: str, devices: int, *, needed: bool) -> Iterator[None]:
    """Hold the claim of a job within a block, in the first process of a training, unless a parent process holds it.

    Args:
        outputs: folder of run directories.
        job: job id.
        devices: processes on each machine.
        needed: whether to raise if another process holds the claim, instead of training a second run.

    Raises:
        RunError: if another process holds a needed claim.
    """
    if os.environ.get("GENZOO_CLAIM") == job or rank_of(devices) > 0:
        yield
        return
    path = claims.path_of(outputs, job)
    for _ in range(5 if needed else 1):
        if claim := claims.try_lock(path):
            break
        time.sleep(0.1)  # another process may be probing the lock
    if claim is None and needed:
        raise RunError(f"resume=auto: this job is being trained by {claims.owner(path)}")
    before = os.environ.get("GENZOO_CLAIM")
    os.environ["GENZOO_CLAIM"] = job  # for the processes started by Lightning
    try:
        with claim or contextlib.nullcontext():
            yield
    finally:
        os.environ.pop("GENZOO_CLAIM")
        if before is not None:
            os.environ["GENZOO_CLAIM"] = before


def threads_of_each(devices: int) -> int:
    """Number of threads of each process on this machine.

    Args:
        devices: processes on this machine; ``OMP_NUM_THREADS`` is per process.
    """
    return usable_cores() if os.environ.get("OMP_NUM_THREADS") else max(usable_cores() // devices, 1)


def check_processes(settings: TrainerSettings, device: str) -> None:
    """Check the number of processes against the GPUs, the launcher and the batch size.

    Raises:
        UsageError: naming the key.
    """
    import torch

    devices, nodes, batch_size = settings.devices, settings.nodes, settings.batch_size
    if device == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or devices * nodes)
    if started != devices * nodes:
        raise UsageError(f"trainer.devices={devices}, trainer.nodes={nodes}: {started} processes were started in total")
    if batch_size % (devices * nodes):
        raise UsageError(
            f"trainer.batch_size={batch_size}: is not divisible by {devices * nodes} processes "
            "(trainer.devices times trainer.nodes)"
        )


def rank_of(devices: int) -> int:
    """Global rank of this process, from the environment of torchrun, SLURM or Lightning.

    Args:
        devices: processes on each machine.
    """
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"])
    if "LOCAL_RANK" in env:
        return int(env.get("NODE_RANK", "0")) * devices + int(env["LOCAL_RANK"])
    return int(env.get("SLURM_PROCID", "0")) if "SLURM_STEP_NUM_TASKS" in env else 0
