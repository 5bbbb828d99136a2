"""Quantize, save, load: the whole way, on tiny models of every family."""

import filecmp
import json
import subprocess
import sys

import pytest
import torch
from quantizing import quantize
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, save_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kbvq.cli import main
from kbvq.codes.packing import dequantize_expert
from kbvq.errors import CalibrationError, CheckpointError, ConfigError, NumericalError, UnsupportedModelError
from kbvq.models.moe_adapters import find_expert_banks
from kbvq.recipes import make_recipe
from kbvq.storage.checkpoint import inspect_checkpoint, verify_checkpoint

UNHASHED = ("kbvq_timing.json", "kbvq_metrics.jsonl")
TOKENS = torch.arange(2, 26)[None]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loaded_model_computes_with_the_decoded_weights(tmp_path, text, arch):
    """The reference is the family's own dense code with every expert's decoded weight written into it."""
    original = save_tiny_model(tmp_path / "model", arch)
    recipe = make_recipe("default", 2, budget=False, bcos=False, idre=True, kmeans_iterations=5)
    record = quantize(tmp_path / "model", tmp_path / "packed", text, recipe)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    unquantized = logits(original)
    banks = find_expert_banks(original)
    for bank in banks:
        packed, dense = loaded.get_submodule(bank.path), original.get_submodule(bank.path)
        for projection in ("gate_up_proj", "down_proj"):
            format, tensors = packed.projection_format(projection), packed.projection_tensors(projection)
            weights = torch.stack([dequantize_expert(format, tensors, e) for e in range(bank.num_experts)])
            if bank.kind == "routed":
                getattr(dense, projection).data = weights
            elif projection == "gate_up_proj":
                dense.gate_proj.weight.data, dense.up_proj.weight.data = weights[0].chunk(2)
            else:
                dense.down_proj.weight.data = weights[0]
    stored, changed = dict(loaded.named_parameters()), set()
    for name, parameter in original.named_parameters():
        if name in stored and not torch.equal(parameter, stored[name]):
            parameter.data = stored[name].data
            changed.add(name)
    # Output projections of attention make up for the banks before; nothing else outside the banks is touched.
    behind = range(min(bank.decoder_layer for bank in banks) + 1, len(original.model.layers))
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in behind}
    torch.testing.assert_close(logits(loaded), logits(original), rtol=1e-4, atol=1e-4)
    assert (logits(loaded) - unquantized).abs().max() > 1e-3
    assert record["bits_per_weight"] == inspect_checkpoint(tmp_path / "packed")["bits_per_weight"]
    assert [report["path"] for layer in record["layers"] for report in layer["banks"]] == [bank.path for bank in banks]
    verify_checkpoint(tmp_path / "packed")


def test_same_seed_gives_identical_files_and_another_seed_others(tmp_path, text):
    save_tiny_model(tmp_path / "model", "qwen2_moe")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(tmp_path / "model", tmp_path / name, text, seed=seed)
    names = sorted(path.name for path in (tmp_path / "a").iterdir() if path.name not in UNHASHED)
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[0] == names
    weights = [name for name in names if name.endswith(".safetensors")]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", weights, shallow=False)[0] != weights


def test_quantized_weights_approach_the_original_as_bits_grow(tmp_path, text):
    original = save_tiny_model(tmp_path / "model", "qwen3_moe")
    errors = {}
    for bits in (2, 4):
        quantize(
            tmp_path / "model",
            tmp_path / str(bits),
            text,
            make_recipe("default", bits, budget=False, kmeans_iterations=10),
        )
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(bits), dtype=torch.float32)
        errors[bits] = (logits(loaded) - logits(original)).square().mean().item()
    assert errors[4] < 0.3 * errors[2]


def test_experts_without_tokens_are_counted_and_reported(tmp_path, caplog):
    """Half a dozen different words cannot reach all of 64 experts."""
    save_tiny_model(tmp_path / "model", "qwen3_moe", num_experts=64)
    text = tmp_path / "narrow.txt"
    text.write_text("w3 w4 w5 " * 400, encoding="utf-8")
    record = quantize(tmp_path / "model", tmp_path / "packed", text)
    few = record["experts_with_few_tokens"]["model.layers.0.mlp.experts"]
    tokens = record["layers"][0]["banks"][0]["tokens"]
    assert 0 in tokens
    assert few == [expert for expert, count in enumerate(tokens) if count < 256]
    assert "fewer than 256 calibration tokens" in caplog.text
    assert (
        json.loads((tmp_path / "packed" / "kbvq_run.json").read_text())["experts_with_few_tokens"]
        == record["experts_with_few_tokens"]
    )


def test_layers_without_experts_pass_the_activations_on(tmp_path, text):
    save_tiny_model(tmp_path / "model", "deepseek_v3")
    record = quantize(tmp_path / "model", tmp_path / "packed", text)
    assert record["layers"][0]["banks"] == [] and record["layers"][0]["output_error"] == 0
    assert [bank["path"] for bank in record["layers"][1]["banks"]] == [
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.shared_experts",
    ]


