"""Processes of one training: their ranks, threads and shares of a batch, and the claim of the job that they train."""

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
    """Hold the claim of a job, by which sweeps see that it is being trained, unless a process above this one holds it.

    Args:
        outputs: the folder of all runs.
        job: its name.
        devices: processes on each machine, of which the first one holds it.
        needed: whether to go on where another process holds it, as a run that was asked for twice does.

    Raises:
        RunError: where another process holds a claim that is needed.
    """
    if os.environ.get("GENZOO_CLAIM") == job or rank_of(devices) > 0:
        yield
        return
    path = claims.path_of(outputs, job)
    for _ in range(5 if needed else 1):
        if claim := claims.try_lock(path):
            break
        time.sleep(0.1)  # somebody may only be looking whether its holder has ended
    if claim is None and needed:
        raise RunError(f"resume=auto: this very job is being trained by {claims.owner(path)}")
    before = os.environ.get("GENZOO_CLAIM")
    os.environ["GENZOO_CLAIM"] = job  # for the processes that Lightning starts
    try:
        with claim or contextlib.nullcontext():
            yield
    finally:
        os.environ.pop("GENZOO_CLAIM")
        if before is not None:
            os.environ["GENZOO_CLAIM"] = before


def threads_of_each(devices: int) -> int:
    """Return how many threads each of the processes on this machine computes with.

    Args:
        devices: processes on this machine; ``OMP_NUM_THREADS`` is a number for each of them.
    """
    return usable_cores() if os.environ.get("OMP_NUM_THREADS") else max(usable_cores() // devices, 1)


def check_processes(settings: TrainerSettings, device: str) -> None:
    """Refuse processes that a machine or a batch has no place for.

    Raises:
        UsageError: naming the key.
    """
    import torch

    devices, nodes, batch_size = settings.devices, settings.nodes, settings.batch_size
    if device == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or devices * nodes)
    if started != devices * nodes:
        raise UsageError(f"trainer.devices={devices}, trainer.nodes={nodes}: {started} processes were started in all")
    if batch_size % (devices * nodes):
        raise UsageError(
            f"trainer.batch_size={batch_size}: cannot be shared equally among {devices * nodes} processes "
            "(trainer.devices times trainer.nodes)"
        )


def rank_of(devices: int) -> int:
    """Return which of the processes that train together this one is, as torchrun, SLURM or Lightning have told it.

    Args:
        devices: processes on each machine.
    """
    told = os.environ
    if "RANK" in told:
        return int(told["RANK"])
    if "LOCAL_RANK" in told:
        return int(told.get("NODE_RANK", "0")) * devices + int(told["LOCAL_RANK"])
    return int(told.get("SLURM_PROCID", "0")) if "SLURM_STEP_NUM_TASKS" in told else 0
