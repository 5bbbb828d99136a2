"""What runs on well-known models need, planned from their configs: `python eval/plan_table.py`.

    python eval/plan_table.py --sizes --bits 2

The configs are those of the published models, written down here; the shards are headers of the tensors they have, in
bfloat16, without their content. Writes docs/results/plans.md; with --sizes what the packed checkpoints take at each
--dense-bits, into docs/results/sizes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kbvq.errors import KbvqError
from kbvq.models.layer_stream import LayerStream
from kbvq.models.model_headers import write_header
from kbvq.quantization.pipeline import dense_parts
from kbvq.quantization.planning import check_budget, uniform_plan
from kbvq.quantization.progress import format_seconds
from kbvq.quantization.run_plan import RunPlan, machine_speed, make_plan
from kbvq.recipes import DENSE_BITS, RECIPE_NAMES, make_recipe

ROOT = Path(__file__).resolve().parent.parent

_QWEN3 = {"model_type": "qwen3_moe", "vocab_size": 151936, "head_dim": 128, "num_experts": 128,
          "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
          "num_key_value_heads": 4}  # fmt: skip
_DEEPSEEK = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
             "max_position_embeddings": 163840}  # fmt: skip

CONFIGS: dict[str, dict[str, object]] = {
    "Mixtral-8x7B": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    },
    "Mixtral-8x22B": {
        "model_type": "mixtral", "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384,
        "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 65536,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "max_position_embeddings": 8192,
    },
    "Qwen3-30B-A3B": _QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
    "Qwen3-235B-A22B": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "max_position_embeddings": 4096,
    },
    "DeepSeek-V2-Lite": _DEEPSEEK | {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    },
    "DeepSeek-V3": _DEEPSEEK | {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "q_lora_rank": 1536, "n_group": 8, "topk_group": 4,
    },
}  # fmt: skip
"""Fields of config.json that shapes follow from, by the model's name; DeepSeek-V3 is published in float8, which must be
converted to bfloat16 first."""


GOALS = {"Qwen1.5-MoE-A2.7B": 4.6, "Qwen3-30B-A3B": 9.0, "Mixtral-8x7B": 13.2}
"""GB that the packed checkpoints are to take at most with experts at 2 bits."""


def write_model(folder: Path, fields: dict[str, object]) -> PreTrainedConfig:
    """A model folder as on the hub, one file per layer, each a header and a hole as large as its tensors."""
    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weight_map: dict[str, str] = {}
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        shard = f"model-{int(parts[2]) + 1 if parts[1] == 'layers' else 0:05d}.safetensors"
        for stored, shape in hub_tensors(name, tuple(tensor.shape), config.model_type):
            shards.setdefault(shard, {})[stored] = shape
            weight_map[stored] = shard
    for shard, tensors in shards.items():
        write_header(folder / shard, {name: ("BF16", shape) for name, shape in tensors.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return config


def hub_tensors(name: str, shape: tuple[int, ...], model_type: str) -> list[tuple[str, tuple[int, ...]]]:
    """How a checkpoint of the hub stores a tensor of the model in memory: experts one by one."""
    block, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if model_type == "mixtral":
        name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        block, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    layer, found, projection = name.partition(".mlp.experts.")
    if not found:
        return [(name, shape)]
    experts, rows, columns = shape
    parts = [(down, rows)] if projection == "down_proj" else [(gate, rows // 2), (up, rows // 2)]
    return [
        (f"{layer}.{block}.experts.{expert}.{part}.weight", (height, columns))
        for expert in range(experts)
        for part, height in parts
    ]


def plan_model(
    fields: dict[str, object], recipe: str, bits: float, dense_bits: Sequence[int] = (16,), **options: Any
) -> list[tuple[RunPlan, float]]:
    """The plan for each of `dense_bits`, and the seconds that it took. options: of make_plan."""
    plans = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, fields)
        for outside in dense_bits:
            started = time.perf_counter()
            stream = LayerStream(folder, dtype=torch.float32, device="cpu")
            chosen = make_recipe(recipe, bits, dense_bits=outside)
            choose = check_budget if chosen.budget else uniform_plan
            formats, parts = choose(stream.banks, chosen), dense_parts(stream, chosen)
            plan = make_plan(stream, formats, chosen, samples=128, sequence_length=2048, parts=parts, **options)
            plans.append((plan, time.perf_counter() - started))
    return plans


def write_sizes(models: Sequence[str], bits: float, output: Path) -> None:
    """The table of sizes. "goal": what a packed checkpoint of well-known models is to take at most."""
    columns = ["model", "weights, 10⁹", "outside the experts", "original, GB"]
    columns += [f"{dense} bits outside, GB" for dense in DENSE_BITS] + ["bits of the whole model", "goal, GB"]
    lines = ["# Sizes", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for model in models:
        plans = [plan for plan, _ in plan_model(CONFIGS[model], "fast", bits, DENSE_BITS)]
        goal = f"{GOALS[model]:.1f}" if model in GOALS else ""
        sizes = " | ".join(f"{plan.output_bytes / 1e9:.2f}" for plan in plans)
        whole = " / ".join(f"{plan.model_bits:.2f}" for plan in plans)
        first = plans[0]
        outside = (first.model_weights - first.num_weights) / 1e9
        lines.append(
            f"| {model} | {first.model_weights / 1e9:.2f} | {outside:.2f} | {first.source_bytes / 1e9:.1f} | "
            f"{sizes} | {whole} | {goal} |"
        )
        print(lines[-1], flush=True)
    note = (
        f"\n\nMade by `python eval/plan_table.py --sizes --bits {bits:g}`: {bits:g} bits per expert weight with\n"
        "everything stored, in the shared experts too. GB are 10⁹ bytes of tensors. Routers and norms have 16 bits.\n"
        "Computed by the dry run from the configs of the published models; no weight was read.\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + note, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CONFIGS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPE_NAMES))
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--sizes", action="store_true", help="the table of sizes instead")
    parser.add_argument("--output", type=Path, help="(default: plans.md or sizes.md in docs/results)")
    options = parser.parse_args()
    output = options.output or ROOT / "docs" / "results" / ("sizes.md" if options.sizes else "plans.md")
    if options.sizes:
        write_sizes(options.models, options.bits, output)
        return
    columns = "model|weights, 10⁹|of experts|recipe|bits|size, GB|after, GB|memory, GB|most of it|at least, GB|disk, GB"
    columns += "|time|coding, µs a weight|planned in"
    lines = ["| " + columns.replace("|", " | ") + " |", "|---" * (columns.count("|") + 1) + "|"]
    for model in options.models:
        for recipe in options.recipes:
            try:
                bits = options.bits if make_recipe(recipe, 2).budget else int(options.bits)
                # By CPU time, which other work on the machine changes less.
                ((plan, seconds),) = plan_model(CONFIGS[model], recipe, bits, clock=time.process_time)
            except KbvqError as error:
                raise SystemExit(f"{model}: {error}") from error
            speed = machine_speed(make_recipe(recipe, bits), torch.device("cpu"), time.process_time)
            largest = max(plan.memory.parts, key=lambda name: plan.memory.parts[name])
            lines.append(
                f"| {model} | {plan.model_weights / 1e9:.1f} | {plan.num_weights / 1e9:.1f} | {recipe} | "
                f"{plan.bits:.2f} | {plan.source_bytes / 1e9:.1f} | {plan.output_bytes / 1e9:.1f} | "
                f"{plan.memory.total / 1e9:.1f} | {largest} | {plan.least_memory / 1e9:.1f} | "
                f"{plan.disk.total / 1e9:.1f} | {format_seconds(sum(plan.seconds.values()))} | "
                f"{1e6 * speed.per_weight:.2f} | {seconds:.1f} s |"
            )
            print(lines[-1], flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread; load {os.getloadavg()[0]:.0f}"
    note = (
        f"\n\nMade by `python eval/plan_table.py`: {options.bits} bits, {int(options.bits)} code bits without a "
        "budget, 128 windows of\n2048 tokens, float32 on a CPU. at least: memory with the statistics of the experts on "
        "the disk (`--max-memory`).\ntime: an estimate for one thread of the machine that made the table "
        f"({machine}), from its products of\nmatrices ({speed.flops / 1e9:.0f} GFLOP/s) and its coding of a small "
        "projection of 256 inputs\n(coding, µs a weight), in CPU seconds, and from what factors and corrections take "
        "that grow with the width. planned in: seconds of the clock.\nConfigs of the "
        "published models, shards of headers alone, in bfloat16.\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + note, encoding="utf-8")


if __name__ == "__main__":
    main()
