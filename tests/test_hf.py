import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from load_in_fresh_process import outputs
from packed_banks import put_banks_, random_bank, write_packed
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, save_tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3MoeForCausalLM

from kbvq.errors import CheckpointError, ConfigError
from kbvq.models.moe_adapters import find_expert_banks
from kbvq.serving import hf
from kbvq.serving.packed_experts import PackedBankModule
from kbvq.storage.checkpoint import inspect_checkpoint, read_headers

TESTS = Path(__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Between them, every option of the format; None stands for one codebook per expert.
OPTIONS = {
    "mixtral": {"codebook_size": 4096, "has_scale": True},
    "qwen2_moe": {"codebook": "rq", "num_stages": 2, "has_scale": True, "has_bias": True},
    "qwen3_moe": {"rank": 4, "factor_dtype": "int8", "has_scale": True, "has_bias": True},
    "qwen3_moe_tied": {},
    "olmoe": {"num_codebooks": None, "rank": 2},
    "deepseek_v2": {"codebook": "rq", "num_stages": 2, "vector_dim": 8, "has_bias": True},
    "deepseek_v3": {"codebook_size": 4096, "num_codebooks": None, "rank": 3, "factor_dtype": "int8", "has_scale": True},
}


def random_banks(arch, model):
    options = OPTIONS[arch]
    return [
        random_bank(
            bank.path,
            bank.kind,
            bank.num_experts,
            bank.hidden_size,
            bank.intermediate_size,
            seed=seed,
            **{name: bank.num_experts if value is None else value for name, value in options.items()},
        )
        for seed, bank in enumerate(find_expert_banks(model))
    ]


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=TESTS.parent)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folder with a packed checkpoint per architecture, and what its model computed in this process before saving.

    {arch: folder}, {(arch, dtype): outputs}
    """
    root = tmp_path_factory.mktemp("packed")
    folders, expected = {}, {}
    for arch in ARCHITECTURES:
        source, folders[arch] = root / "source" / arch, root / arch
        save_tiny_model(source, arch, dtype=torch.bfloat16)
        for name, dtype in DTYPES.items():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            before = outputs(model)
            banks = random_banks(arch, model)
            put_banks_(model, banks)
            expected[arch, name] = outputs(model)
            assert not torch.equal(expected[arch, name]["logits"], before["logits"])
            if name == "bfloat16":
                write_packed(source, folders[arch], model, banks)
    return folders, expected


@pytest.fixture(scope="module")
def loaded(packed, tmp_path_factory):
    """{(arch, options): outputs} of the packed checkpoints, all loaded by one fresh process."""
    folders, _ = packed
    root = tmp_path_factory.mktemp("loaded")
    cases = {}
    for arch, folder in folders.items():
        for dtype in DTYPES:
            cases[arch, dtype] = {"folder": str(folder), "options": {"dtype": dtype}}
        cases[arch, "auto"] = {"folder": str(folder), "options": {"device_map": "auto"}}
        cases[arch, "saved dtype"] = {"folder": str(folder), "options": {}}
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    cases["qwen2_moe", "disk"] = {
        "folder": str(folders["qwen2_moe"]),
        "options": {
            "dtype": "float32",  # products in bfloat16 may depend on where the weights lie, here in mapped files
            "device_map": parts | {"model.layers.0": "cpu", "model.layers.1": "disk"},
            "offload_folder": str(root / "offload"),
            "offload_buffers": True,
        },
    }
    for number, case in enumerate(cases.values()):
        case["result"] = str(root / f"{number}.safetensors")
    (root / "cases.json").write_text(json.dumps(list(cases.values())))
    process = run(TESTS / "load_in_fresh_process.py", root / "cases.json")
    assert process.returncode == 0, process.stderr
    return {key: load_file(case["result"]) for key, case in cases.items()}


def assert_same(actual, expected):
    assert actual["logits"].dtype == expected["logits"].dtype
    assert torch.equal(actual["logits"], expected["logits"])
    assert torch.equal(actual["tokens"], expected["tokens"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fresh_process_computes_the_same_bits_as_before_saving(packed, loaded, arch, dtype):
    assert_same(loaded[arch, dtype], packed[1][arch, dtype])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_device_map_auto_and_the_saved_dtype(packed, loaded, arch):
    assert_same(loaded[arch, "auto"], packed[1][arch, "bfloat16"])
    assert_same(loaded[arch, "saved dtype"], packed[1][arch, "bfloat16"])


def test_layers_offloaded_to_disk(packed, loaded):
    assert_same(loaded["qwen2_moe", "disk"], packed[1]["qwen2_moe", "float32"])


def test_packed_buffers_keep_their_dtype_and_contents_whatever_the_dtype_of_the_model(packed):
    folder = packed[0]["qwen3_moe"]
    stored = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = {path: module for path, module in model.named_modules() if isinstance(module, PackedBankModule)}
    assert modules.keys() == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    for path, module in modules.items():
        for name, buffer in module.named_buffers():
            assert buffer.dtype == stored[f"{path}.{name}"].dtype
            assert torch.equal(buffer, stored[f"{path}.{name}"])


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe_tied", "deepseek_v3"])
def test_saving_a_loaded_model_with_transformers_and_loading_it_again(packed, tmp_path, arch):
    folders, expected = packed
    AutoModelForCausalLM.from_pretrained(folders[arch]).save_pretrained(tmp_path)
    assert read_headers(tmp_path) == read_headers(folders[arch])
    assert inspect_checkpoint(tmp_path) == inspect_checkpoint(folders[arch])
    assert_same(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), expected[arch, "bfloat16"])


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_without_importing_kbvq_the_load_fails(packed, arch):
    folder = str(packed[0][arch])
    process = run(
        "-c", f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({folder!r})"
    )
    assert process.returncode != 0
    assert "Unknown quantization type, got kbvq" in process.stderr
    for projection in ("gate_up_proj", "down_proj"):
        mismatched = [line for line in process.stderr.splitlines() if f"mlp.experts.{projection} " in line]
        assert mismatched and all("MISMATCH" in line for line in mismatched)


def test_import_loads_neither_triton_nor_cuda():
    check = "import sys, kbvq, torch; assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    process = run("-c", check)
    assert process.returncode == 0, process.stderr


@pytest.fixture
def damaged(packed, tmp_path):
    """A function that loads the packed Qwen2-MoE after `change` was applied to its tensors and config."""

    def load(change, model_class=AutoModelForCausalLM):
        folder = tmp_path / "damaged"
        shutil.copytree(packed[0]["qwen2_moe"], folder)
        tensors = {}
        for shard in folder.glob("*.safetensors"):
            tensors |= load_file(shard)
            shard.unlink()
        (folder / "model.safetensors.index.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return model_class.from_pretrained(folder)

    return load


def test_undamaged_copy_loads(packed, damaged):
    assert_same(outputs(damaged(lambda tensors, config: None)), packed[1]["qwen2_moe", "bfloat16"])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj_codebook",
        "model.layers.1.mlp.shared_expert.down_proj_bias",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "lm_head.weight",
    ],
)
def test_missing_or_misshapen_tensor_is_named(damaged, name, tmp_path):
    with pytest.raises(CheckpointError, match=rf"{name} .*is missing"):
        damaged(lambda tensors, config: tensors.pop(name))
    shutil.rmtree(tmp_path / "damaged")
    with pytest.raises(CheckpointError, match=rf"{name} is stored as"):
        damaged(lambda tensors, config: tensors.update({name: tensors[name][..., :-1].contiguous()}))


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_packed_tensor_of_another_dtype_is_named(damaged, dtype):
    name = "model.layers.0.mlp.experts." + ("gate_up_proj" if dtype == torch.int16 else "gate_up_proj_codebook")
    with pytest.raises(CheckpointError, match=rf"{name} is stored as .*{dtype}"):
        damaged(lambda tensors, config: tensors.update({name: tensors[name].to(dtype)}))


def test_tied_weights_need_their_source(packed, tmp_path):
    folder = shutil.copytree(packed[0]["qwen3_moe_tied"], tmp_path / "tied")
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert "lm_head.weight" not in tensors
    for path in folder.glob("model*"):
        path.unlink()
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight .*is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_config_that_contradicts_the_banks_is_refused(damaged):
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts: config\.json makes gate_up_proj \[4, "):
        damaged(lambda tensors, config: config.update(num_experts=4))


def test_bank_at_a_path_without_experts_is_refused(damaged):
    def change(tensors, config):
        for bank in config["quantization_config"]["banks"]:
            path, bank["path"] = bank["path"], bank["path"].replace("layers.1", "layers.7")
            for name in [name for name in tensors if name.startswith(path + ".")]:
                tensors[name.replace(path, bank["path"])] = tensors.pop(name)

    with pytest.raises(CheckpointError, match=r"no routed experts at model\.layers\.7\.mlp\.experts"):
        damaged(change)


def test_other_model_class_is_told_which_one_to_use(damaged):
    with pytest.raises(CheckpointError, match="load the checkpoint as Qwen2MoeForCausalLM"):
        damaged(lambda tensors, config: None, AutoModel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, .* upgrade kbvq"),
        ({"format_version": None}, "format version None"),
        ({"surprise": 1}, r"unknown fields \['surprise'\]; upgrade kbvq"),
    ],
)
def test_quantization_config_of_another_version_is_refused(damaged, changes, message):
    with pytest.raises(ConfigError, match=message):
        damaged(lambda tensors, config: config["quantization_config"].update(changes))


def test_bank_with_unknown_fields_is_refused(damaged):
    with pytest.raises(ConfigError, match="bank this version cannot read"):
        damaged(lambda tensors, config: config["quantization_config"]["banks"][0]["down_proj"].update(surprise=1))


def test_state_dict_instead_of_files_is_refused(packed):
    folder = packed[0]["qwen3_moe"]
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"loaded from its \.safetensors files"):
        Qwen3MoeForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_quantizing_on_the_fly_is_refused(tmp_path):
    save_tiny_model(tmp_path, "qwen3_moe")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=hf.KbvqConfig(format_version=1))


def test_registering_again_changes_nothing(packed):
    hf.register()
    importlib.reload(hf)
    assert_same(
        outputs(AutoModelForCausalLM.from_pretrained(packed[0]["qwen3_moe"])), packed[1]["qwen3_moe", "bfloat16"]
    )
