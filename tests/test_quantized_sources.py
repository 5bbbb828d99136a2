"""Checkpoints published in FP8 and MXFP4, in the hub's layout, against what transformers itself reads from them."""

import json

import moe_families
import pytest
import torch
from quantizing import quantize
from safetensors.torch import load_file, save_file
from test_layer_stream import assert_streams_like_the_whole_model, open_stream
from tiny_models import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from kbvq.errors import CheckpointError, NumericalError
from kbvq.models.stored_tensors import decode_fp8
from kbvq.quantization.pipeline import QuantizeOptions, dry_run
from kbvq.recipes import make_recipe
from kbvq.storage.checkpoint import inspect_checkpoint

WIDE = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=128, kv_lora_rank=128)
WIDE |= dict(qk_rope_head_dim=128, qk_nope_head_dim=128, v_head_dim=128)
"""Whole blocks of 128 everywhere: transformers' own decoding, of some versions, wants them."""


def rewrite(folder, quantization, change):
    """Apply `change` to the tensors of a folder, and give its config a quantization_config."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def encode_fp8(weight, block):
    """(values, scales) of the published layout: the largest of a block becomes 448."""
    rows, columns = weight.shape
    grid = [[weight[i : i + block, j : j + block] for j in range(0, columns, block)] for i in range(0, rows, block)]
    scales = torch.stack([torch.stack([part.float().abs().max() / 448 for part in row]) for row in grid])
    values = [
        torch.cat([part.float() / s for part, s in zip(*row, strict=True)], 1) for row in zip(grid, scales, strict=True)
    ]
    return torch.cat(values).to(torch.float8_e4m3fn), scales


def save_fp8(folder, arch="deepseek_v3", block=128, **changes):
    """A tiny model as DeepSeek-V3 is published: every Linear of the layers but routers in FP8."""
    save_tiny_model(folder, arch, dtype=torch.bfloat16, **(WIDE | changes))

    def change(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight") or "_proj_with_mqa.weight" in name]:
            tensors[name], tensors[f"{name}_scale_inv"] = encode_fp8(tensors[name], block)

    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    rewrite(folder, method | {"weight_block_size": [block, block]}, change)


def save_mxfp4(folder):
    """A tiny gpt-oss as it is published: the experts' weights in MXFP4, transposed against those of the model."""
    generator = torch.Generator().manual_seed(0)
    moe_families.tiny_model(moe_families.tiny_config("gpt_oss"), dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def change(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            shape = experts, rows, columns // 32
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(119, 124, shape, generator=generator, dtype=torch.uint8)

    rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, change)


SAVED = {"fp8": save_fp8, "mxfp4": save_mxfp4}


@pytest.mark.parametrize("scheme", SAVED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_streams_what_transformers_decodes(tmp_path, scheme):
    SAVED[scheme](tmp_path)
    assert_streams_like_the_whole_model(tmp_path, torch.bfloat16)
    # In float32 transformers leaves what it does not decode in bfloat16, so only the values are compared.
    model, stream = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), open_stream(tmp_path)
    for index in range(stream.num_layers):
        with stream.layer(index) as layer:
            expected = model.model.layers[index].state_dict()
            assert layer.state_dict().keys() == expected.keys()
            for name, tensor in layer.state_dict().items():
                assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name].float()), name


