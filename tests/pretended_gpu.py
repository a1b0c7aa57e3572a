"""A CPU that pretends to be a GPU, so that a machine without one finds what a GPU would refuse or wait for.

``install`` makes torch, for the rest of the process, hand out tensors whose ``device`` is ``cuda:0`` and whose values lie in
host memory. Every operation is computed by the CPU's kernel, and held to CUDA's rules on the way:

- tensors of both devices in one operation raise ``MixedDevices``, except where CUDA takes a number or an index of the host's;
- a generator draws on its own device alone;
- what would make the host wait for the device is counted in ``WAITS``, by its kind and the line of genzoo that did it:
  values that are read, shapes that depend on values, copies between host and device that are not asynchronous.

To torch's C++ the tensors belong to an accelerator that is registered from Python (``PrivateUse1``): autograd then takes its
streams and contexts from there, whether torch was built for CUDA or not, and no driver is needed. Kernels, graphs, ``compile``,
autocast and NCCL are not pretended: of a real GPU this shows where values are, not how fast or how precisely it computes.

A process cannot undo any of it. Tests therefore do this in one of its own, see ``tests.on_pretended_gpu``.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import genzoo

SOURCE = f"{genzoo.__path__[0]}/"
aten = torch.ops.aten
CUDA = torch.device("cuda:0")
NAME = "pretended"  # of the accelerator, to torch's C++
WAITS: collections.Counter[tuple[str, str]] = collections.Counter()  # (kind, line of genzoo) -> how often

COPIES = {aten.copy_.default, aten.copy.default, aten._to_copy.default}
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip
# Of other than point-wise operations those that take a number which is a tensor of the host's.
TAKES_NUMBERS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.where.self}
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "multinomial", "_linalg_eigh", "_linalg_svd", "_linalg_det", "linalg_qr",
    "linalg_inv_ex", "linalg_cholesky_ex",
}  # fmt: skip


class MixedDevices(RuntimeError):
    """Tensors of host and device in one operation."""


def line() -> str:
    """Name the innermost line of genzoo that runs at present."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if (path := frame.f_code.co_filename).startswith(SOURCE):
            return f"{path.removeprefix(SOURCE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside genzoo"


def wait(kind: str) -> None:
    """Count one wait of the host for the device."""
    WAITS[kind, line()] += 1


class Pretended(Tensor):
    """A tensor that says it lies on ``cuda:0``; ``host`` holds its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        made.host = host.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.host})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host first."
        )

    __array__ = numpy  # type: ignore[assignment]

    def tolist(self) -> Any:
        wait("tolist")
        return self.host.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        wait("pickle")
        return self.host.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                made: Any = Pretended(self.host.clone(), self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                made = torch.nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Find the tensors among arguments; torch's own search takes longer than the small operations of a test."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)


def replaced(value: Any, by: Callable[[Tensor], Any]) -> Any:
    """Replace every tensor in an argument or a result."""
    if isinstance(value, Tensor):
        return by(value)
    if isinstance(value, list | tuple):
        return type(value)(replaced(part, by) for part in value)
    return value


def place(device: Any) -> str | None:
    """Return "device" or "host" for what an argument ``device`` says, None where it says nothing."""
    if device is None:
        return None
    return "device" if torch.device(device).type in ("cuda", NAME) else "host"


def check(func: Any, name: str, args: Any, here: list[Pretended], there: list[Tensor]) -> None:
    """Raise where an operation on the device may not take these tensors of the host, and count the waits for its values."""
    if func in INDEXING:
        if not isinstance(args[0], Pretended):
            raise MixedDevices(f"a tensor of the host is indexed by one of the device at {line()}")
        if any(index is not None and index.dtype == torch.bool for index in args[1]):
            wait("index by booleans")
        if any(index is not None and not isinstance(index, Pretended) for index in args[1]):
            wait("copy of an index to the device")
        there = [value for value in args[2:3] if not isinstance(value, Pretended) and value.ndim]
    elif func in COPIES:
        return
    numbers = torch.Tag.pointwise in func.tags or func in TAKES_NUMBERS
    if any(tensor.ndim or not numbers for tensor in there):
        shapes = [tuple(tensor.shape) for tensor in (*here, *there)]
        raise MixedDevices(f"{name} takes tensors on cuda:0 and on the CPU, of shapes {shapes[:8]}, at {line()}")
    if there and name.endswith("_") and not isinstance(args[0], Pretended):
        raise MixedDevices(f"{name} would write numbers of the device into a tensor of the host at {line()}")
    if name in WAITING or func is aten.repeat_interleave.Tensor:
        wait(name)


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do one operation with the CPU's kernel, by the rules of the device."""
    here: list[Pretended] = []
    there: list[Tensor] = []
    for tensor in tensors_in(args, *kwargs.values()):
        (here if isinstance(tensor, Pretended) else there).append(tensor)  # type: ignore[arg-type]
    name, wanted = func._schema.name.partition("::")[2], place(kwargs.get("device"))
    if here:
        check(func, name, args, here, there)
    if func in COPIES:
        of_copy = func is not aten._to_copy.default
        source = "device" if isinstance(args[1 if of_copy else 0], Pretended) else "host"
        target = ("device" if isinstance(args[0], Pretended) else "host") if of_copy else wanted or source
        if source != target and not (kwargs.get("non_blocking") or (of_copy and len(args) > 2 and args[2])):
            wait(f"copy from {source} to {target}")
        wanted = target
    if wanted == "device" and "device" in kwargs:
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": torch.device("cpu")}
    own = {id(tensor.host): tensor for tensor in here}

    def host(tensor: Tensor) -> Tensor:
        return tensor.host if isinstance(tensor, Pretended) else tensor

    with torch._C._DisableTorchDispatch():
        result = func(*replaced(args, host), **{name: replaced(value, host) for name, value in kwargs.items()})
    if (wanted or ("device" if here else "host")) == "host":
        return result
    # What was computed in place is the tensor that it was.
    return replaced(result, lambda tensor: own[id(tensor)] if id(tensor) in own else Pretended(tensor))


