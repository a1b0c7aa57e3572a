"""Child processes that begin with the libraries loaded, as forks of a process that does nothing else.

``python -m genzoo`` spends seconds of processor time on imports. Tests of what a command does, kills and signals included,
start it by ``Child``, a ``subprocess.Popen`` whose process is forked from one that has imported all libraries once. Working
directory, environment, standard streams, signal handlers and exit code are those of a process of its own. What an interpreter
reads when it starts is that of the first process: the locale, the seed of hashes, ``OMP_NUM_THREADS``. Tests of the start
itself, of the terminal and of installed packages use ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HIGH = 500  # above the descriptors that a process uses
LONGEST = 1 << 20  # bytes of a request
# What the commands import at some time, except wandb: its temporary directory would be shared, and removed by the first fork.
LIBRARIES = (
    "torch", "torchvision", "pytorch_lightning", "torchmetrics", "hydra.main", "sklearn.datasets", "scipy.linalg",
    "scipy.optimize", "scipy.stats", "rich.table", "PIL.Image", "safetensors.torch", "torch._dynamo",
    "torch.utils.flop_counter", "torch.distributed", "matplotlib.figure", "plotly", "jinja2", "pandas",
)  # fmt: skip


class Child(subprocess.Popen):
    """A process that runs ``python -m MODULE WORDS`` or ``python -c PROGRAM WORDS``, forked with the libraries loaded.

    Args:
        args: as for ``subprocess.Popen``, beginning with ``sys.executable``.
        nested: whether processes that Lightning's launcher starts in it are forked as well.
        kwargs: as for ``subprocess.Popen``; of those that change the start of a process ``cwd``, ``env`` and ``pass_fds``.
    """

    def __init__(self, args: Any, *, nested: bool = False, **kwargs: Any):
        self._nested = nested
        super().__init__(args, **kwargs)

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, *pipes_and_rest: Any) -> None:  # fmt: skip
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = pipes_and_rest[:6]
        assert args[0] == sys.executable and args[1] in ("-m", "-c") and preexec_fn is None and not shell
        self._status, status = os.pipe()
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        request = {
            "how": args[1],
            "what": args[2],
            "words": [os.fspath(word) for word in args[3:]],
            "cwd": os.path.abspath(cwd or "."),
            "environment": dict(os.environ if env is None else env),
            "keep": list(pass_fds),
            "nested": self._nested,
        }
        requests = loaded()
        try:
            data = json.dumps(request).encode()
            assert len(data) <= LONGEST
            nested = [requests.fileno()] if self._nested else []
            socket.send_fds(requests, [data], [status, *nested, *streams, *pass_fds])
        finally:
            os.close(status)
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self._child_created = True
        self.pid = int(self._line())

    def _line(self) -> str:
        """Read a line from the process that waits for the child; "" at the end."""
        read = b""
        while not read.endswith(b"\n") and (byte := os.read(self._status, 1)):
            read += byte
        return read.decode()

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        line = self._line()
        os.close(self._status)
        return self.pid, int(line)

    def _internal_poll(self, _deadstate: Any = None, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(args: Sequence[Any], **kwargs: Any) -> subprocess.CompletedProcess[Any]:
    """Do what ``subprocess.run`` does by a ``Child``."""
    timeout, check, capture = (
        kwargs.pop("timeout", None),
        kwargs.pop("check", False),
        kwargs.pop("capture_output", False),
    )
    if capture:
        kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Child(args, **kwargs) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        except BaseException:
            child.kill()
            raise
    done = subprocess.CompletedProcess(args, child.returncode, out, err)
    if check:
        done.check_returncode()
    return done


@functools.cache
def loaded() -> socket.socket:
    """Start the process that is forked, once; return the socket that takes its requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * LONGEST)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.children", str(theirs.fileno())],
        cwd=ROOT,
        env=environment,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def serve(descriptor: int) -> dict[str, Any]:
    """Fork for each request until the other end is closed.

    Returns:
        The request, in the fork for it.
    """
    requests = socket.socket(fileno=fcntl.fcntl(descriptor, fcntl.F_DUPFD, HIGH))
    os.close(descriptor)
    for name in (*LIBRARIES, *modules()):
        with contextlib.suppress(ImportError):  # an optional library is missing
            importlib.import_module(name)
    assert "wandb" not in sys.modules
    gc.collect()
    gc.freeze()
    while True:
        data, descriptors, *_ = socket.recv_fds(requests, LONGEST, 32)
        if not data:
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.wait()
            sys.exit()
        if not os.fork():
            request = json.loads(data)
            moved = [fcntl.fcntl(number, fcntl.F_DUPFD, HIGH) for number in descriptors]
            for number in descriptors:
                os.close(number)
            wait_for_fork(moved[0], [requests.detach(), *moved[1:]])
            if request["nested"]:
                request["nested"] = moved.pop(1)
            for number, target in zip(moved[1:], (0, 1, 2, *request["keep"]), strict=True):
                os.dup2(number, target, inheritable=True)
                os.close(number)
            return request
        for number in descriptors:
            os.close(number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def wait_for_fork(status: int, others: list[int]) -> None:
    """Fork; in the first process write the pid of the second, and its exit status when it ends, and leave.

    Args:
        status: a descriptor to write to.
        others: descriptors of which the first process needs none, and the second all but the first one.
    """
    pid = os.fork()
    if not pid:
        os.close(status)
        os.close(others[0])
        return
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal, which are for the second
        signal.signal(number, signal.SIG_IGN)
    for number in others:
        os.close(number)
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % pid)
        os.write(status, b"%d\n" % os.waitpid(pid, 0)[1])
    os._exit(0)


def modules() -> list[str]:
    """Name the modules of the package."""
    paths = sorted(path.relative_to(ROOT) for path in (ROOT / "genzoo").rglob("*.py"))
    return [".".join(path.with_suffix("").parts) for path in paths if path.stem not in ("__init__", "__main__")]


def execute(request: dict[str, Any]) -> None:
    """Run a module or a program as the interpreter would."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    paths = [path for path in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [request["cwd"] if request["how"] == "-m" else "", *paths]
    importlib.invalidate_caches()
    if request["nested"]:
        fork_ranks(request["nested"])
    if request["how"] == "-m":
        sys.argv = [request["what"], *request["words"]]
        runpy.run_module(request["what"], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *request["words"]]
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(request["what"], "<string>", "exec"), main.__dict__)


def fork_ranks(descriptor: int) -> None:
    """Let Lightning's launcher start processes through the socket of a descriptor."""
    from pytorch_lightning.strategies.launchers import subprocess_script

    from tests import children

    requests = socket.socket(fileno=descriptor)
    children.loaded = lambda: requests
    subprocess_script.subprocess = types.SimpleNamespace(Popen=children.Child)


def leave(request: dict[str, Any]) -> None:
    """Run it and end as the interpreter does, except that nothing is freed, which takes half a second."""
    code: Any = 0
    try:
        execute(request)
    except SystemExit as leaving:
        code = leaving.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        code = 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    leave(serve(int(sys.argv[1])))
