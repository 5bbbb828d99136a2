"""The vLLM plugin against a stand-in of vLLM's interface; vLLM itself is not run (vllm_plugin/README.md)."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import vllm_stand_in
from packed_banks import random_bank, write_packed
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM
from vllm_stand_in import LinearBase, MoEConfig, ParallelConfig, RoutedExperts, UnquantizedLinearMethod

from kbvq.errors import CheckpointError, ConfigError, UnsupportedModelError
from kbvq.models.moe_adapters import find_expert_banks
from kbvq.structures import MatrixFormat, ProjectionFormat

PATHS = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]

# Between them, stored tensors of every name and number of dimensions.
FORMATS = {
    "stages": {"codebook": "rq", "num_stages": 2, "codebook_dtype": "int8", "has_scale": True, "has_bias": True},
    "trellis": {
        "codebook": "trellis",
        "vector_dim": 1,
        "codebook_size": 4,
        "has_scale": True,
        "has_column_scale": True,
    },
    "basis": {"num_codebooks": 8, "rank": 4, "factor_dtype": "int8", "has_scale": True},
}


@pytest.fixture
def plugin():
    """The registered config class, as vLLM comes to it: by the entry point."""
    with vllm_stand_in.installed():
        project = (Path(__file__).parent.parent / "vllm_plugin" / "pyproject.toml").read_text(encoding="utf-8")
        (entry,) = re.findall(r'"vllm\.general_plugins"\]\nkbvq = "(\w+:\w+)"', project)
        module, _, function = entry.partition(":")
        for _ in range(2):  # vLLM loads plugins again in each process, and may do so twice in one
            getattr(import_module(module), function)()
        yield vllm_stand_in.registered["kbvq"]


def write(tmp_path, arch="qwen3_moe", **options):
    """(folder of a packed checkpoint, its quantization_config, its tensors)"""
    model = save_tiny_model(tmp_path / "source", arch, dtype=torch.bfloat16)
    banks = [
        random_bank(b.path, b.kind, b.num_experts, b.hidden_size, b.intermediate_size, seed=seed, **options)
        for seed, b in enumerate(find_expert_banks(model))
    ]
    folder = tmp_path / "packed"
    write_packed(tmp_path / "source", folder, model, banks)
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return folder, json.loads((folder / "config.json").read_text())["quantization_config"], tensors


def below(tensors, path):
    return [(name.removeprefix(f"{path}."), tensor) for name, tensor in tensors.items() if name.startswith(f"{path}.")]


def experts(config, path=PATHS[0], **changes):
    layer = {name: changes.pop(name) for name in ("apply_router_weight_on_input", "swiglu_limit") if name in changes}
    return RoutedExperts(
        path, MoEConfig(**(dict(num_experts=8, hidden_dim=64, intermediate_size=32) | changes)), config, **layer
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_in_pieces_it_computes_what_transformers_does(plugin, tmp_path, format, dtype):
    folder, quantization, tensors = write(tmp_path, **FORMATS[format])
    config = plugin.from_config(quantization)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 64, generator=generator).to(dtype)
    chosen = torch.rand(5, 8, generator=generator).topk(2).indices.int()
    weights = torch.rand(5, 2, generator=generator)
    for path in PATHS:
        layer = experts(config, path)
        loaded = set(layer.load_weights(below(tensors, path)))
        assert loaded == {name for name, _ in layer.named_parameters()}
        for parameter in layer.parameters():  # as vLLM does when it moves a layer
            parameter.data = parameter.data.clone()
        layer.quant_method.process_weights_after_loading(layer)
        outputs = layer(tokens, weights, chosen)
        assert outputs.dtype == dtype and outputs.abs().sum() > 0
        assert torch.equal(outputs, reference.get_submodule(path)(tokens, chosen, weights))


def test_other_layers_stay_with_vllm(plugin, tmp_path):
    config = plugin.from_config(write(tmp_path)[1])
    assert isinstance(
        config.get_quant_method(LinearBase(), "model.layers.0.self_attn.qkv_proj"), UnquantizedLinearMethod
    )
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None
    assert (config.get_name(), config.get_config_filenames()) == ("kbvq", [])


def test_experts_at_another_path_are_refused(plugin, tmp_path):
    with pytest.raises(
        CheckpointError, match="experts at transformer.h.0.experts, the checkpoint packs those at model"
    ):
        experts(plugin.from_config(write(tmp_path)[1]), "transformer.h.0.experts")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_parallel_config": ParallelConfig(tp_size=2)}, "not split .*--tensor-parallel-size 1"),
        ({"moe_parallel_config": ParallelConfig(use_ep=True)}, "not split .*without expert parallelism"),
        ({"activation": "gelu"}, r"silu\(gate\) \* up\), this model wants gelu"),
        ({"swiglu_limit": 7.0}, "wants silu, swiglu_limit"),
        ({"apply_router_weight_on_input": True}, "routing weights on the inputs"),
    ],
)
def test_what_it_cannot_compute_is_refused(plugin, tmp_path, changes, message):
    config = plugin.from_config(write(tmp_path)[1])
    with pytest.raises(UnsupportedModelError, match=f"{PATHS[0]}.*{message}"):
        experts(config, **changes)


def test_experts_of_another_size_are_refused(plugin, tmp_path):
    config = plugin.from_config(write(tmp_path)[1])
    with pytest.raises(CheckpointError, match=r"vLLM has \[8, 64, 48\].*packed format \[8, 64, 32\]"):
        experts(config, intermediate_size=48)


def test_packed_shared_experts_and_matrices_are_refused(plugin, tmp_path):
    _, quantization, _ = write(tmp_path, "qwen2_moe")
    with pytest.raises(UnsupportedModelError, match=r"packs model.layers.0.mlp.shared_expert \(2 such"):
        plugin.from_config(quantization)
    _, quantization, _ = write(tmp_path / "other")
    weight = ProjectionFormat(1, 64, 64, codebook="rq", vector_dim=2, codebook_size=256, num_stages=2, has_scale=True)
    matrix = MatrixFormat("model.layers.0.self_attn.q_proj", "linear", weight)
    with pytest.raises(UnsupportedModelError, match=r"packs model.layers.0.self_attn.q_proj \(1 such"):
        plugin.from_config(quantization | {"dense": [matrix.to_dict()]})


def test_rates_per_expert_are_refused(plugin, tmp_path):
    quantization = write(tmp_path)[1]
    quantization["banks"][0]["experts"] = list(range(8))
    with pytest.raises(UnsupportedModelError, match=rf"{PATHS[0]} have rates of their own.*expert_rates=false"):
        plugin.from_config(quantization)


def test_config_of_another_version_is_refused(plugin, tmp_path):
    with pytest.raises(ConfigError, match="format version 99"):
        plugin.from_config(write(tmp_path)[1] | {"format_version": 99})


def test_tensor_that_is_missing_incomplete_or_misshapen_is_named(plugin, tmp_path):
    _, quantization, tensors = write(tmp_path)
    config, weights = plugin.from_config(quantization), below(tensors, PATHS[0])
    layer = experts(config)
    list(layer.load_weights([(name, tensor) for name, tensor in weights if name != "down_proj_codebook"]))
    with pytest.raises(CheckpointError, match=rf"{PATHS[0]}: w2_weight_codebook was not loaded \(0 of"):
        layer.quant_method.process_weights_after_loading(layer)
    layer = experts(config)
    list(layer.load_weights([(name, tensor[:7] if name == "down_proj" else tensor) for name, tensor in weights]))
    with pytest.raises(CheckpointError, match="w2_weight was not loaded"):
        layer.quant_method.process_weights_after_loading(layer)
    layer = experts(config)
    with pytest.raises(CheckpointError, match=r"w13_weight \(w1 of expert 0\) is stored as .* its format says"):
        list(layer.load_weights([(name, tensor[..., :-1]) for name, tensor in weights if name == "gate_up_proj"]))
