"""Checkpoints of other tools: their loaders, what is said when one is missing, and the bits that they store."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from kbvq.cli import main
from kbvq.errors import CheckpointError, ConfigError
from kbvq_eval.loading import LoadedModel
from kbvq_eval.run import evaluate
from kbvq_eval.stored import size, stored

EXPERTS = GGMLQuantizationType.Q4_0
"""18 bytes for 32 weights: 4.5 bits."""
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
CHANGES = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}


def write_gguf(path: Path, model: nn.Module, tokens: list[str]) -> dict[str, torch.Tensor]:
    """A Qwen3-MoE in llama.cpp's layout, its experts in 4-bit blocks; returns its weights as they were written."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    written = {}
    for name, parameter in model.state_dict().items():
        value = parameter.numpy()
        parts = name.split(".")
        if parts[1] != "layers":
            target = {"lm_head": "output", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
            writer.add_tensor(f"{target[name.removesuffix('.weight')]}.weight", value)
        elif ".experts." in name:
            # Fused as transformers holds them; llama.cpp keeps gate and up apart.
            halves = np.split(value, 2, axis=1) if parts[-1] == "gate_up_proj" else [value]
            blocks = [gguf.quants.quantize(np.ascontiguousarray(half), EXPERTS) for half in halves]
            kinds = ("gate", "up") if parts[-1] == "gate_up_proj" else ("down",)
            for kind, block in zip(kinds, blocks, strict=True):
                writer.add_tensor(f"blk.{parts[2]}.ffn_{kind}_exps.weight", block, raw_dtype=EXPERTS)
            value = np.concatenate([gguf.quants.dequantize(block, EXPERTS) for block in blocks], axis=-2)
        else:
            writer.add_tensor(f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.weight", value)
        written[name] = torch.from_numpy(value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def tokens_of(tokenizer) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]


@pytest.fixture(scope="module")
def llamacpp(tmp_path_factory) -> Path:
    """original: a tiny model; blocks.gguf: it with experts in blocks; unpacked: what is in the blocks, dense."""
    folder = tmp_path_factory.mktemp("gguf")
    model = save_tiny_model(folder / "original", "qwen3_moe", **CHANGES)
    written = write_gguf(folder / "blocks.gguf", model, tokens_of(tiny_tokenizer()))
    model.load_state_dict(written)
    model.save_pretrained(folder / "unpacked")
    tiny_tokenizer().save_pretrained(folder / "unpacked")
    return folder


def test_a_gguf_is_compared_by_what_is_in_its_blocks(llamacpp, text, tmp_path):
    models = [str(llamacpp / name) for name in ("blocks.gguf", "unpacked")]
    rest = ["--baseline", str(llamacpp / "original"), "--perplexity", str(text), "--window", "64", "--device", "cpu"]
    assert main(["compare", *models, *rest, "--output", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "comparison.json").read_text())}
    blocks, unpacked = rows["blocks.gguf"], rows["unpacked"]
    assert blocks["method"] == "gguf" and unpacked["method"] is None
    assert blocks["scores"]["kl"] == pytest.approx(unpacked["scores"]["kl"], rel=1e-6)
    assert blocks["scores"]["kl"] > 0
    assert (blocks["size"]["bits"], unpacked["size"]["bits"]) == (4.5, 32)
    assert 4.5 < blocks["size"]["model_bits"] < 32


def test_a_gguf_of_another_vocabulary_is_refused(llamacpp, tmp_path):
    tokens = tokens_of(tiny_tokenizer())
    tokens[7] = "other"
    model = tiny_model("qwen3_moe", **CHANGES)
    write_gguf(tmp_path / "other.gguf", model, tokens)
    with pytest.raises(ConfigError, match="token 7 of .*other.gguf is 'other' and the baseline's is 'w7'"):
        LoadedModel(str(tmp_path / "other.gguf"), "cpu", "float32", vocabulary=tiny_tokenizer())
    with pytest.raises(ConfigError, match="gguf-split"):
        part = tmp_path / "model-00001-of-00002.gguf"
        part.touch()
        LoadedModel(str(part), "cpu", "float32")
    with pytest.raises(CheckpointError, match="no file"):
        LoadedModel("missing.gguf", "cpu", "float32")


def test_shared_experts_count_and_their_gates_do_not(tmp_path):
    """By the names of the hub and by those of llama.cpp."""
    names = {
        "model.layers.0.mlp.shared_expert.up_proj.weight": "blk.0.ffn_up_shexp.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight": "blk.0.ffn_up_exps.weight",
        "model.layers.0.mlp.shared_expert_gate.weight": "blk.0.ffn_gate_inp_shexp.weight",
        "model.layers.0.mlp.gate.weight": "blk.0.ffn_gate_inp.weight",
    }
    (tmp_path / "hub").mkdir()
    save_file({name: torch.zeros(32 * 4**n) for n, name in enumerate(names)}, tmp_path / "hub" / "model.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "qwen2moe")
    for n, name in enumerate(names.values()):
        writer.add_tensor(name, np.zeros(32 * 4**n, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = stored(tmp_path / "hub")
    assert found == stored(tmp_path / "file.gguf")
    assert (found.expert_elements, found.num_elements) == (32 * 5, 32 * 85)
    assert size(tmp_path / "hub", found).bits == 32
    assert stored(tmp_path / "nothing") is None


def packed_by(method: str, folder: Path) -> Path:
    """A checkpoint whose configuration says that a tool quantized it."""
    save_tiny_model(folder, "qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "sym": False}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize(
    ("method", "module", "remedy"),
    [
        ("auto-round", "auto_round", "pip install auto-round"),
        ("gptq", "gptqmodel", "pip install gptqmodel"),
        ("compressed-tensors", "compressed_tensors", "pip install compressed-tensors"),
        ("unheard-of", None, "unheard-of"),
    ],
)
def test_a_loader_that_is_missing_is_said_at_once(method, module, remedy, tmp_path, text, monkeypatch, capsys):
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    folder = packed_by(method, tmp_path / "packed")
    save_tiny_model(tmp_path / "original", "qwen3_moe")
    models = [str(tmp_path / "original"), str(folder)]
    rest = ["--baseline", models[0], "--perplexity", str(text), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["compare", *models, *rest]) == 2
    error = capsys.readouterr().err
    assert str(folder) in error and remedy in error
    assert not (tmp_path / "out").exists(), "nothing was measured before"


def test_gptq_is_loaded_by_its_own_loader(tmp_path, monkeypatch):
    """GPTQModel is not here: that it is called, with what, and that its model is the one."""
    called = []

    def load(path, **options):
        called.append((path, options))
        return types.SimpleNamespace(model=AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))

    fake = types.ModuleType("gptqmodel")
    fake.BACKEND = types.SimpleNamespace(TORCH="torch", AUTO="auto")
    fake.GPTQModel = types.SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "gptqmodel", fake)
    save_tiny_model(tmp_path / "dense", "qwen3_moe")
    folder = packed_by("gptq", tmp_path / "packed")
    with pytest.raises(ConfigError, match="--dtype bfloat16"):
        LoadedModel(str(folder), "cpu", "float32")
    loaded = LoadedModel(str(folder), "cpu", "bfloat16")
    assert loaded.method == "gptq" and not loaded.model().training
    assert called == [(str(folder), {"device": "cpu", "dtype": torch.bfloat16, "backend": "torch"})]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_does_not_diverge_from_itself(tmp_path, text, dtype):
    """As a baseline it is streamed by layer, as a model loaded: the same numbers, not only near ones."""
    save_tiny_model(tmp_path, "qwen3_moe")
    found = evaluate(
        str(tmp_path), baseline=str(tmp_path), perplexity=[str(text)], window=64, device="cpu", dtype=dtype
    )["perplexity"][text.name]
    assert (found["kl"], found["delta_nll"], found["agreement"]) == (0, 0, 1)


def test_a_checkpoint_that_would_be_loaded_in_part_is_refused(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".1.mlp.experts." not in n}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not find model.layers.1.mlp.experts.down_proj"):
        LoadedModel(str(tmp_path), "cpu", "float32").model()
