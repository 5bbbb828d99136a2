import json
import logging
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from moe_families import tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, save_tiny_model, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, T5Config
from transformers.quantizers import HfQuantizer

from kbvq.errors import CheckpointError, NumericalError, UnsupportedModelError
from kbvq.models import layer_stream, stored_tensors
from kbvq.models.layer_stream import LayerStream, auto_class, check_names_are_kept, resolve_model_folder
from kbvq.models.moe_adapters import find_expert_banks

IDS = torch.randint(2, 128, (3, 20), generator=torch.Generator().manual_seed(0))


def open_stream(folder, dtype=torch.float32):
    return LayerStream(folder, dtype=dtype, device="cpu")


@torch.no_grad()
def assert_streams_like_the_whole_model(folder, dtype=torch.float32):
    """Layer by layer, the hidden states lead to the logits of `from_pretrained`, bit for bit."""
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    stream = open_stream(folder, dtype)
    hidden_states, layer_kwargs = stream.layer_inputs(IDS)
    assert len(layer_kwargs) == stream.num_layers == full.config.num_hidden_layers
    for index in range(stream.num_layers):
        with stream.layer(index) as layer:
            hidden_states = layer(hidden_states, **layer_kwargs[index])
    logits = full.lm_head(full.model.norm(hidden_states))
    assert logits.dtype == dtype
    assert torch.equal(logits, full(IDS).logits)
    return layer_kwargs


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_moe_tied", "deepseek_v3"])
def test_head_and_whole_model_compute_what_from_pretrained_does(tmp_path, arch):
    model = save_tiny_model(tmp_path, arch)
    stream = open_stream(tmp_path)
    states = []
    model.model.layers[-1].register_forward_hook(lambda _, inputs, output: states.append(output))
    with torch.no_grad():
        expected = model(IDS).logits
        with stream.head():
            torch.testing.assert_close(stream.logits(states[0]), expected)
        banks = {bank.path: model.get_submodule(bank.path) for bank in stream.banks}
        with stream.whole(banks, {}) as whole:
            torch.testing.assert_close(whole(input_ids=IDS, use_cache=False).logits, expected)
            torch.testing.assert_close(stream.logits(states[0]), expected)
        name = "model.layers.1.self_attn.o_proj.weight"
        with stream.whole(banks, {name: torch.zeros_like(model.get_parameter(name))}) as whole:
            changed = whole(input_ids=IDS, use_cache=False).logits
        model.get_parameter(name).zero_()
        torch.testing.assert_close(changed, model(IDS).logits)
        assert not torch.allclose(changed, expected)
    assert all(parameter.is_meta for parameter in stream.model.parameters())
    assert_streams_like_the_whole_model(tmp_path)  # and the stream is as good as new


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_model_is_that_of_from_pretrained(tmp_path, arch, dtype):
    save_tiny_model(tmp_path, arch, dtype=torch.bfloat16, max_shard_size="100KB")
    GenerationConfig(max_new_tokens=7, eos_token_id=None).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    loaded = open_stream(tmp_path, dtype).load()
    assert type(loaded) is type(expected) and not loaded.training
    theirs = dict(expected.named_parameters()) | dict(expected.named_buffers())
    ours = dict(loaded.named_parameters()) | dict(loaded.named_buffers())  # a tied parameter once
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)
    continuations = [model.generate(IDS, do_sample=False) for model in (loaded, expected)]
    assert continuations[0].shape == (3, IDS.shape[1] + 7) and torch.equal(*continuations)


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages by file are in /proc")
def test_loaded_model_keeps_no_pages_of_experts_that_it_fused(tmp_path):
    model = save_tiny_model(tmp_path, "qwen3_moe", hidden_size=128, moe_intermediate_size=1024)
    experts = sum(parameter.nbytes for name, parameter in model.named_parameters() if ".experts." in name)
    loaded = open_stream(tmp_path).load()
    resident, mapped = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            mapped = str(tmp_path) in line
        elif mapped and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    # Weights that are taken as they are may stay mapped, and with each the system maps what lies around it.
    assert resident < experts / 2, loaded


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "stored, computed",
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
    ids=["f32", "f32-as-bf16", "bf16-as-f16"],
)
def test_streamed_logits_equal_those_of_the_whole_model(tmp_path, arch, stored, computed):
    save_tiny_model(tmp_path, arch, dtype=stored, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_streams_like_the_whole_model(tmp_path, computed)


@pytest.mark.parametrize(
    "arch, changes",
    [
        ("mixtral", dict(sliding_window=4)),
        ("qwen3_moe", dict(mlp_only_layers=[0])),
        ("deepseek_v2", dict(q_lora_rank=12)),
        ("deepseek_v3", dict(q_lora_rank=12)),
    ],
    ids=["sliding-window", "dense-layer", "low-rank-queries-v2", "low-rank-queries-v3"],
)
def test_variants_of_the_architectures(tmp_path, arch, changes):
    save_tiny_model(tmp_path, arch, tokenizer=False, **changes)
    assert_streams_like_the_whole_model(tmp_path)


def test_layers_with_different_windows_get_different_masks(tmp_path):
    layer_types = ["full_attention", "sliding_attention"]
    save_tiny_model(tmp_path, "qwen2_moe", use_sliding_window=True, sliding_window=4, layer_types=layer_types)
    full, sliding = (kwargs["attention_mask"] for kwargs in assert_streams_like_the_whole_model(tmp_path))
    assert full is None or full[0, 0, 10, 0]
    assert not sliding[0, 0, 10, 6] and sliding[0, 0, 10, 7]


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3"])
def test_shards_with_the_names_of_the_model(tmp_path, arch):
    """Experts already fused, as a model in memory names them."""
    model = save_tiny_model(tmp_path, arch)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_streams_like_the_whole_model(tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stored_tensors_outside_the_banks(tmp_path, arch):
    """Together with the banks they are the whole state of the model, in the dtypes of the files."""
    model = save_tiny_model(tmp_path, arch, dtype=torch.bfloat16, max_shard_size="100KB")
    stream = open_stream(tmp_path)
    tensors = stream.outer_tensors()
    assert not any(name.startswith("model.layers.") for name in tensors)
    for index in range(stream.num_layers):
        layer = stream.layer_tensors(index)
        assert layer and all(name.startswith(f"model.layers.{index}.") for name in layer)
        tensors |= layer

    banks = tuple(f"{bank.path}." for bank in stream.banks)
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(banks)}
    if arch == "qwen3_moe_tied":
        del expected["lm_head.weight"]
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def test_tensors_of_banks_are_not_read(tmp_path, monkeypatch):
    save_tiny_model(tmp_path, "qwen2_moe")
    stream = open_stream(tmp_path)
    read = []

    @contextmanager
    def spying_open(path, framework):
        with safe_open(path, framework=framework) as file:

            class Spy:
                def get_tensor(self, key):
                    read.append(key)
                    return file.get_tensor(key)

            yield Spy()

    monkeypatch.setattr(stored_tensors, "safe_open", spying_open)
    stream.layer_tensors(1)
    assert "model.layers.1.mlp.gate.weight" in read and "model.layers.1.mlp.shared_expert_gate.weight" in read
    assert not [key for key in read if ".experts." in key or ".shared_expert." in key or ".layers.0." in key]


def test_description_of_the_source(tmp_path):
    model = save_tiny_model(tmp_path, "deepseek_v3", dtype=torch.bfloat16)
    stream = open_stream(tmp_path)
    assert stream.source_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    outside = [stream.outer_tensors(), *map(stream.layer_tensors, range(stream.num_layers))]
    assert stream.dense_bytes == sum(tensor.nbytes for tensors in outside for tensor in tensors.values())
    assert stream.banks == find_expert_banks(model)
    assert stream.layers_path == "model.layers"
    assert stream.config.model_type == "deepseek_v3"
    assert not stream.model.training and stream.config.use_cache is False


def test_source_bytes_count_a_tied_tensor_once(tmp_path):
    model = save_tiny_model(tmp_path, "qwen3_moe_tied")
    assert open_stream(tmp_path).source_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_correction_bias_of_the_router_stays_float32(tmp_path):
    model = save_tiny_model(tmp_path, "deepseek_v3", dtype=torch.bfloat16)
    stream = open_stream(tmp_path, torch.bfloat16)
    with stream.layer(1) as layer:
        bias = layer.mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert torch.equal(bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
        assert layer.mlp.gate.weight.dtype == torch.bfloat16


def materialized(stream):
    return {name for name, tensor in stream.model.state_dict().items() if not tensor.is_meta}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_only_one_layer_is_materialized_at_a_time(tmp_path, arch):
    save_tiny_model(tmp_path, arch)
    stream = open_stream(tmp_path)
    assert materialized(stream) == set()
    stream.layer_inputs(IDS)
    assert materialized(stream) == {"model.embed_tokens.weight", "model.norm.weight"}
    for index in range(stream.num_layers):
        with stream.layer(index):
            expected = {n for n in stream.model.state_dict() if n.startswith(f"model.layers.{index}.")}
            assert materialized(stream) == expected
        assert materialized(stream) == set()


def test_layer_goes_back_after_an_error_and_can_be_opened_again(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe")
    stream = open_stream(tmp_path)
    with pytest.raises(RuntimeError, match="inside"), stream.layer(0) as layer:
        first = layer.mlp.experts.down_proj.clone()
        raise RuntimeError("inside")
    assert materialized(stream) == set()
    with stream.layer(0) as layer:
        assert torch.equal(layer.mlp.experts.down_proj, first)


def test_replaced_bank_is_left_alone_and_the_skeleton_restored(tmp_path):
    save_tiny_model(tmp_path, "deepseek_v3")
    stream = open_stream(tmp_path)
    original, replacement = stream.model.model.layers[1].mlp.experts, nn.Linear(2, 2)
    with stream.layer(1) as layer:
        layer.mlp.experts = replacement
    assert stream.model.model.layers[1].mlp.experts is original
    assert not replacement.weight.is_meta
    assert materialized(stream) == set()


def test_stubs_of_the_layers_are_removed_after_an_error(tmp_path):
    save_tiny_model(tmp_path, "mixtral")
    stream = open_stream(tmp_path)
    with pytest.raises(IndexError):
        stream.layer_inputs(torch.tensor([[1000]]))
    assert all("forward" not in vars(layer) for layer in stream.model.model.layers)


def test_tied_checkpoint_that_stores_only_the_head(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe_tied")
    rewrite(
        tmp_path / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}),
    )
    assert_streams_like_the_whole_model(tmp_path)
    assert "lm_head.weight" not in open_stream(tmp_path).outer_tensors()


@pytest.mark.parametrize("factor, stored", [(1, False), (2, True)], ids=["equal", "different"])
def test_tied_checkpoint_that_stores_both(tmp_path, factor, stored):
    """As `from_pretrained` reads it: tied if the two are equal, and two tensors if not."""
    save_tiny_model(tmp_path, "qwen3_moe_tied")
    rewrite(
        tmp_path / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * factor}),
    )
    assert ("lm_head.weight" in open_stream(tmp_path).outer_tensors()) is stored


