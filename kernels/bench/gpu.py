"""Measure the packed expert kernels on this machine's GPU; run through gpu.sh, which verifies them first.

Every time is the median of CUDA-graph replays. A graph holds several calls, each with its own routing and
alternating between two copies of the weights, so that together they read more than the L2 cache holds.
Each configuration is compared with its dequantized weights before it is timed; a difference ends the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import baselines
import torch
import transformers
import triton
from synthetic import (
    FORMATS,
    MEASURED,
    SHAPES,
    CodeFormat,
    ExpertShape,
    grouped_mm_forward,
    random_bank,
    random_routing,
)
from torch import Tensor

import kbvq_kernels
from kbvq_kernels import launch

TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
FEW = 16
"""Largest number of tokens at which the per-pair baselines are measured."""
RANK = 32
COPY_BYTES = 1 << 32
LOOKUP_BLOCKS, LOOKUP_REPEAT = 132 * 16, 256
PROMPT = 128
"""Tokens before those that are decoded."""


def replay_us(calls: list, repeats: int = 15) -> float:
    """Median microseconds of one call, over replays of a graph that holds all of `calls`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def environment() -> dict[str, str]:
    def line(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": f"{properties.total_memory / 2**30:.0f}",
        "multiprocessors": str(properties.multi_processor_count),
        "driver": line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": line("git", "rev-parse", "--short", "HEAD"),
        "dirty": str(line("git", "status", "--porcelain") not in ("", "unknown")),
    }


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a device-to-device copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * replay_us([lambda: target.copy_(source)]))


