"""The processes that train together on one machine, and what the others do when one of them dies.

Lightning's own launcher kills the process that has started the others, with SIGKILL, up to five seconds after one of them has
died: nothing is recorded and nothing is said. Here the death is noticed and ends the training with one line and exit code 4.
Mostly the communication fails at once, since the sockets of a dead process are closed; where it hangs instead, as NCCL's may,
the process that has started the others ends the run after ``PATIENCE`` seconds.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from genzoo.console import log_stderr
from genzoo.runs import ResourceError
from genzoo.training.stopping import HEARD

PATIENCE = 20.0  # seconds that a communication with a dead process may hang
NOTICE = 3.0  # seconds after a failure of the communication within which a dead process is looked for
_STOPPED = tuple(128 + number for number in HEARD)  # after a checkpoint, as the others will
# How torch's backends speak of a process that is gone; gloo raises plain RuntimeErrors.
_COMMUNICATION = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "connectfullmesh",
    "tcpstore",
)


def ended(number: int, code: int) -> str:
    """Say how a process ended.

    Args:
        number: its rank.
        code: of its exit, negative for a signal.
    """
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"process {number} of those that train together {how}"


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine and watches them.

    Attributes:
        on_hang: called with the cause before the process ends because a communication hangs.
    """

    on_hang: Callable[[str], object] | None = None
    leaving = False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the processes, then call a function as Lightning's launcher does."""
        self.parent = os.getppid()
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def dead(self) -> str | None:
        """Return which of the started processes has failed, and how."""
        for number, process in enumerate(self.procs, start=1):
            if process.poll() and process.returncode not in _STOPPED:
                return ended(number, process.returncode)
        return None

    def end(self) -> None:
        """Kill the started processes that are left; what they hold is held here too."""
        self.leaving = True
        for process in self.procs:
            if process.poll() is None:
                process.kill()

    def _watch(self) -> None:
        while not self.leaving:
            time.sleep(0.5)
            if cause := self.dead():
                time.sleep(PATIENCE)
                if not self.leaving:
                    self.end()
                    if self.on_hang:
                        self.on_hang(cause)
                    log_stderr(cause)
                    os._exit(ResourceError.exit_code)
                return

    def explain(self, error: BaseException) -> BaseException:
        """Turn a failure of the communication into the cause that is behind it.

        Args:
            error: that has ended the training in this process.

        Returns:
            A ``ResourceError`` that names the dead process, ``SystemExit`` in a process whose starter says it, or the error.
        """
        text = " ".join(str(error).lower().split())
        if not isinstance(error, RuntimeError | OSError) or not any(word in text for word in _COMMUNICATION):
            return error
        if self.procs:
            deadline = time.monotonic() + NOTICE
            while (cause := self.dead()) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            return ResourceError(cause or f"the processes that train together have lost each other: {text[:200]}")
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number == 0 or "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun or SLURM, which end the others
            return ResourceError(f"a process of those that train together has died: {text[:200]}")
        deadline = time.monotonic() + NOTICE  # a process that dies is replaced as the parent of its children
        while os.getppid() == self.parent and time.monotonic() < deadline:
            time.sleep(0.05)
        if os.getppid() == self.parent or number > 1:  # of several processes one says it
            return SystemExit(ResourceError.exit_code)
        return ResourceError("process 0 of those that train together has died, which has started the others")