def test_finite_weights_pass(tmp_path):
    save_tiny_model(tmp_path, "deepseek_v3", dtype=torch.float16, max_shard_size="100KB")
    open_stream(tmp_path).check_finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_named(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr(layer_stream, "_FINITE_CHUNK", 100)
    save_tiny_model(tmp_path, "mixtral", dtype=dtype)
    key = next(key for key in load_file(tmp_path / "model.safetensors") if re.search(r"layers\.1.*experts\.2\.w3", key))

    def spoil(tensors):
        tensors[key].view(-1)[-1] = value

    rewrite(tmp_path / "model.safetensors", spoil)
    with pytest.raises(NumericalError, match=rf"{re.escape(key)} in .*model.safetensors"):
        open_stream(tmp_path).check_finite()


def test_tensors_that_the_model_does_not_use_are_reported(tmp_path, caplog):
    save_tiny_model(tmp_path, "qwen3_moe")
    rewrite(
        tmp_path / "model.safetensors",
        lambda tensors: tensors.update({"model.layers.2.mlp.gate.weight": torch.full((2, 2), float("nan"))}),
    )
    with caplog.at_level(logging.WARNING, logger="kbvq"):
        stream = open_stream(tmp_path)
    assert "1 stored tensors are not part of the model, e.g. model.layers.2.mlp.gate.weight" in caplog.text
    stream.check_finite()


def drop(pattern):
    def change(tensors):
        del tensors[next(key for key in tensors if re.search(pattern, key))]

    return change


@pytest.mark.parametrize(
    "arch, pattern, message",
    [
        ("qwen3_moe", r"^model\.norm\.weight", "no shard has model.norm.weight"),
        ("qwen3_moe", r"layers\.1\.mlp\.experts\.5\.up_proj", r"experts\.5\.up_proj\.weight for model\.layers\.1\.mlp"),
        ("mixtral", r"layers\.0.*experts\.3\.w2", r"experts\.3\.w2\.weight for model\.layers\.0\.mlp.*1 of 4 experts"),
        (
            "deepseek_v3",
            r"e_score_correction_bias",
            r"no shard has model\.layers\.1\.mlp\.gate\.e_score_correction_bias",
        ),
        ("qwen3_moe_tied", r"embed_tokens", "no shard has model.embed_tokens.weight"),
    ],
)
def test_missing_tensor_is_named(tmp_path, arch, pattern, message):
    save_tiny_model(tmp_path, arch)
    rewrite(tmp_path / "model.safetensors", drop(pattern))
    with pytest.raises(CheckpointError, match=message):
        open_stream(tmp_path)


def test_tensor_of_another_shape_is_named(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe")
    edit_json(tmp_path / "config.json", moe_intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.\w+ is \(8, .*config.json"):
        open_stream(tmp_path)


def test_experts_of_different_shapes_are_named(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe")
    rewrite(
        tmp_path / "model.safetensors",
        lambda tensors: tensors.update({"model.layers.0.mlp.experts.3.up_proj.weight": torch.zeros(31, 64)}),
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj cannot be fused"):
        open_stream(tmp_path)


@pytest.mark.parametrize("dtype, name", [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")])
def test_stored_dtype_that_is_not_supported_is_named(tmp_path, dtype, name):
    save_tiny_model(tmp_path, "mixtral")
    key = "model.layers.0.self_attn.q_proj.weight"
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)} is stored as {name}.*convert"):
        open_stream(tmp_path)


def sharded(folder: Path) -> list[Path]:
    save_tiny_model(folder, "qwen3_moe", max_shard_size="100KB")
    return sorted(folder.glob("*.safetensors"))


def test_missing_shard_is_named(tmp_path):
    shard = sharded(tmp_path)[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_stream(tmp_path)


@pytest.mark.parametrize("length", [-10, 100, 4, 0], ids=["data", "header", "length", "empty"])
def test_truncated_shard_is_named(tmp_path, length):
    shard = sharded(tmp_path)[1]
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated or damaged"):
        open_stream(tmp_path)


def test_shard_without_a_tensor_of_the_index_is_named(tmp_path):
    shard = sharded(tmp_path)[1]
    key = next(iter(load_file(shard)))
    rewrite(shard, drop(re.escape(key)))
    with pytest.raises(CheckpointError, match=f"{shard.name} lacks {re.escape(key)}"):
        open_stream(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_index(tmp_path, content):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index.json cannot be read"):
        open_stream(tmp_path)


def test_folder_without_weights_or_config(tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        open_stream(tmp_path)
    tiny_model("mixtral").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        open_stream(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        open_stream(tmp_path)


@pytest.mark.parametrize("quantization, name", [({"quant_method": "awq"}, "awq"), ({"bits": 4}, "an unnamed method")])
def test_quantized_model_is_refused(tmp_path, quantization, name):
    save_tiny_model(tmp_path, "qwen3_moe")
    edit_json(tmp_path / "config.json", quantization_config=quantization)
    with pytest.raises(CheckpointError, match=f"already quantized by {name}"):
        open_stream(tmp_path)


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)


@pytest.mark.parametrize(
    "config, message",
    [
        (LlamaConfig(**SMALL), "dense"),
        (tiny_config("jetmoe"), "jetmoe.*JetMoeParallelExperts.*interface"),
        (T5Config(), "t5 is no causal language model"),
    ],
    ids=["dense", "jetmoe", "t5"],
)
def test_unsupported_model_is_refused_before_its_shards_are_looked_for(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        open_stream(tmp_path)


@pytest.mark.parametrize("changes", [{"model_type": "unheard_of"}, {"model_type": None}, {"hidden_size": "wide"}])
def test_unknown_model_type_is_refused(tmp_path, changes):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match="describes no model that transformers knows"):
        open_stream(tmp_path)


def test_packed_names_that_an_old_transformers_would_convert_are_refused(monkeypatch):
    """5.4 has no way to take its conversions out, and transposes the experts of one model but not of the other."""
    monkeypatch.delattr(HfQuantizer, "update_weight_conversions", raising=False)
    kept, converted = (auto_class(c).from_config(c) for c in map(tiny_config, ("qwen3_moe", "qwen3_vl_moe")))
    check_names_are_kept(kept, ["model.layers.0.mlp.experts.gate_up_proj"])
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(UnsupportedModelError, match=f"would convert the packed {name}.*upgrade transformers"):
        check_names_are_kept(converted, [name])


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    """Old DeepSeek checkpoints bring modelling code; transformers' own is used."""
    save_tiny_model(tmp_path, "deepseek_v2")
    edit_json(
        tmp_path / "config.json",
        auto_map={"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    )
    (tmp_path / "custom.py").write_text("raise RuntimeError('this must not be run')")
    assert type(open_stream(tmp_path).model).__module__.startswith("transformers.models.deepseek_v2.")


def test_model_folder(tmp_path):
    assert resolve_model_folder(str(tmp_path)) == tmp_path


def test_hub_model_offline_says_to_pass_a_folder():
    with pytest.raises(CheckpointError, match="no local folder kbvq-tests/absent.*pass a local folder"):
        resolve_model_folder("kbvq-tests/absent")


def test_hub_download_takes_no_pickles(monkeypatch, tmp_path):
    called = {}

    def download(name, **patterns):
        called.update(name=name, **patterns)
        return str(tmp_path)

    monkeypatch.setattr(layer_stream, "snapshot_download", download)
    assert resolve_model_folder("owner/name-1.5B") == tmp_path
    assert called["name"] == "owner/name-1.5B"
    assert {"*.safetensors", "*.json"} <= set(called["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".pt", ".pth", "*")) for pattern in called["allow_patterns"])


def test_what_is_neither_folder_nor_hub_name(tmp_path):
    (tmp_path / "file").touch()
    for name in (str(tmp_path / "absent"), str(tmp_path / "file"), "./absent", "a/b/c"):
        with pytest.raises(CheckpointError, match="neither a folder nor a model name"):
            resolve_model_folder(name)