def test_load_without_import_fails(tmp_path, text):
    save_tiny_model(tmp_path / "model", "mixtral")
    quantize(tmp_path / "model", tmp_path / "packed", text)
    code = (
        "from transformers import AutoModelForCausalLM; import sys; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "packed"], capture_output=True, text=True)
    assert result.returncode != 0
    assert "gate_up_proj" in result.stdout + result.stderr


def remove_shard(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()


def truncate_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def put_nan(folder):
    shard = next(p for p in folder.glob("*.safetensors") if "model.norm.weight" in load_file(p))
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})


def quantize_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def shrink_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w5"] = config["vocab_size"] + 7
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (remove_shard, CheckpointError, "is missing"),
        (truncate_shard, CheckpointError, "truncated"),
        (put_nan, NumericalError, "model.norm.weight"),
        (quantize_config, CheckpointError, "already quantized by gptq"),
        (shrink_vocabulary, CalibrationError, "135"),
    ],
)
def test_damaged_input_is_refused_and_nothing_is_left(tmp_path, text, spoil, error, message):
    save_tiny_model(tmp_path / "model", "qwen3_moe", max_shard_size="100KB")
    spoil(tmp_path / "model")
    with pytest.raises(error, match=message):
        quantize(tmp_path / "model", tmp_path / "packed", text)
    assert not (tmp_path / "packed").exists()


def test_dense_model_is_refused(tmp_path, text):
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="dense model"):
        quantize(tmp_path / "model", tmp_path / "packed", text)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 0}, ConfigError, "--samples 0"),
        ({"sequence_length": 1}, ConfigError, "--sequence-length 1"),
        ({"sequence_length": 512}, ConfigError, "at most 256"),
        ({"seed": -1}, ConfigError, "--seed -1"),
        ({"samples": 4000}, CalibrationError, "4000"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path, text, changes, error, message):
    save_tiny_model(tmp_path / "model", "mixtral")
    with pytest.raises(error, match=message):
        quantize(tmp_path / "model", tmp_path / "packed", text, **changes)


def test_empty_calibration_text_is_refused(tmp_path):
    save_tiny_model(tmp_path / "model", "mixtral")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CalibrationError, match="empty"):
        quantize(tmp_path / "model", tmp_path / "packed", tmp_path / "empty.txt")


def test_three_bits_on_matrices_too_small_for_the_codebook_names_the_bank(tmp_path, text):
    save_tiny_model(tmp_path / "model", "mixtral")
    with pytest.raises(ConfigError, match="model.layers.0.mlp.experts: .*4096"):
        quantize(tmp_path / "model", tmp_path / "packed", text, make_recipe("paper", 3))


def test_output_is_replaced_only_when_asked_and_only_at_the_end(tmp_path, text):
    save_tiny_model(tmp_path / "model", "mixtral")
    quantize(tmp_path / "model", tmp_path / "packed", text)
    before = (tmp_path / "packed" / "kbvq_manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="--overwrite"):
        quantize(tmp_path / "model", tmp_path / "packed", text)
    with pytest.raises(CalibrationError):
        quantize(tmp_path / "model", tmp_path / "packed", text, overwrite=True, samples=4000)
    assert (tmp_path / "packed" / "kbvq_manifest.json").read_bytes() == before
    quantize(tmp_path / "model", tmp_path / "packed", text, overwrite=True, seed=3)
    assert (tmp_path / "packed" / "kbvq_manifest.json").read_bytes() != before


def test_command_line(tmp_path, text, capsys):
    save_tiny_model(tmp_path / "model", "olmoe")
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "packed"), "--calibration", str(text)]
    common = [
        "--samples",
        "16",
        "--sequence-length",
        "32",
        "--recipe",
        "paper",
        "--no-idre",
        "--no-bcos",
        "--device",
        "cpu",
    ]
    assert main(["quantize", *arguments, *common, "--quiet"]) == 0
    summary = inspect_checkpoint(tmp_path / "packed")
    assert f"{summary['bits_per_weight']:.3f} bits per expert weight" in capsys.readouterr().out
    assert summary["banks"][0]["down_proj"]["rank"] == 0 and not summary["banks"][0]["down_proj"]["has_bias"]

    assert main(["inspect", str(tmp_path / "packed"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert main(["inspect", str(tmp_path / "packed")]) == 0
    assert f"{summary['bits_per_weight']:.3f} bits per weight" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "packed")]) == 0
    shard = next((tmp_path / "packed").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(tmp_path / "packed")]) == 2
    assert shard.name in capsys.readouterr().err

    assert main(["quantize", *arguments, *common, "--bits", "2.5"]) == 2
    assert "--bits 2.5" in capsys.readouterr().err
    trellis = [
        "--samples",
        "16",
        "--sequence-length",
        "32",
        "--bits",
        "2",
        "--no-budget",
        "--codebook",
        "trellis",
        "--idre",
    ]
    assert main(["quantize", *arguments, *trellis, "--quiet", "--overwrite"]) == 0
    projection = inspect_checkpoint(tmp_path / "packed")["banks"][0]["down_proj"]
    assert (projection["codebook"], projection["rank"]) == ("trellis", 1)
    assert main(["quantize", *arguments, *common]) == 2
    assert "--overwrite" in capsys.readouterr().err
