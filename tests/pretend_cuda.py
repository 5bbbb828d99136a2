"""A CUDA device that is none: tensors on the CPU that say they are on a GPU, and are held to it.

A TorchFunctionMode sees every call of torch's Python interface. A tensor made on, or moved to, "cuda" carries a mark,
and so does what is computed from it; its `device` answers cuda:0, so that code takes the ways it takes on a GPU. Raised
as errors are

- operations on marked and unmarked tensors together, which CUDA refuses too (a single number on the CPU, an index and
  a copy between devices are allowed, as there);
- what only the CPU has: `numpy`, addresses for compiled code, a generator of the other device;
- the products and decompositions of which statistics are made in bfloat16 or float16, which are for forward passes.

Where the host waits for the device (item, tolist, bool, nonzero, a mask as index, a copy to the CPU), the place is
counted. Not seen is what torch does below its Python interface: inside a composite function of torch itself, in
autograd's backward pass (of end-to-end tuning the forward passes, those that are repeated for the backward one, the
gradients of banks as they are handed out and the steps of their optimizer are seen; those steps that dense parameters
take in the backward pass are not), and whether a CUDA kernel exists for an operation and a dtype. Mixed precision is
that of the CPU, whose list of operations is another one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_MARK = "_pretends_cuda"

_WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique", "equal", "allclose"}
_WAITS |= {"masked_select", "argwhere", "bincount", "is_nonzero", "unique_consecutive"}
_ON_CPU_ALONE = {"numpy", "__array__", "data_ptr", "__dlpack__", "share_memory_"}
_BETWEEN_DEVICES = {"copy_", "__setitem__", "__getitem__", "index_put_", "_has_compatible_shallow_copy_type"}
_STATISTICS = {"linalg_cholesky", "cholesky", "cholesky_ex", "eigh", "eigvalsh", "solve_triangular", "cholesky_solve"}
_STATISTICS |= {"addmm_", "baddbmm_", "addmm", "bmm", "solve", "svd"}
_LOW = (torch.bfloat16, torch.float16)


def is_marked(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and getattr(tensor, _MARK, False)


class DeviceError(AssertionError):
    """What a GPU would refuse."""


class PretendCuda(TorchFunctionMode):
    """waits: how often the host waited, by (file, line) of the code below `root`. calls: of torch with marked
    tensors."""

    def __init__(self, root: str = "kbvq") -> None:
        super().__init__()
        self.root, self.waits, self.calls = root, Counter[tuple[str, int]](), 0

    def __torch_function__(
        self, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._attribute(func, args)
        if name == "__set__" and func == Tensor.data.__set__:
            func(*args)
            _mark(args[0], is_marked(args[1]))
            return None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marked = [t for t in tensors if is_marked(t)]
        target, args, kwargs = self._target(name, args, kwargs)
        if "generator" in kwargs and kwargs["generator"] is not None and target == "cuda":
            raise DeviceError(f"{name}: a generator of the CPU for values on the GPU")
        if target is not None:
            found = func(*args, **kwargs)
            if target == "cuda" and tensors and found is tensors[0] and not marked:
                found = tensors[0].clone()
            if target != "cuda" and marked:
                found = found.clone() if found is tensors[0] else found
                self._wait()
            return _mark(found, target == "cuda")
        if not marked:
            return func(*args, **kwargs)
        self.calls += 1
        self._check(name, args, tensors, marked)
        if name == "histc" and not args[0].is_floating_point():  # CUDA has it for integers, the CPU does not
            args = (args[0].float(), *args[1:])
        found = func(*args, **kwargs)
        into_cpu = name in ("copy_", "__setitem__") and not is_marked(args[0])
        return found if into_cpu else tree_map(lambda leaf: _mark(leaf, True), found)

    def _attribute(self, func: Callable, args: tuple) -> Any:
        tensor = args[0]
        if not is_marked(tensor):
            return func(*args)
        if func == Tensor.device.__get__:
            return CUDA
        if func == Tensor.is_cuda.__get__:
            return True
        if func == Tensor.is_cpu.__get__:
            return False
        return tree_map(lambda leaf: _mark(leaf, True), func(*args))

    def _target(self, name: str, args: tuple, kwargs: dict) -> tuple[str | None, tuple, dict]:
        """The type of device that the call asks for, if it does, and its arguments with the CPU in the place of CUDA;
        "meta" is left alone."""
        if name in ("cpu", "cuda") and args and isinstance(args[0], Tensor):
            return name, args, kwargs
        wanted = kwargs.get("device")
        places = [i for i, value in enumerate(args) if isinstance(value, torch.device)]
        if name == "to":
            if len(args) > 1 and isinstance(args[1], str):
                places = [1]
            if len(args) > 1 and isinstance(args[1], Tensor):
                raise DeviceError("to(tensor) is not in this double")
        if wanted is None and places:
            wanted = args[places[0]]
        if wanted is None or name == "device":
            return None, args, kwargs
        wanted = torch.device(wanted)
        if wanted.type == "meta":
            return "meta", args, kwargs
        if wanted.type == "cuda":
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            args = tuple(torch.device("cpu") if i in places else value for i, value in enumerate(args))
        return wanted.type, args, kwargs

    def _check(self, name: str, args: tuple, tensors: list[Tensor], marked: list[Tensor]) -> None:
        if name in _ON_CPU_ALONE:
            raise DeviceError(f"{name} of a tensor on the GPU")
        others = [t for t in tensors if not is_marked(t) and t.dim() and not t.is_meta]
        if others and name not in _BETWEEN_DEVICES:
            shapes = [tuple(t.shape) for t in others]
            raise DeviceError(f"{name}: tensors on two devices; {shapes} on the CPU")
        if name in _WAITS or (name in _BETWEEN_DEVICES and self._by_mask(name, args)):
            self._wait()
        if name in _STATISTICS and any(t.dtype in _LOW for t in marked):
            raise DeviceError(f"{name}: {[str(t.dtype) for t in marked]} is for forward passes only")

    @staticmethod
    def _by_mask(name: str, args: tuple) -> bool:
        return name == "__getitem__" and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
        )

    def _wait(self) -> None:
        frame = sys._getframe()
        while frame is not None and f"/{self.root}/" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            self.waits[frame.f_code.co_filename.rpartition(f"/{self.root}/")[2], frame.f_lineno] += 1


def _mark(leaf: Any, on_cuda: bool) -> Any:
    if isinstance(leaf, Tensor):
        setattr(leaf, _MARK, on_cuda)
    return leaf


@contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """Torch says that there is a CUDA device, and works on it."""
    original, autocast, mode = nn.Parameter.__new__, torch.autocast, PretendCuda()

    def new(cls: type, data: Tensor | None = None, requires_grad: bool = True) -> Tensor:
        return _mark(original(cls, data, requires_grad), is_marked(data))

    def mixed(device_type: str, *arguments: Any, **options: Any) -> torch.autocast:
        return autocast("cpu" if device_type == "cuda" else device_type, *arguments, **options)

    gigabytes = 80 << 30
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda device=None: (gigabytes, gigabytes),
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (8, 0),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    with (
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(nn.Parameter, "__new__", new),
        mock.patch.object(torch, "autocast", mixed),
        mode,
    ):
        yield mode