def test_fused_experts_in_fp8(tmp_path):
    """As transformers itself saves them: all experts of a layer in one tensor, and one of scales."""
    save_fp8(tmp_path)
    expected = open_stream(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    (tmp_path / "fused").mkdir()
    values, scales = {}, {}
    for name, weight in model.model.layers[1].mlp.experts.named_parameters():
        pairs = [encode_fp8(expert, 128) for expert in weight]
        values[f"model.layers.1.mlp.experts.{name}"] = torch.stack([pair[0] for pair in pairs])
        scales[f"model.layers.1.mlp.experts.{name}_scale_inv"] = torch.stack([pair[1] for pair in pairs])
    rest = {n: tensor for n, tensor in load_file(tmp_path / "model.safetensors").items() if ".experts." not in n}
    save_file(rest | values | scales, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    with open_stream(tmp_path / "fused").layer(1) as fused, expected.layer(1) as separate:
        for name in ("gate_up_proj", "down_proj"):
            torch.testing.assert_close(getattr(fused.mlp.experts, name), getattr(separate.mlp.experts, name))


@pytest.mark.parametrize("block", [(4, 6), (3, 5), (128, 128), None])
def test_blocks_that_end_with_the_matrix(block):
    """Each weight by the scale of its block, taken one by one."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 10, 13, generator=generator).to(torch.float8_e4m3fn)
    b, c = block or (10, 13)
    scales = torch.rand(2, -(-10 // b), -(-13 // c), generator=generator)
    decoded = decode_fp8(values, scales if block else scales[:, 0, 0], block=block, dtype=torch.float32)
    for e in range(2):
        for i in range(10):
            for j in range(13):
                assert decoded[e, i, j] == values[e, i, j].float() * scales[e, i // b, j // c]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scheme", SAVED)
def test_quantized_from_it(tmp_path, text, scheme):
    """The output is a plain packed checkpoint, of the size that the dry run says."""
    source, packed = tmp_path / "source", tmp_path / "packed"
    SAVED[scheme](source)
    recipe = make_recipe("paper", 2, kmeans_iterations=1)
    options = {"samples": 2, "sequence_length": 16, "device": "cpu"}
    plan = dry_run(QuantizeOptions(str(source), packed, str(text), recipe, **options))
    assert plan.source_bytes == sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    quantize(source, packed, text, recipe, **options)
    assert inspect_checkpoint(packed)["model_bytes"] == plan.output_bytes
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "kbvq"
    assert "weight_block_size" not in config["quantization_config"]
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for name, weight in original.named_parameters():
        if "mlp" not in name:
            assert torch.equal(loaded.get_parameter(name), weight), name
    assert torch.isfinite(loaded(torch.arange(3, 12)[None]).logits).all()


def test_what_does_not_fit_is_named(tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    scales = f"{name}_scale_inv"
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}

    def changed(change, **other):
        save_fp8(tmp_path, num_hidden_layers=2)
        rewrite(tmp_path, quantization | other, change)
        return open_stream(tmp_path)

    with pytest.raises(CheckpointError, match=f"has {scales} and no shard has {name}"):
        changed(lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"is \[2, 2\], blocks of \[64, 64\] of .* \[256, 256\] need \[4, 4\]"):
        changed(lambda tensors: None, weight_block_size=[64, 64])
    with pytest.raises(CheckpointError, match=f"{name} is stored as BF16; kbvq reads F8_E4M3"):
        changed(lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    with pytest.raises(CheckpointError, match=rf"{name} is stored as F8_E4M3; kbvq reads F32"):
        changed(lambda tensors: tensors.pop(scales))
    with pytest.raises(CheckpointError, match="weight_block_size \\[128\\] is not two sizes"):
        changed(lambda tensors: None, weight_block_size=[128])
    with pytest.raises(CheckpointError, match="already quantized by gptq; pass the original.*FP8 or MXFP4"):
        changed(lambda tensors: None, quant_method="gptq")

    def spoil(tensors):
        tensors[name].view(torch.uint8)[3, 5] = 0x7F

    with pytest.raises(NumericalError, match=f"{name} in .*model.safetensors contains NaN"):
        changed(spoil).check_finite()


def test_mxfp4_of_another_shape_is_named(tmp_path):
    save_mxfp4(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj_scales"

    def cut(tensors):
        tensors[name] = tensors[name][..., :0].contiguous()

    rewrite(tmp_path, {"quant_method": "mxfp4"}, cut)
    with pytest.raises(CheckpointError, match=rf"down_proj_blocks \[4, 64, 3, 16\] and {name} \[4, 64, 0\]"):
        open_stream(tmp_path)