class OnDevice(TorchDispatchMode):
    """Hands operations that make tensors on the device, or take some, to ``compute``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if place(kwargs.get("device")) == "device" or any(
            isinstance(tensor, Pretended) for tensor in tensors_in(args, *kwargs.values())
        ):
            return compute(func, args, kwargs)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A generator of random numbers that remembers its device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        made.own = CUDA if place(device) == "device" else torch.device("cpu")
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.own


class Calls(TorchFunctionMode):
    """Translates what Python code says of devices before torch's C++ hears it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.check_generator(func, args, kwargs)
        data = args[0] if args else kwargs.get("data")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and place(kwargs.get("device")) == "device":
            if not isinstance(data, Pretended):
                device = kwargs.pop("device")
                return self.moved(func(*args, **kwargs), device)
        elif func is Tensor.new_tensor and isinstance(data, Pretended) and kwargs.get("device") is None:
            values = replaced(args[1], lambda tensor: tensor.tolist())
            return self.moved(torch.tensor(values, dtype=kwargs.get("dtype", data.dtype)), CUDA)
        elif func is Tensor.pin_memory:
            return data.clone()
        elif func is Tensor.cuda:
            return self.moved(data, CUDA)
        if func in (Tensor.to, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full):
            args = tuple(self.raw(arg) if isinstance(arg, str | torch.device) else arg for arg in args)
        if place(kwargs.get("device")) == "device":
            kwargs["device"] = torch.device(NAME, 0)
        return func(*args, **kwargs)

    @staticmethod
    def raw(device: Any) -> Any:
        return torch.device(NAME, 0) if place(device) == "device" else device

    @staticmethod
    def moved(tensor: Tensor, device: Any) -> Tensor:
        return tensor.to(torch.device(NAME, 0) if place(device) == "device" else device)

    @staticmethod
    def check_generator(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rng = kwargs.get("generator")
        if rng is None:
            return
        first = args[0] if args and isinstance(args[0], Tensor) else None
        wanted = place(kwargs.get("device")) or ("host" if first is None else place(first.device))
        if wanted != place(rng.device):
            raise MixedDevices(f"a generator of the {place(rng.device)} draws on the {wanted} at {line()}")


def install() -> None:
    """Let this process believe that it has one GPU."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    torch._C._ensureCUDADeviceGuardSet()
    _setup_privateuseone_for_python_backend(NAME)
    torch.Generator = Generator  # type: ignore[misc, assignment]
    # In which a tensor whose values another one holds cannot be cut into views.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()  # type: ignore[misc, assignment]
    torch.__future__.set_swap_module_params_on_conversion(True)  # as parameters keep their identity on a real device

    def synchronize(*_: Any) -> None:
        wait("synchronize")

    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0), "set_device": None,
        "get_device_name": "pretended GPU", "is_bf16_supported": True, "is_initialized": True, "_lazy_init": None,
        "manual_seed": None, "manual_seed_all": None, "is_current_stream_capturing": False, "empty_cache": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "mem_get_info": (2**34, 2**34),
        "get_device_properties": types.SimpleNamespace(name="pretended GPU", total_memory=2**34, major=9, minor=0),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.cuda.synchronize = synchronize


def install_in_lightning() -> None:
    """Let Lightning believe the same; apart, since its import takes seconds."""
    import lightning_fabric.accelerators.cuda as fabric
    import pytorch_lightning.accelerators.cuda as lightning

    for module in (fabric, lightning):
        for name, answer in {"num_cuda_devices": 1, "_check_cuda_matmul_precision": None}.items():
            setattr(module, name, lambda *_, _answer=answer: _answer)
    fabric.is_cuda_available = lambda: True


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Compute on the pretended device whatever asks for CUDA."""
    with OnDevice(), Calls():
        yield


@contextlib.contextmanager
def ranks_of(world: int) -> Iterator[None]:
    """Let this process be the first of several that train together, the others of which hold zeros."""
    dist = torch.distributed
    answers = {"is_initialized": True, "get_world_size": world, "get_rank": 0}
    before = {name: getattr(dist, name) for name in (*answers, "all_reduce", "broadcast")}

    try:
        for name, answer in answers.items():
            setattr(dist, name, lambda *_, _answer=answer: _answer)
        dist.all_reduce = dist.broadcast = lambda *_, **__: None
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
