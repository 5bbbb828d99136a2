"""Plans: from headers alone, true to what a run then does, and refusals before it starts."""

import json

import pytest
import torch
from huggingface_hub import get_local_safetensors_metadata
from moe_families import moe_model_types
from moe_families import tiny_config as moe_tiny_config
from moe_families import tiny_model as moe_tiny_model
from plan_table import CONFIGS, GOALS, plan_model
from quantizing import quantize
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from kbvq.cli import main
from kbvq.errors import CheckpointError, ConfigError
from kbvq.models import model_headers
from kbvq.models.layer_stream import LayerStream
from kbvq.quantization.planning import check_budget
from kbvq.quantization.progress import Part, Progress, format_seconds
from kbvq.quantization.run_plan import make_plan
from kbvq.recipes import make_recipe

PUBLISHED = {
    "Mixtral-8x7B": 46.7,
    "Mixtral-8x22B": 140.6,
    "Qwen1.5-MoE-A2.7B": 14.3,
    "Qwen3-30B-A3B": 30.5,
    "OLMoE-1B-7B": 6.92,
    "DeepSeek-V2-Lite": 15.7,
}
"""Billions of parameters, as their authors state them."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_plans_of_published_models_know_their_size(model):
    ((plan, _),) = plan_model(CONFIGS[model], "fast", 2.25)
    assert plan.model_weights / 1e9 == pytest.approx(PUBLISHED[model], rel=0.006)
    assert plan.source_bytes == 2 * plan.model_weights  # bfloat16, none of them ties its embeddings
    assert plan.bits == pytest.approx(2.25)
    assert plan.output_bytes == pytest.approx(plan.source_bytes - plan.num_weights * (2 - 2.25 / 8), rel=1e-6)
    # While a projection is coded: the second moments of its inputs and their factors in float32, its weights and those
    # of both projections, as stored in memory, twice.
    config = CONFIGS[model]
    experts = config.get("num_experts") or config.get("num_local_experts") or config["n_routed_experts"]
    width, hidden = config.get("moe_intermediate_size") or config["intermediate_size"], config["hidden_size"]
    least = 4 * experts * (2 * max(hidden, width) ** 2 + hidden * width + 2 * 3 * hidden * width)
    assert least < plan.memory.total < 4 * least


@pytest.mark.parametrize("model", GOALS)
def test_whole_checkpoints_at_2_bit_experts_are_as_small_as_they_should_be(model):
    ((eight, _), (four, _)) = plan_model(CONFIGS[model], "fast", 2, (8, 4))
    assert four.output_bytes < eight.output_bytes <= GOALS[model] * 1e9
    assert eight.model_bits == 8 * eight.output_bytes / eight.model_weights
    outside = eight.model_weights - eight.num_weights
    assert 0.99 * outside < eight.dense_weights < outside


def options(tmp_path, text):
    return ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--calibration", str(text),
            "--samples", "8", "--sequence-length", "32", "--bits", "3.5", "--recipe", "fast"]  # fmt: skip


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path, text, capsys):
    save_tiny_model(tmp_path / "model", "qwen2_moe")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        with open(shard, "r+b") as stream:  # no weight is read: there are only zeros behind the header
            length = int.from_bytes(stream.read(8), "little")
            size = shard.stat().st_size
            stream.truncate(8 + length)
            stream.truncate(size)
    assert main(["quantize", *options(tmp_path, text), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("2 layers", "quantized", "true bits", "memory", "disk", "time", "measuring layer"):
        assert part in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("shard_size", ["50KB", "1GB"])
def test_dry_run_of_a_hub_name_reads_headers_alone(tmp_path, text, capsys, monkeypatch, shard_size):
    """The hub's own client answers from local files, without a byte of weights; the plan is that of the folder."""
    local = tmp_path / "local"
    save_tiny_model(local, "qwen2_moe", max_shard_size=shard_size)
    monkeypatch.setattr(model_headers, "hf_hub_download", lambda name, file: str(local / file))
    monkeypatch.setattr(model_headers, "get_safetensors_metadata", lambda name: get_local_safetensors_metadata(local))
    assert main(["quantize", *options(tmp_path, text)[2:], "--model", "owner/name", "--dry-run"]) == 0
    remote = capsys.readouterr().out.splitlines()
    assert main(["quantize", *options(tmp_path, text)[2:], "--model", str(local), "--dry-run"]) == 0
    assert [line for line in remote if "time " not in line] == [
        line for line in capsys.readouterr().out.splitlines() if "time " not in line
    ]


