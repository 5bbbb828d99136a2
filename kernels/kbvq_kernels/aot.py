"""Compiles the kernels ahead of time, with no GPU, exactly as `launch.py` would launch them, and counts their code.

`record` runs a launcher on meta tensors and keeps the launches; `compile_launch` compiles one for a compute
capability; `inspect` reads registers, spills and instructions from the machine code.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kbvq_kernels import launch, triton_kernels

TARGETS = (80, 89, 90, 100)
"""Compute capabilities of the cards that users have: A100, RTX 4090 / L40, H100 / H200, B200."""

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its grid and its arguments."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]
    options: dict[str, int]


@dataclass(frozen=True)
class MachineCode:
    """What ptxas and the disassembler say of one kernel.

    loop: opcodes of its hottest loop, the one with most instructions among the innermost ones; all
    instructions when it has no loop. Sizes in bytes.
    """

    registers: int
    spilled: int
    shared_memory: int
    sass: str
    instructions: Counter[str]
    loop: Counter[str]


class _Recorder:
    def __init__(self, kernel: triton.JITFunction, launches: list[Launch]):
        self.kernel, self.launches, self.grid = kernel, launches, ()

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        self.grid = grid
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        self.launches.append(Launch(self.kernel, self.grid, arguments, options))


@contextlib.contextmanager
def record(capability: int = 90, module: ModuleType = triton_kernels) -> Iterator[list[Launch]]:
    """Within the block, launchers find a card of this compute capability (90 = sm_90), but the module's kernels
    are not run: their launches are collected in the list that is yielded."""
    kernels = {name: k for name, k in vars(module).items() if isinstance(k, triton.JITFunction)}
    launches: list[Launch] = []
    replaced = launch._interpreted, launch.capability
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(kernel, launches))
    launch._interpreted, launch.capability = lambda: False, lambda x: divmod(capability, 10)
    try:
        yield launches
    finally:
        launch._interpreted, launch.capability = replaced
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def compile_launch(entry: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """Compile for one compute capability (90 = sm_90); pointers are taken as 16-byte aligned, as torch allocates."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(entry.kernel.params):
        value = entry.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[(i,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=entry.options)


def _architecture(ptx: str) -> str:
    return re.search(r"\.target\s+(\w+)", ptx).group(1)


def _loop(sass: str) -> Counter[str]:
    """Opcodes between the target and the branch of the longest innermost backward branch."""
    lines = sass.splitlines()
    labels, loops = {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*\.?(L_x_\d+):", line):
            labels[label.group(1)] = i
        elif (branch := re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)) and branch.group(1) in labels:
            loops.append((labels[branch.group(1)], i))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    inner = [(a, b) for a, b in inner if b - a > 8]
    if not inner:
        return _opcodes(lines)
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return _opcodes(lines[start : end + 1])


def _opcodes(lines: list[str]) -> Counter[str]:
    found = (re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", line) for line in lines)
    return Counter(m.group(1) for m in found if m and not m.group(1).startswith("NOP"))


def inspect(compiled: triton.compiler.CompiledKernel) -> MachineCode:
    """Registers and spills by ptxas, instructions by nvdisasm; both ship with triton.

    Raises RuntimeError when no ptxas of this triton accepts the code.
    """
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source, binary, cubin = (os.path.join(folder, name) for name in ("k.ptx", "k.out", "k.cubin"))
        Path(source).write_text(ptx)
        Path(cubin).write_bytes(compiled.asm["cubin"])
        report = ""
        for name in ("ptxas-blackwell", "ptxas"):
            if not (_TOOLS / name).exists():
                continue
            command = [str(_TOOLS / name), "-v", "--gpu-name", _architecture(ptx), source, "-o", binary]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            report = done.stdout + done.stderr
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"ptxas: {report}")
        command = [str(_TOOLS / "nvdisasm"), "-c", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        return int(found.group(1)) if found else 0

    return MachineCode(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        compiled.metadata.shared,
        sass,
        _opcodes(sass.splitlines()),
        _loop(sass),
    )
