"""The CPU decoder as it is compiled for other processors, executed here.

    python tests/kernels/other_processors.py --target=-march=x86-64
    apt-get install g++-aarch64-linux-gnu qemu-user
    python tests/kernels/other_processors.py --target=-march=armv8-a --compiler aarch64-linux-gnu-g++ \\
        --runner "qemu-aarch64 -L /usr/aarch64-linux-gnu"

Each code format is run on this machine with few and with many tokens, in float32 and in bfloat16; what is asked of the
compiled library is recorded, arguments and memory, and then asked of the library for the other processor, in a process
of its own (replay.cpp). Prints the largest error in the memory behind a call, relative to this machine's largest value,
for each function and format; exits with 1 where one is above 1e-5, float32 sums in another order. The decoder of this
machine is compared with the definition in test_ops.py.
"""

from __future__ import annotations

import argparse
import ctypes
import shlex
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests" / "kernels")]

from test_ops import FORMATS, moe_case  # noqa: E402

import kbvq_kernels  # noqa: E402
from kbvq_kernels import build, cpu  # noqa: E402

FUNCTIONS = (
    "kbvq_decode",
    "kbvq_products",
    "kbvq_trellis_decode",
    "kbvq_trellis_products",
    "kbvq_integer_products",
    "kbvq_integer_trellis_products",
)
TOKENS = (1, 3, 17)
TOLERANCE = 1e-5


class Address(ctypes.c_void_p):
    """A pointer that knows its tensor."""

    def __init__(self, tensor: Tensor | None) -> None:
        super().__init__(None if tensor is None else tensor.data_ptr())
        self.tensor = tensor


@dataclass(frozen=True)
class Call:
    """A call of the library: arguments, where pointers are tensors as they were before it, and these after it."""

    format: str
    function: str
    arguments: list[Tensor | int | float | None]
    after: list[Tensor | None]

    def record(self) -> bytes:
        """As replay.cpp reads it."""
        parts = [struct.pack("<qq", FUNCTIONS.index(self.function), len(self.arguments))]
        for argument in self.arguments:
            if argument is None:
                parts.append(struct.pack("<qq", 0, 0))
            elif isinstance(argument, Tensor):
                content = contents(argument)
                parts += [struct.pack("<qq", 1, len(content)), content]
            elif isinstance(argument, float):
                parts.append(struct.pack("<qd", 3, argument))
            else:
                parts.append(struct.pack("<qq", 2, argument))
        return b"".join(parts)


def contents(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def recorded() -> list[Call]:
    """All calls of every format."""
    calls: list[Call] = []
    library, running = cpu.library(), ""

    class Recording:
        def __getattr__(self, function: str) -> Callable[..., int]:
            def call(*arguments: Address | ctypes.c_long | ctypes.c_float) -> int:
                tensors = [getattr(argument, "tensor", None) for argument in arguments]
                before = [
                    (None if t is None else t.clone()) if isinstance(a, Address) else a.value
                    for a, t in zip(arguments, tensors, strict=True)
                ]
                result = getattr(library, function)(*arguments)
                calls.append(Call(running, function, before, [None if t is None else t.clone() for t in tensors]))
                return result

            return call

    with patch.object(cpu, "library", Recording), patch.object(cpu, "_address", Address):
        for running, options in FORMATS.items():  # noqa: B007  # calls are recorded under this name
            for num_tokens in TOKENS:
                for dtype in (torch.float32, torch.bfloat16):
                    arguments, _ = moe_case(options, num_tokens, dtype=dtype)
                    kbvq_kernels.moe_forward(*arguments)
    return calls


def replayed(calls: list[Call], target: str, compiler: str, runner: list[str]) -> list[list[Tensor | None]]:
    """The tensors after each call, by the library that is compiled for `target`."""
    with tempfile.TemporaryDirectory() as folder:
        program, trace, results = (Path(folder) / name for name in ("replay", "trace", "results"))
        flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
        sources = [Path(__file__).with_name("replay.cpp")]
        sources += [build.SOURCES / file for file in build.LIBRARIES["cpu_decode"]]
        subprocess.run([compiler, *target.split(), *flags, *map(str, sources), "-o", str(program)], check=True)
        trace.write_bytes(b"".join(call.record() for call in calls))
        subprocess.run([*runner, str(program), str(trace), str(results)], check=True)
        content, at, found = results.read_bytes(), 0, []
        for call in calls:
            tensors: list[Tensor | None] = []
            for before in call.arguments:
                if not isinstance(before, Tensor):
                    tensors.append(None)
                    continue
                size = before.numel() * before.element_size()
                values = torch.frombuffer(bytearray(content[at : at + size]), dtype=torch.uint8)
                tensors.append(values.view(before.dtype).view(before.shape))
                at += size
            found.append(tensors)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; infinite where one of both is not finite."""
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return difference.nan_to_num(nan=float("inf")).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="flags of the compiler, e.g. -march=armv8-a (build.TARGETS)")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--runner", default="", help="what executes its programs here, if they are foreign")
    options = parser.parse_args()
    calls = recorded()
    print(f"{options.compiler} {options.target}; this machine: {build.target()}\n")
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    tensors = replayed(calls, options.target, options.compiler, shlex.split(options.runner))
    for call, others in zip(calls, tensors, strict=True):
        pairs = zip(others, call.after, strict=True)  # inputs too: nothing may be written where nothing was
        worst = max(relative_error(other, after) for other, after in pairs if after is not None)
        errors[call.function, call.format].append(worst)
    print("| function | format | calls | largest error |\n|---|---|---|---|")
    for (function, format), found in sorted(errors.items()):
        print(f"| {function} | {format} | {len(found)} | {max(found):.1e} |")
    missing = set(FUNCTIONS) - {function for function, _ in errors}
    if missing:
        raise SystemExit(f"never called: {', '.join(sorted(missing))}")
    if max(map(max, errors.values())) > TOLERANCE:
        raise SystemExit(f"an error is above {TOLERANCE}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