@pytest.mark.skipif("qwen4_exp_text" not in moe_model_types(), reason="this transformers has no qwen4_exp_text")
def test_activations_of_several_residual_streams_are_counted_all(tmp_path):
    moe_tiny_model(moe_tiny_config("qwen4_exp_text")).save_pretrained(tmp_path)
    stream = LayerStream(tmp_path, dtype=torch.float32, device="cpu")
    states, _ = stream.layer_inputs(torch.arange(3, 27).view(2, 12))
    assert states[0, 0].numel() > stream.text_config.hidden_size
    recipe = make_recipe("fast", 3.5)
    plan = make_plan(stream, check_budget(stream.banks, recipe), recipe, samples=2, sequence_length=12)
    assert plan.disk.parts["activations"] == 5 * states.nbytes
    copies = 2 * 2 * len(stream.banks)  # of a window: projections and rates
    assert plan.disk.parts["disturbed activations"] == 2 * copies * states[:1].nbytes


def test_dry_run_of_a_hub_name_offline_says_what_to_do(tmp_path, text, capsys):
    assert main(["quantize", *options(tmp_path, text)[2:], "--model", "kbvq-tests/absent", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "there is no local folder kbvq-tests/absent" in error and "pass a local folder" in error


def test_headers_have_the_bytes_of_every_dtype(tmp_path):
    tensors = {"a": ("BF16", (3, 5)), "b": ("F8_E4M3", (7,)), "c": ("I64", ()), "d": ("BOOL", (2,)), "e": ("F4", (4,))}
    model_headers.write_header(tmp_path / "x.safetensors", tensors)
    length = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "x.safetensors").stat().st_size == 8 + length + 30 + 7 + 8 + 2 + 2


def test_every_run_prints_its_plan_and_keeps_to_its_size(tmp_path, text, caplog):
    caplog.set_level("INFO", logger="kbvq")
    save_tiny_model(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    record = quantize(tmp_path / "model", tmp_path / "out", text, make_recipe("paper", 2, kmeans_iterations=3))
    planned = next(line for line in caplog.text.splitlines() if "true bits per expert weight" in line)
    assert f"{record['bits_per_weight']:.3f} true bits" in planned
    stored = sum(t.nbytes for path in (tmp_path / "out").glob("*.safetensors") for t in load_file(path).values())
    assert f"size       {stored / 1e9:.2f} GB" in planned


def test_too_little_memory_or_disk_is_refused_with_the_numbers(tmp_path, text, capsys, monkeypatch):
    save_tiny_model(tmp_path / "model", "mixtral")
    assert main(["quantize", *options(tmp_path, text), "--max-memory", "100M"]) == 2
    error = capsys.readouterr().err
    assert "--max-memory allows 0.10 GB" in error and "statistics" in error
    with pytest.raises(ConfigError, match="this machine has 0.00 GB"):
        monkeypatch.setattr("kbvq.quantization.run_plan.available_memory", lambda device: 1000)
        quantize(tmp_path / "model", tmp_path / "out", text)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("kbvq.storage.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="1,000 free"):
        quantize(tmp_path / "model", tmp_path / "out", text, max_memory=1 << 40)
    assert main(["quantize", *options(tmp_path, text), "--max-memory", "much"]) == 2
    assert "--max-memory much" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_time_left_follows_what_was_measured():
    parts = [Part("a", 4, 10.0), Part("b", 2, 50.0)]
    assert Progress(parts, {}, shown=False).seconds_left() == 140
    # Half as fast as estimated, in the part that is measured and in the one to come.
    assert Progress(parts, {"a": [20.0]}, shown=False).seconds_left() == 3 * 20 + 2 * 100
    assert Progress(parts, {"a": [20.0] * 4, "b": [30.0]}, shown=False).seconds_left() == 30
    assert [format_seconds(s) for s in (0.25, 42, 90, 3 * 3600 + 299)] == ["0.2 s", "42 s", "2 min", "3 h 05 min"]


def test_seconds_and_bytes_of_every_step_are_in_the_metrics(tmp_path, text):
    save_tiny_model(tmp_path / "model", "olmoe")
    quantize(tmp_path / "model", tmp_path / "out", text, make_recipe("fast", 3.5, kmeans_iterations=2), samples=8)
    lines = [json.loads(line) for line in (tmp_path / "out" / "kbvq_metrics.jsonl").read_text().splitlines()]
    stages = ["preparing", *["measuring layer"] * 2, "planning", *["quantizing layer"] * 2]
    assert [line["stage"] for line in lines] == stages
    timing = json.loads((tmp_path / "out" / "kbvq_timing.json").read_text())
    assert timing["total_seconds"] == pytest.approx(sum(line["seconds"] for line in lines))
