"""Compiles the kernels ahead of time, with no GPU, exactly as `launch.py` would launch them, and counts their code.

`record` runs a launcher on meta tensors and keeps the launches; `compile_launch` compiles one for a compute
capability; `inspect` reads registers, spills and instructions from the machine code. Run:

    python -m kbvq_kernels.aot [--capability 90 ...] [--format "signed d8 int8" ...] [--jobs 2]

to compile every kernel for every format of `FORMATS` and get a table of it; it exits with 1 when a register spills.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kbvq_kernels import decode_kernels, launch, routing_kernels, tile_kernels
from kbvq_kernels.prepared import PreparedProjection, prepare

TARGETS = (80, 89, 90, 100)
"""Compute capabilities of the cards that users have: A100, RTX 4090 / L40, H100 / H200, B200."""

KERNEL_MODULES = (decode_kernels, routing_kernels, tile_kernels)

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

_GROUPED: dict[str, object] = {"codebook": "rq-grouped", "codebook_size": 256, "num_groups": 8}

CODES: dict[str, dict[str, object]] = {
    "signed d8": {"codebook": "vq", "vector_dim": 8, "codebook_size": 256, "signed": True},
    "signed d4": {"codebook": "vq", "vector_dim": 4, "codebook_size": 256, "signed": True},
    "vq d8": {"codebook": "vq", "vector_dim": 8, "codebook_size": 256},
    "vq d4": {"codebook": "vq", "vector_dim": 4, "codebook_size": 256},
    "vq d4 4096": {"codebook": "vq", "vector_dim": 4, "codebook_size": 4096},
    "vq d2": {"codebook": "vq", "vector_dim": 2, "codebook_size": 256},
    "rq2 d8": {"codebook": "rq", "vector_dim": 8, "codebook_size": 256, "num_stages": 2},
    "rq3 d8": {"codebook": "rq", "vector_dim": 8, "codebook_size": 256, "num_stages": 3},
    "rq2 d4": {"codebook": "rq", "vector_dim": 4, "codebook_size": 256, "num_stages": 2},
    "rq-grouped2 d8": _GROUPED | {"vector_dim": 8, "num_stages": 2},
    "rq-grouped3 d8": _GROUPED | {"vector_dim": 8, "num_stages": 3},
    "rq-grouped2 d4": _GROUPED | {"vector_dim": 4, "num_stages": 2},
    "trellis 1 bit": {"codebook": "trellis", "vector_dim": 1, "codebook_size": 2},
    "trellis 2 bits": {"codebook": "trellis", "vector_dim": 1, "codebook_size": 4},
    "trellis 3 bits": {"codebook": "trellis", "vector_dim": 1, "codebook_size": 8},
    "trellis 4 bits": {"codebook": "trellis", "vector_dim": 1, "codebook_size": 16},
}
"""Every code that a recipe of kbvq can write. One stage of rq or rq-grouped is to the kernels what vq is."""

_LOW_RANK = {"rank": 32}
_PUBLISHED = _LOW_RANK | {"per_expert": True}
DEFAULTS = ("signed d8 int8", "signed d4 int8")
"""What the default recipe writes at 2 and 3 bits."""

FORMATS: dict[str, dict[str, object]] = (
    {
        name + suffix: code | options
        for name, code in CODES.items()
        for suffix, options in (
            {"": {}, " low-rank": _LOW_RANK}
            if code["codebook"] == "trellis"
            else {" int8": {"codebook_dtype": "int8"}, " float16 per-expert low-rank": _PUBLISHED}
        ).items()
    }
    | {
        f"{name} low-rank": CODES[name[:9]] | _LOW_RANK | {"codebook_dtype": "int8", "factor_dtype": "int8"}
        for name in DEFAULTS
    }
    | {f"rq-moe d{dim}, expanded": _GROUPED | {"vector_dim": dim, "num_stages": 2, "num_groups": 256} for dim in (8, 4)}
)
"""Each code with the options of the recipe default (a bank shares an int8 codebook, no low-rank part) and with those of
the recipe paper (a float16 codebook for each expert, a low-rank part); the defaults also with int8 factors; of rq-moe
what its network expands to at load. All have row scales and biases: the kernels leave out what a format lacks."""

_PATHS = {"pairs": (2, 1), "blocks": (64, 0), "grouped": (512, 0), "scratch": (512, 1)}
"""Path -> tokens, and whether its launch for gate_up (0) or down (1) is compiled: gate and up fused or not, pairs
aligned or not, each is compiled with decode_kernel."""


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
    instructions when it has no loop. spilled: bytes of stack a thread, which Triton's code has for spills alone.
    shared_memory: bytes that Triton asks for at the launch; tables: bytes of the copies of the tables, besides.
    """

    registers: int
    spilled: int
    shared_memory: int
    tables: int
    sass: str
    instructions: Counter[str]
    loop: Counter[str]


