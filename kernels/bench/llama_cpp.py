"""CPU: one layer's experts packed by kbvq, quantized by llama.cpp, and in bfloat16, side by side in one process.

    cmake -S vendor/llama.cpp/ggml -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build
    python kernels/bench/llama_cpp.py --ggml vendor/llama.cpp/ggml --build build --threads 2

(Its source is in the sdist of llama-cpp-python.) llama.cpp runs gate, up and down by `ggml_mul_mat_id` and SwiGLU
on its own quantized types; bfloat16 is `F.grouped_mm` with transformers' sorting. All take the same routing; the calls
are taken in turn. Prints for each the least milliseconds of many calls (of one thread those that the processor worked
for it, so that other work on the machine counts for little), bits a weight with all that is stored, the speed at which
the weights of the experts that were hit went by in GB/s, and its share of a copy's bandwidth in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from cpu import milliseconds
from synthetic import SHAPES, CodeFormat, ExpertShape, grouped_mm_forward, random_bank, random_routing
from torch import Tensor

import kbvq_kernels
from kbvq_kernels import PreparedProjection, build

OURS = (
    CodeFormat("kbvq 2b signed d8", "vq", 8, 256, signed=True, codebook_dtype="int8"),
    CodeFormat("kbvq 2b trellis", "trellis", 1, 4),
    CodeFormat("kbvq 3b signed d4", "vq", 4, 256, signed=True, codebook_dtype="int8"),
    CodeFormat("kbvq 3b trellis", "trellis", 1, 8),
)
THEIRS = ("iq2_xs", "q2_K", "iq3_xxs")
DISTINCT = 4
"""Experts of random contents; the others repeat them in other memory."""


def copy_bandwidth() -> float:
    """GB/s read and written by a copy of 256 MiB, the best of five."""
    source = torch.zeros(1 << 28, dtype=torch.uint8)
    target, best = torch.zeros_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9


def compile_driver(ggml: Path, build: Path, folder: Path) -> ctypes.CDLL:
    libraries = sorted({file.parent for file in build.rglob("libggml*.so")})
    links = [part for where in libraries for part in (f"-L{where}", f"-Wl,-rpath,{where}")]
    source, out = Path(__file__).with_name("llama_cpp.cpp"), folder / "driver.so"
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", f"-I{ggml}/include", str(source), *links]
    subprocess.run([*command, "-lggml-cpu", "-lggml-base", "-o", str(out)], check=True)
    driver = ctypes.CDLL(str(out))
    driver.bits.restype = ctypes.c_double
    driver.make_experts.restype = driver.make_layer.restype = ctypes.c_void_p
    return driver


def packed_experts(shape: ExpertShape, code: CodeFormat) -> tuple[list[PreparedProjection], float]:
    """(gate_up and down of all experts, bits a weight)."""
    few = dataclasses.replace(shape, num_experts=DISTINCT)
    bank, num_bytes = [], 0
    for p in random_bank(few, code):
        times = shape.num_experts // DISTINCT
        repeated = {
            name: getattr(p, name).repeat(times, *[1] * (getattr(p, name).dim() - 1)) for name in ("codes", "scale")
        }
        bank.append(dataclasses.replace(p, bias=None, **repeated))
        num_bytes += sum(t.nbytes for t in repeated.values())
    return bank, 8 * num_bytes / (shape.num_experts * shape.weights_per_expert)


def bfloat16_experts(shape: ExpertShape) -> list[Tensor]:
    sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    few = (torch.randn(1, *size).mul_(size[1] ** -0.5).bfloat16() for size in sizes)
    return [weights.repeat(shape.num_experts, 1, 1) for weights in few]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ggml", type=Path, required=True, help="ggml's source folder")
    parser.add_argument("--build", type=Path, required=True, help="where it was built")
    parser.add_argument("--models", nargs="+", default=["Qwen3-30B-A3B", "Mixtral-8x7B"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--experts", type=int, default=128, help="at most so many a layer, to bound memory")
    parser.add_argument("--only", nargs="+", default=[], help="names that are measured, of kbvq's, llama.cpp's or bf16")
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    print(f"{processor}, torch {torch.__version__}, decoder for {build.target()}")
    print("| model | threads | T | weights | bits | ms | GB/s | of a copy |\n|---|---|---|---|---|---|---|---|")
    wanted = set(options.only or (*(code.name for code in OURS), *THEIRS, "bf16"))
    with tempfile.TemporaryDirectory() as folder:
        driver = compile_driver(options.ggml, options.build, Path(folder))
        for shape in SHAPES:
            if shape.name in options.models:
                shape = dataclasses.replace(shape, num_experts=min(shape.num_experts, options.experts))
                measure(shape, driver, options, wanted)


def measure(shape: ExpertShape, driver: ctypes.CDLL, options: argparse.Namespace, wanted: set[str]) -> None:
    ours = {code.name: packed_experts(shape, code) for code in OURS if code.name in wanted}
    sizes = shape.num_experts, shape.hidden, shape.intermediate
    theirs = {
        name: ctypes.c_void_p(driver.make_experts(name.encode(), *map(ctypes.c_long, sizes)))
        for name in THEIRS
        if name in wanted
    }
    dense = bfloat16_experts(shape) if "bf16" in wanted else None
    for threads in options.threads:
        torch.set_num_threads(threads)
        bandwidth, clock = copy_bandwidth(), time.thread_time if threads == 1 else time.perf_counter
        for tokens in options.tokens:
            x = torch.randn(tokens, shape.hidden)
            index, weights = random_routing(shape, tokens)
            ids = index.int().contiguous()
            calls, bits, layers = {}, {}, []
            for name, (bank, stored) in ours.items():
                calls[name] = lambda bank=bank: kbvq_kernels.moe_forward(x.bfloat16(), index, weights, *bank)  # noqa: B023
                bits[name] = stored
            for name, experts in theirs.items():
                numbers = (ctypes.c_long(n) for n in (tokens, shape.top_k, threads))
                pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, ids))
                layers.append(ctypes.c_void_p(driver.make_layer(experts, *pointers, *numbers)))
                calls[name] = lambda layer=layers[-1]: driver.run_layer(layer)
                bits[name] = driver.bits(name.encode())
            if dense is not None:
                calls["bf16"] = lambda: grouped_mm_forward(x.bfloat16(), index, weights, *dense)  # noqa: B023
                bits["bf16"] = 16.0
            for call in calls.values():
                call()
            hit = index.unique().numel() * shape.weights_per_expert
            times = milliseconds(tuple(calls.values()), options.repeats, min, clock)
            for name, spent in zip(calls, times, strict=True):
                speed = hit * bits[name] / 8 / spent / 1e6
                row = shape.name, threads, tokens, name, f"{bits[name]:.2f}", f"{spent:.2f}", f"{speed:.2f}"
                print("| " + " | ".join(map(str, row)) + f" | {100 * speed / bandwidth:.0f} % |", flush=True)
            for layer in layers:
                driver.free_layer(layer)
    for experts in theirs.values():
        driver.free_experts(experts)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
