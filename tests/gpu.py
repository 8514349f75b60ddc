"""A GPU that is not there: it computes on the CPU and counts how often Python would wait for it.

`Pretender` is a tensor on ``cuda:0`` to Python, and an ordinary one on the CPU to torch's kernels
and its autograd. Numbers are real, tensors of two devices do not mix, and `Gpu.waits` lists every
line at which a program would wait: for a value, for a shape that depends on values, for a copy from
or to memory that is not pinned. Nothing is timed, and no CUDA kernel runs.
"""

import sys
import traceback
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SHAPES = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "_coalesce"}
VALUES = {"_local_scalar_dense", "equal", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Pretender(Tensor):
    """A tensor on ``cuda:0`` whose values are those of ``inner``, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretender":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )
        made.inner = inner
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def record_stream(self, stream: Any) -> None: ...

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of cuda:0 to numpy")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self if dtype in (None, self.dtype) else Tensor.to(self, dtype)
        if device is None or device.type == "cuda":
            return moved.clone() if copy and moved is self else moved
        if not non_blocking:
            Gpu.wait("copy to the CPU")
        return moved.detach().inner.clone()  # type: ignore[attr-defined]

    def __repr__(self, **_: Any) -> str:
        return f"Pretender({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """Within it there is a ``cuda:0``; `install` prepares torch for it.

    ``waits`` counts (what, file:line of the package) since `restart`, and ``beside`` the bytes
    copied to it on another stream than the one that computes.
    """

    waits: ClassVar[Counter[tuple[str, str]]] = Counter()
    beside: ClassVar[int] = 0
    streams: ClassVar[int] = 0  # entered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @classmethod
    def restart(cls) -> None:
        cls.waits, cls.beside = Counter(), 0

    @classmethod
    def wait(cls, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/tests/gpu.py" not in f.filename]
        ours = [f for f in frames if "/instructblip/" in f.filename] or frames[-1:]
        name = ours[-1].filename.rpartition("/instructblip/")[2]
        cls.waits[what, f"{name}:{ours[-1].lineno}"] += 1


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch on the CPU; its results are on the device of its inputs."""
    name = func.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    pretenders = [x for x in leaves if isinstance(x, Pretender)]
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pretender)]
    to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
    if not pretenders and not to_gpu:
        return func(*args, **kwargs)
    if name in SHAPES or name in VALUES:
        Gpu.wait(name)
    if name in INDEXING:
        indices = [x for x in args[1] if isinstance(x, Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            Gpu.wait("index by a mask")
        if any(not isinstance(x, Pretender) for x in indices):
            Gpu.wait("index from the CPU")
    elif name == "copy_" and isinstance(args[0], Pretender) != isinstance(args[1], Pretender):
        Gpu.wait("copy between devices")
    elif name == "_to_copy" and others:
        Gpu.beside += others[0].nbytes if Gpu.streams else 0
        if not (pinned(others[0]) and kwargs.get("non_blocking")):
            Gpu.wait("copy of pageable memory")
    elif pretenders and name != "copy_" and any(x.dim() for x in others):
        raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")
    known = {id(x.inner): x for x in pretenders}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Pretender) else x, (args, kwargs))
    if to_gpu:
        kwargs["device"] = CPU
    given = {id(x) for x in others}

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in known:
            return known.get(id(x), x)
        if id(x) in given:  # changed in place, or moved without a copy
            return Pretender(x.clone()) if to_gpu else x
        return Pretender(x)

    return tree_map(wrap, func(*args, **kwargs))


_PINNED: dict[int, Tensor] = {}


def pinned(tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _PINNED


def pin(tensor: Tensor) -> Tensor:
    copied = tensor.clone()
    _PINNED[copied.untyped_storage().data_ptr()] = copied  # kept: no other may have its address
    return copied


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def __enter__(self) -> "Stream":
        Gpu.streams += 1
        return self

    def __exit__(self, *_: Any) -> None:
        Gpu.streams -= 1


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None:
        Gpu.wait("event")


def move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """``module.to(device)``: torch's cannot put a tensor of another class into a parameter."""
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    if device is None or device.type != "cuda":
        return _to(module, *args, **kwargs)
    moved: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not isinstance(p, Pretender):
                if p not in moved:
                    moved[p] = nn.Parameter(Pretender(p.detach().clone()), p.requires_grad)
                part._parameters[name] = moved[p]
        for name, b in part._buffers.items():
            if b is not None and not isinstance(b, Pretender):
                part._buffers[name] = Pretender(b.detach().clone())
    return module


_to = nn.Module.to


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's Python find one GPU until the end of the test."""
    _PINNED.clear()
    Gpu.restart()
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_stream": Stream,
        "stream": lambda stream: stream,
        "Stream": Stream,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", pinned)
    monkeypatch.setattr(nn.Module, "to", move)
    group = torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def grouped(tensors: Any, *rest: Any) -> Any:
        """torch groups by the device that its kernels see."""
        on_gpu = isinstance(tensors[0][0], Pretender)
        return {
            (CUDA if on_gpu else device, dtype): value
            for (device, dtype), value in group(tensors, *rest).items()
        }

    for owner in (
        "torch.utils._foreach_utils",
        "torch.nn.utils.clip_grad",
        "torch.optim.optimizer",
    ):
        monkeypatch.setattr(sys.modules[owner], "_group_tensors_by_device_and_dtype", grouped)
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
        made = make(data, **settings)
        if device is None or torch.device(device).type != "cuda":
            return made
        Gpu.wait("copy of a Python value")
        return Pretender(made)

    monkeypatch.setattr(torch, "tensor", tensor)