class _Recorder:
    def __init__(self, kernel: triton.JITFunction, take: Callable[[Launch], None]):
        self.kernel, self.take, self.grid = kernel, take, ()

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        self.grid = grid
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        self.take(Launch(self.kernel, self.grid, arguments, options))


@contextlib.contextmanager
def record(capability: int = 90, modules: Sequence[ModuleType] = KERNEL_MODULES) -> Iterator[list[Launch]]:
    """Within the block, launchers find a card of this compute capability (90 = sm_90), but the modules' kernels
    are not run: their launches are collected in the list that is yielded."""
    launches: list[Launch] = []
    with intercept(launches.append, capability, modules):
        yield launches


@contextlib.contextmanager
def intercept(
    take: Callable[[Launch], None], capability: int = 90, modules: Sequence[ModuleType] = KERNEL_MODULES
) -> Iterator[None]:
    """As `record`; each launch goes to `take` when it happens."""
    kernels = [(module, name, k) for module in modules for name, k in kernels_of(module).items()]
    replaced = launch.capability
    for module, name, kernel in kernels:
        setattr(module, name, _Recorder(kernel, take))
    launch.capability = lambda x: divmod(capability, 10)
    try:
        yield
    finally:
        launch.capability = replaced
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def kernels_of(module: ModuleType) -> dict[str, triton.JITFunction]:
    """What the module launches, by name; the other functions for the GPU are parts of these."""
    jitted = {name: k for name, k in vars(module).items() if isinstance(k, triton.JITFunction)}
    return {name: kernel for name, kernel in jitted.items() if name.endswith("_kernel")}


def compile_launch(entry: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """Compile for one compute capability (90 = sm_90), specialised as Triton does at run time: for ones, multiples of
    16 and pointers to multiples of 16 bytes, as torch allocates them and those of meta tensors are taken to be."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(entry.kernel.params):
        value = entry.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if value.is_meta or value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=entry.options)


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
    """Registers and stack by cuobjdump, instructions by nvdisasm, both of which ship with triton."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([str(_TOOLS / tool), option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local, tables = (
        int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL", "SHARED")
    )
    opcodes = _opcodes(sass.splitlines())
    return MachineCode(registers, stack + local, compiled.metadata.shared, tables, sass, opcodes, _loop(sass))


