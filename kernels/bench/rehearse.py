"""Stands in for Python and the card in gpu.sh, on a machine without one: proves that the script runs, not the kernels.

    PYTHON=kernels/bench/rehearse.sh bash kernels/bench/gpu.sh /tmp/rehearsal

Tensors of device "cuda" are made on the CPU. tests/kernels/test_gpu.py runs in the PTX emulator, or a part of it, as
PYTEST_ADDOPTS asks. In gpu.py, with small shapes, every launch is checked for its arguments and grid, and the result is
computed from the packed tensors instead; graphs record and time nothing. KBVQ_REHEARSAL=damaged falsifies the results,
KBVQ_REHEARSAL=N stops after N rows, as a machine that is taken away.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in (".", "kernels", "eval", "kernels/bench", "tests/kernels")]

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from kbvq_kernels import aot, cpu, launch, prepared, reference  # noqa: E402

MODE = os.environ.get("KBVQ_REHEARSAL", "")
CAPABILITY = 90


class OnCpu(TorchFunctionMode):
    """Whatever asks for device cuda gets the CPU."""

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if str(keywords.get("device", "")).startswith("cuda"):
            keywords["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return arguments[0]
        if function is torch.Tensor.to and len(arguments) > 1 and str(arguments[1]).startswith("cuda"):
            arguments = (arguments[0], "cpu", *arguments[2:])
        return function(*arguments, **keywords)


class Nothing:
    """A stream, an event or a graph: takes everything, and every time is a millisecond."""

    def __init__(self, *_, **__):
        pass

    def elapsed_time(self, other):
        return 1.0

    def __getattr__(self, name):
        return lambda *_, **__: None


def install_cuda() -> None:
    """torch.cuda, as far as test_gpu.py and gpu.py use it."""
    properties = types.SimpleNamespace(name="rehearsal", total_memory=1 << 37, multi_processor_count=132)
    context = contextlib.nullcontext
    for name, value in {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: divmod(CAPABILITY, 10),
        "get_device_properties": lambda *_: properties,
        "Stream": Nothing,
        "Event": Nothing,
        "CUDAGraph": Nothing,
        "stream": context,
        "graph": context,
        "current_stream": Nothing,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "set_sync_debug_mode": lambda *_: None,
    }.items():
        setattr(torch.cuda, name, value)
    OnCpu().__enter__()


PACKED: dict[int, tuple[dict, dict]] = {}
"""Address of prepared codes -> what was prepared."""


def install_prepare() -> None:
    """Projections are prepared for CUDA, wherever their tensors are."""
    original = prepared.prepare

    def prepare(tensors, **fields):
        p = original(tensors, **fields | {"device_type": "cuda"})
        PACKED[p.codes.data_ptr()] = dict(tensors), {k: v for k, v in fields.items() if k != "dtype"}
        return p

    import kbvq_kernels

    prepared.prepare = kbvq_kernels.prepare = prepare


def dense(p, dtype=torch.float64) -> torch.Tensor:
    tensors, fields = PACKED[p.codes.data_ptr()]
    return reference.dequantize(tensors, **fields).to(dtype)


def check_launch(entry: aot.Launch) -> None:
    """The arguments are those of the kernel, and every tensor is contiguous."""
    names = {p.name for p in entry.kernel.params}
    if entry.arguments.keys() != names:
        raise SystemExit(f"{entry.kernel.fn.__name__}: arguments {entry.arguments.keys() ^ names} are wrong")
    if not all(size > 0 for size in entry.grid):
        raise SystemExit(f"{entry.kernel.fn.__name__}: grid {entry.grid}")
    if entry.kernel.fn.__name__ == "align_kernel":  # torch indexes with what it gives
        for name in ("sorted_ptr", "block_experts_ptr", "ends_ptr", "slots_ptr"):
            entry.arguments[name].zero_()
    for value in entry.arguments.values():
        if isinstance(value, torch.Tensor) and (value.dtype not in aot._TYPES or not value.is_contiguous()):
            raise SystemExit(f"{entry.kernel.fn.__name__}: a tensor of {value.dtype}, strides {value.stride()}")


def measure(arguments: list[str]) -> None:
    """gpu.py on small shapes."""
    import baselines
    import synthetic

    sizes = (("Qwen3-30B-A3B", 48, 8, 2), ("Qwen1.5-MoE-A2.7B", 24, 6, 2), ("Mixtral-8x7B", 32, 4, 2))
    synthetic.SHAPES = tuple(synthetic.ExpertShape(*size, 128, 128) for size in sizes)
    synthetic.prepare = prepared.prepare
    original = launch.moe_forward

    def moe_forward(x, index, weights, gate_up, down, activation="silu", path=None):
        original(x, index, weights, gate_up, down, activation, path)
        banks = dense(gate_up), dense(down)
        y = reference.moe_forward(x.double(), index, weights, *banks, gate_up.bias, down.bias, activation)
        return (y + (MODE == "damaged")).to(x.dtype)

    def gemv_moe(x, index, weights, gate_up, down, forward=baselines.gemv_moe):
        forward(x, index, weights, gate_up, down)
        return synthetic.grouped_mm_forward(x, index, weights, gate_up, down)

    launch.moe_forward, baselines.gemv_moe = moe_forward, gemv_moe
    cpu.moe_forward, cpu.dequantize = moe_forward, lambda p, dtype: dense(p, dtype)
    import gpu

    gpu.COPY_BYTES, gpu.LOOKUP_BLOCKS, gpu.PROMPT = 1 << 16, 4, 8
    config = gpu.transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=1, intermediate_size=64, max_position_embeddings=256,
    )  # fmt: skip
    gpu.qwen3_config()  # as it is on the card
    gpu.qwen3_config = lambda: config
    if MODE.isdigit():
        add = gpu.Run.add

        def add_and_stop(self, **row):
            add(self, **row)
            if sum(len(self.report.parts.get(name, [])) for name in ("expert_block", "whole_model")) >= int(MODE):
                os._exit(137)

        gpu.Run.add = add_and_stop
    sys.argv = ["gpu.py", *arguments]
    with aot.intercept(check_launch, CAPABILITY, [*aot.KERNEL_MODULES, baselines]), torch.inference_mode():
        gpu.main()


def verify(arguments: list[str]) -> None:
    """pytest, with the kernels in the emulator."""
    from ptx_emulator.launches import Emulator

    emulator = Emulator(CAPABILITY)
    original = launch.moe_forward

    def moe_forward(*given):
        y = original(*given)
        y = y + 1 if MODE == "damaged" else y
        emulator.made.clear()
        return y

    def dequantize(p, dtype):
        out = torch.empty(p.num_experts, p.out_features, p.in_features, dtype=dtype)
        launch.dequantize(p, out)
        emulator.made.clear()
        return out

    launch.moe_forward = cpu.moe_forward = moe_forward
    cpu.dequantize = dequantize
    sys.argv = ["pytest", *arguments]
    with emulator.installed():
        import pytest

        code = pytest.main(arguments)
    for line in emulator.faults.lines():
        print(line)
    sys.exit(code)


def main() -> None:
    install_cuda()
    install_prepare()
    arguments = sys.argv[1:]
    if arguments[:2] == ["-m", "pytest"]:
        verify(arguments[2:])
    elif arguments[0].endswith("gpu.py"):
        measure(arguments[1:])
    else:
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