def lookups() -> list[dict]:
    """Random table lookups per second, by size of a codeword and of the table: through the L1 cache, and in copies of
    the table in shared memory."""
    rows = []
    blocks, block, repeat = LOOKUP_BLOCKS, 256, LOOKUP_REPEAT

    def measure_rate(call, **row) -> None:
        rows.append(row | {"lookups_per_second": blocks * block * repeat / (1e-6 * replay_us([call]))})

    out = torch.empty(blocks * block, dtype=torch.int64, device="cuda")
    for codeword_bytes, dtype, words in ((4, torch.int32, 1), (8, torch.int64, 1), (16, torch.int64, 2)):
        for entries in (256, 4096):
            table = torch.ones(entries * words, dtype=dtype, device="cuda")
            target = out.view(dtype)[: blocks * block]

            def call(table=table, target=target, entries=entries, words=words):
                baselines.lookup_kernel[(blocks,)](
                    table, target, ENTRIES=entries, WORDS=words, REPEAT=repeat, BLOCK=block, num_warps=4
                )

            measure_rate(call, codeword_bytes=codeword_bytes, entries=entries, copies=0)
    for vector_dim, copies in ((8, 8), (8, 4), (4, 16), (4, 8)):
        table = torch.ones(256 * vector_dim // 4, dtype=torch.int64, device="cuda")

        def call(table=table, vector_dim=vector_dim, copies=copies):
            baselines.shared_lookup_kernel[(blocks,)](
                table, out, D=vector_dim, COPIES=copies, REPEAT=repeat, BLOCK=block, num_warps=4
            )

        measure_rate(call, codeword_bytes=2 * vector_dim, entries=256, copies=copies)
    return rows


def packed_bytes_per_expert(bank) -> float:
    return (
        sum(
            sum(t.numel() * t.element_size() for t in (p.codes, p.scale, p.bias, p.coefficients) if t is not None)
            for p in bank
        )
        / bank[0].num_experts
    )


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < 2e-2:
        raise SystemExit(f"{what}: relative error {error:.3g} against dequantized weights; nothing is reported")


class Run:
    """Collects rows, leaves out what no longer fits the time, and writes what there is after every row."""

    def __init__(self, seconds: float, report: Report, part: str):
        self.end = time.monotonic() + seconds
        self.report = report
        self.rows: list[dict] = report.parts.setdefault(part, [])
        self.left_out: list[str] = report.parts["left_out"]

    def has(self, seconds: float, what: str) -> bool:
        if time.monotonic() + seconds < self.end:
            return True
        self.left_out.append(what)
        return False

    def add(self, **row) -> None:
        self.rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        self.report.write()


class Report:
    """What was measured; written again and again, so that a run that is cut off leaves what it has."""

    def __init__(self, folder: Path):
        self.environment = environment()
        self.parts: dict = {"left_out": []}
        self.complete = False
        name = f"{self.environment['device'].replace(' ', '-')}-{self.environment['commit']}"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / name

    def write(self) -> None:
        parts = self.parts
        report = {"environment": self.environment, "shapes": [asdict(shape) for shape in SHAPES]}
        report |= {"complete": self.complete} | parts
        text = [f"# {self.file.name}",
                "Verified before measuring: tests/kernels/test_gpu.py and each configuration below.",
                table([self.environment]), f"Copy: {parts.get('copy_gb_per_s', 0):.0f} GB/s (read + write).",
                "## Lookups", table(parts.get("lookups", [])),
                "## One layer's routed experts, microseconds", table(parts.get("expert_block", [])),
                "## Decoding Qwen3-30B-A3B, synthetic weights", table(parts.get("whole_model", [])),
                f"Left out for time: {', '.join(parts['left_out']) or 'nothing'}." if self.complete
                else "Cut off before the end."]  # fmt: skip
        for suffix, content in ((".json", json.dumps(report, indent=1)), (".md", "\n\n".join(text))):
            partial = self.file.with_name(self.file.name + suffix + ".partial")
            partial.write_text(content + "\n")
            partial.replace(self.file.with_name(self.file.name + suffix))


def measure(shape: ExpertShape, num_tokens: int, name: str, banks, dense, int4, paths: tuple[str, ...]) -> dict:
    """Microseconds of one layer's experts by implementation; int4 None: ours alone. paths: forced ones, as well."""
    count = 16 if num_tokens <= FEW else 2
    routings = [random_routing(shape, num_tokens, "cuda") for _ in range(count)]
    x = torch.randn(num_tokens, shape.hidden, device="cuda").bfloat16()
    expected = grouped_mm_forward(x, *routings[0], *dense)
    plain = [replace(p, bias=None) for p in banks[0]]

    def calls(forward, *weights):
        return [lambda i=i: forward(x, *routings[i], *weights) for i in range(count)]

    def ours(path: str | None):
        return [lambda i=i: launch.moe_forward(x, *routings[i], *banks[i % 2], "silu", path) for i in range(count)]

    us = {}
    for path in (None, *paths):
        check(launch.moe_forward(x, *routings[0], *plain, "silu", path), expected, f"{name} {path or 'packed'}")
        us["packed" if path is None else f"packed {path}"] = replay_us(ours(path))
    if int4 is not None:
        us["bf16 grouped_mm"] = replay_us(calls(grouped_mm_forward, *dense))
    if int4 is not None and num_tokens <= FEW:
        check(baselines.gemv_moe(x, *routings[0], *dense), expected, f"{name} bf16 GEMV")
        us["bf16 GEMV"] = replay_us(calls(baselines.gemv_moe, *dense))
        us["int4"] = replay_us(calls(baselines.int4_moe, *int4))
    hits = statistics.mean(index.unique().numel() for index, _ in routings)
    return {"us": us, "experts_hit": hits}


def expert_block(run: Run, shape: ExpertShape, code: CodeFormat, rank: int, bandwidth: float, tokens=TOKENS) -> None:
    """Ours, by the path chosen, against bfloat16 grouped_mm, bfloat16 GEMV and int4, for one layer's experts."""
    banks = [random_bank(shape, code, rank, device="cuda") for _ in range(2)]
    dense = [kbvq_kernels.dequantize(p, torch.bfloat16) for p in banks[0]]
    baseline = code is FORMATS[0] and rank == 0
    int4 = None
    if baseline:
        sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
        int4 = [baselines.random_int4(shape.num_experts, *size, "cuda") for size in sizes]
    for num_tokens in tokens:
        name = f"{shape.name} {code.name} rank {rank} T={num_tokens}"
        if not run.has(8, name):
            continue
        chosen = launch.select_path(
            num_tokens, shape.top_k, shape.num_experts, torch.bfloat16, torch.cuda.get_device_capability(),
            shape.num_experts * 2 * shape.intermediate * shape.hidden * 2,
            all(launch.decodes(p, torch.bfloat16) for p in banks[0]),
        )  # fmt: skip
        others = [path for path in ("pairs", "blocks", "grouped", "scratch") if path != chosen]
        if not (baseline and shape is SHAPES[0]) or torch.cuda.get_device_capability() < (9, 0):
            others = []
        elif num_tokens > 64:
            others = [path for path in others if path not in ("pairs", "blocks")]
        measured = measure(shape, num_tokens, name, banks, dense, int4, tuple(others))
        packed_bytes = measured["experts_hit"] * packed_bytes_per_expert(banks[0])
        seconds = 1e-6 * measured["us"]["packed"]
        run.add(
            model=shape.name,
            format=code.name,
            rank=rank,
            tokens=num_tokens,
            path=chosen,
            us=measured["us"],
            packed_gb_per_s=packed_bytes / seconds / 1e9,
            percent_of_copy=100 * packed_bytes / seconds / bandwidth,
            bf16_ideal_us=1e6 * measured["experts_hit"] * 2 * shape.weights_per_expert / bandwidth,
        )


class PackedModule(torch.nn.Module):
    """Stands where a layer's routed experts were."""

    def __init__(self, bank):
        super().__init__()
        self.bank = bank

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return kbvq_kernels.moe_forward(hidden_states, top_k_index, top_k_weights, *self.bank)


def synthetic_model(config, packed: CodeFormat | None, shape: ExpertShape, device: str):
    """The model with random weights of the usual scale; packed: its experts with random codes."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    banks = {}
    for i, layer in enumerate(model.model.layers):
        if packed is not None:
            layer.mlp.experts = torch.nn.Identity()
            banks[i] = random_bank(shape, packed, RANK, device=device)
    model = model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.02)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    for i, bank in banks.items():
        model.model.layers[i].mlp.experts = PackedModule(bank)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model.eval()


def decode_step(model, config, batch: int, length: int, device: str):
    """A call that decodes one token for each of `batch` sequences after `length` tokens, on a static cache."""
    cache = transformers.StaticCache(config=config, max_cache_len=length + 8)
    prompt = torch.randint(0, config.vocab_size, (batch, length), device=device)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.randint(0, config.vocab_size, (batch, 1), device=device)
    position = torch.full((batch, 1), length, device=device)
    # The causal mask of this step, given whole: transformers then builds none, which could synchronise.
    mask = torch.zeros(batch, 1, 1, length + 8, dtype=model.dtype, device=device)
    mask[..., length + 1 :] = torch.finfo(model.dtype).min
    where = torch.full((1,), length, device=device)

    def step() -> Tensor:
        # A graph replays the same position: the write index that the cache keeps must not run on.
        for cached in cache.layers:
            if hasattr(cached, "cumulative_length"):
                cached.cumulative_length = cached.cumulative_length * 0 + length
        out = model(
            token, past_key_values=cache, position_ids=position, cache_position=where,
            attention_mask=mask, use_cache=True,
        )  # fmt: skip
        return out.logits

    return step


def model_speed(run: Run, config, code: CodeFormat | None, name: str, shape: ExpertShape) -> None:
    """Decoding of one model, for batches of 1 and 16 after PROMPT tokens."""
    torch.cuda.reset_peak_memory_stats()
    model = synthetic_model(config, code, shape, "cuda")
    weights_gb = torch.cuda.memory_allocated() / 1e9
    for batch in (1, 16):
        row = {"weights": name, "batch": batch, "weights_gb": weights_gb, "graph": True}
        step = decode_step(model, config, batch, PROMPT, "cuda")
        try:
            row["ms"] = replay_us([step], repeats=20) / 1e3
        except RuntimeError as error:  # a step that cannot be captured: said, and timed without a graph
            torch.cuda.synchronize()
            row |= {"graph": False, "reason": str(error).splitlines()[0]}
            step()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                step()
            torch.cuda.synchronize()
            row["ms"] = 1e2 * (time.perf_counter() - start)
        row["tokens_per_second"] = 1e3 * batch / row["ms"]
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        run.add(**row)


def whole_model(run: Run, config, shape: ExpertShape) -> None:
    """Tokens per second of decoding, packed and bfloat16, with CUDA graphs; memory of weights in GB."""
    for code in (FORMATS[0], FORMATS[1], None):
        name = "bf16" if code is None else code.name
        if not run.has(45, f"whole model {name}"):
            continue
        try:
            model_speed(run, config, code, name, shape)
        except Exception as error:  # another transformers than those tried: said in the report, not hidden
            run.add(weights=name, reason=f"{type(error).__name__}: {error}")
        gc.collect()
        torch.cuda.empty_cache()


def qwen3_config():
    shape = SHAPES[0]
    return transformers.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=shape.num_experts, num_experts_per_tok=shape.top_k, norm_topk_prob=True, decoder_sparse_step=1,
        intermediate_size=6144, max_position_embeddings=40960,
    )  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown table of rows with equal keys."""

    def cell(value) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {v:.1f}" for k, v in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    if not rows:
        return "(none)"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500)
    options = parser.parse_args()
    torch.manual_seed(0)
    report = Report(options.results)
    print(report.environment, flush=True)
    bandwidth = copy_bandwidth()
    report.parts |= {"copy_gb_per_s": bandwidth / 1e9, "lookups": lookups()}
    print(f"copy {bandwidth / 1e9:.0f} GB/s", *report.parts["lookups"], sep="\n", flush=True)
    report.write()
    run = Run(options.seconds, report, "expert_block")
    for shape in SHAPES:
        expert_block(run, shape, FORMATS[0], 0, bandwidth)
        gc.collect()
        torch.cuda.empty_cache()
    # The model is the longest part: it goes before the other formats, of which some may be left out.
    whole_model(Run(options.seconds, report, "whole_model"), qwen3_config(), SHAPES[0])
    for code, rank in [(FORMATS[0], RANK), *((code, 0) for code in FORMATS[1:MEASURED])]:
        expert_block(run, SHAPES[0], code, rank, bandwidth, tokens=(1, 16, 512))
        gc.collect()
        torch.cuda.empty_cache()
    report.complete = True
    report.write()
    print(f"wrote {report.file}.json and .md")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