def meta_projection(
    num_experts: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    *,
    codebook: str,
    vector_dim: int,
    codebook_size: int,
    num_stages: int = 1,
    num_groups: int = 1,
    signed: bool = False,
    codebook_dtype: str = "float16",
    per_expert: bool = False,
    rank: int = 0,
    factor_dtype: str = "float16",
) -> PreparedProjection:
    """A projection with row scales and biases, prepared for CUDA, of which only shapes and dtypes exist."""

    def empty(*shape: int, of: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    tensors = {"scale": empty(num_experts, out_features), "bias": empty(num_experts, out_features)}
    if codebook == "trellis":
        row_bytes = out_features * (codebook_size.bit_length() - 1) // 8
        tensors["codes"] = empty(num_experts, in_features, row_bytes, of=torch.uint8)
    else:
        vectors, books = in_features // vector_dim, num_experts if per_expert else 1
        tables = 1 + (num_stages - 1) * num_groups
        row_bytes = num_stages * (vectors + (-(-vectors // 2) if codebook_size > 256 else 0))
        row_bytes += in_features // 8 if signed else 0
        tensors["codes"] = empty(num_experts, out_features, row_bytes, of=torch.uint8)
        tensors["codebook"] = empty(books, tables, codebook_size, vector_dim, of=getattr(torch, codebook_dtype))
        if codebook_dtype == "int8":
            tensors["codebook_scale"] = empty(books, tables)
        if num_groups > 1:
            tensors["groups"] = empty(books, codebook_size, of=torch.uint8)
    if rank:
        factor = getattr(torch, factor_dtype)
        tensors["basis"] = empty(rank, in_features, of=factor)
        tensors["coefficients"] = empty(num_experts, out_features, rank, of=factor)
        if factor_dtype == "int8":
            tensors["basis_scale"], tensors["coefficients_scale"] = empty(rank), empty(num_experts, rank)
    return prepare(
        tensors,
        in_features=in_features,
        codebook=codebook,
        vector_dim=vector_dim,
        codebook_size=codebook_size,
        num_stages=num_stages,
        num_groups=num_groups,
        signed=signed,
        codebook_dtype=codebook_dtype,
        rank=rank,
        factor_dtype=factor_dtype,
        dtype=dtype,
    )


def launches(
    path: str,
    num_tokens: int,
    options: dict[str, object],
    *,
    capability: int = 90,
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = 4096,
    intermediate: int = 14336,
) -> list[Launch]:
    """What one call of the path launches for a bank of 16 experts, top 4; options: of `meta_projection`.

    The widths are Mixtral's by default: long rows get the largest tiles.
    """
    experts, top_k = 16, 4
    gate_up = meta_projection(experts, 2 * intermediate, hidden, dtype, **options)
    down = meta_projection(experts, hidden, intermediate, dtype, **options)
    x = torch.empty(num_tokens, hidden, dtype=dtype, device="meta")
    index = torch.empty(num_tokens, top_k, dtype=torch.int64, device="meta")
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device="meta")
    with record(capability) as recorded:
        launch.moe_forward(x, index, weights, gate_up, down, "silu", path)
    return recorded


@dataclass(frozen=True)
class Case:
    """A format of FORMATS, one of its paths, and the compute capability to compile for."""

    format: str
    path: str
    capability: int

    def launch(self) -> Launch:
        """The launch of this path that reads codes (see _PATHS)."""
        tokens, which = _PATHS[self.path]
        recorded = launches(self.path, tokens, FORMATS[self.format], capability=self.capability)
        return [entry for entry in recorded if "words_ptr" in entry.arguments][which]


def compile_case(case: Case) -> MachineCode:
    """Machine code of the case's launch."""
    return inspect(compile_launch(case.launch(), case.capability))


def weights_per_pass(entry: Launch) -> float:
    """Weights that a warp decodes in one pass of the inner loop."""
    a = entry.arguments
    if "LENGTH" in a:
        return a["BLOCK_N"] * a["LENGTH"] * 16 * a["D"]
    if "ROW_WARPS" in a:
        return 2 * a["BLOCK_N"] * 16  # unrolled once
    return a["BLOCK_N"] * a["BLOCK_V"] * a["D"] / entry.options["num_warps"]


def _row(case: Case) -> tuple[str, int]:
    """(row of the table, bytes spilled)."""
    entry, code = case.launch(), compile_case(case)
    name = entry.kernel.fn.__name__
    each = 32 * sum(code.loop.values()) / weights_per_pass(entry)
    kernel = f"{name}, {case.path}" if case.path in ("pairs", "blocks") else name
    row = f"| {case.format} | {kernel} | sm_{case.capability} | {code.registers} | {code.spilled} | {each:.2f} |"
    return row, code.spilled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for every format and print a table.")
    parser.add_argument("--capability", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at once")
    chosen = parser.parse_args(arguments)
    print(f"Triton {triton.__version__}, bfloat16 hidden states, 16 experts of Mixtral's widths, top 4\n")
    print("| format | kernel | target | registers | bytes spilled | instructions/weight |\n|---|---|---|---|---|---|")
    cases = [Case(name, path, target) for name in chosen.format for path in _PATHS for target in chosen.capability]
    spilled = 0
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        for row, spill in pool.map(_row, cases):
            print(row, flush=True)
            spilled += spill > 0
    print(f"\n{len(cases)} compiled, {spilled} with spills")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
