import json
import shutil
from collections import namedtuple

import pytest
import torch
from packed_banks import random_bank
from safetensors.torch import load_file

import kbvq.storage.files
from kbvq.errors import CheckpointError
from kbvq.storage.checkpoint import (
    PackedCheckpointWriter,
    check_disk_space,
    inspect_checkpoint,
    read_headers,
    verify_checkpoint,
)
from kbvq.structures import PROJECTIONS, BankFormat

SOURCE_CONFIG = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "dtype": "bfloat16"}
SHARDS = (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["model.safetensors"])


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(f"{name} of the source")
    (folder / "modeling_custom.py").write_text("raise SystemExit")
    (folder / "model.safetensors").write_text("not to be copied")
    return folder


def banks():
    return [
        random_bank("model.layers.0.mlp.experts", "routed", 3, 32, 16, seed=0, codebook_size=4096, has_scale=True),
        random_bank("model.layers.1.mlp.experts", "routed", 2, 32, 16, seed=1, rank=2, factor_dtype="int8"),
        random_bank("model.layers.1.mlp.shared_expert", "shared", 1, 32, 24, seed=2, rank=1, has_bias=True),
    ]


def others():
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(5, 7, generator=generator).bfloat16() for name in ("model.norm.weight", "lm_head.weight")}


def quantization_config(formats):
    return {"quant_method": "kbvq", "format_version": 1, "banks": [bank.to_dict() for bank in formats]}


def start(folder, shards=2):
    """A writer that has written all tensors, not finished."""
    writer = PackedCheckpointWriter(folder, num_shards=shards)
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: tensor for bank in banks() for name, tensor in bank.state_dict().items()}
    for index, tensors in enumerate([packed, others()] if shards == 2 else [packed | others()]):
        writer.write_shard(index, tensors)
    return writer


def finish(writer, source, config=SOURCE_CONFIG, **options):
    formats = [bank.format for bank in banks()]
    writer.finish(config, quantization_config(formats), formats, source, {"seed": 1}, **options)


def write(folder, source, **options):
    finish(start(folder, **options), source)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shards", SHARDS, ids=len)
def test_shards_hold_every_tensor_unchanged(tmp_path, source, shards):
    out = write(tmp_path / "out", source, shards=len(shards))
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    stored = {name: tensor for shard in shards for name, tensor in load_file(out / shard).items()}
    expected = others() | {name: tensor for bank in banks() for name, tensor in bank.state_dict().items()}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    index = out / "model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1)
    if index.exists():
        data = json.loads(index.read_text())
        assert data["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert all(name in load_file(out / file) for name, file in data["weight_map"].items())
        assert data["weight_map"].keys() == expected.keys()


def test_folder_holds_config_tokenizer_and_record_and_no_code(tmp_path, source):
    out = write(tmp_path / "out", source)
    config = json.loads((out / "config.json").read_text())
    assert config == SOURCE_CONFIG | {"quantization_config": quantization_config([bank.format for bank in banks()])}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_text() == f"{name} of the source"
    assert json.loads((out / "kbvq_run.json").read_text()) == {"seed": 1}
    assert not (out / "modeling_custom.py").exists()
    assert not [path for path in tmp_path.iterdir() if path not in (out, source)]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_equal_inputs_give_identical_files_whatever_the_timing(tmp_path, source):
    finish(start(tmp_path / "one"), source, unhashed={"kbvq_timing.json": {"total_seconds": 1.0}})
    finish(start(tmp_path / "two"), source, unhashed={"kbvq_timing.json": {"total_seconds": 2.0}})
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.pop("kbvq_timing.json") != two.pop("kbvq_timing.json")
    assert one == two
    assert "kbvq_timing.json" not in json.loads(one["kbvq_manifest.json"])["files"]


def test_tensor_written_twice_is_refused(tmp_path, source):
    writer = start(tmp_path / "out")
    writer.write_shard(0, {"lm_head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is written twice"):
        finish(writer, source)


def test_failed_write_names_the_file_and_leaves_nothing_under_its_name(tmp_path, monkeypatch):
    def full(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(kbvq.storage.files, "save_file", full)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors.*No space left"):
        start(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_finishing_again_after_an_interruption_gives_the_same_files(tmp_path, source):
    writer = start(tmp_path / "out")
    finish(writer, source)
    before = files(tmp_path / "out")
    (tmp_path / "out" / "kbvq_manifest.json").unlink()
    (tmp_path / "out" / "config.json").write_text("{")
    finish(PackedCheckpointWriter(tmp_path / "out", num_shards=2), source)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["missing", "shape", "dtype"])
def test_bank_that_was_not_written_as_its_format_says_is_refused(tmp_path, source, damage):
    bank = banks()[0]
    tensors, name = bank.state_dict(), "model.layers.0.mlp.experts.down_proj_codebook"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][..., :2] if damage == "shape" else tensors[name].float()
    writer = PackedCheckpointWriter(tmp_path, num_shards=1)
    writer.write_shard(0, tensors)
    with pytest.raises(CheckpointError, match=name):
        writer.finish({}, {}, [bank.format], source, {})
    assert not (tmp_path / "kbvq_manifest.json").exists()


@pytest.mark.parametrize("shards", SHARDS, ids=len)
def test_headers_describe_the_stored_tensors(tmp_path, source, shards):
    out = write(tmp_path / "out", source, shards=len(shards))
    stored = {name: tensor for shard in shards for name, tensor in load_file(out / shard).items()}
    assert read_headers(out) == {name: (t.dtype, tuple(t.shape), t.nbytes) for name, t in stored.items()}


def test_inspect_reports_the_bytes_on_disk_and_they_are_those_of_the_format(tmp_path, source):
    out = write(tmp_path / "out", source)
    stored = {name: tensor for shard in SHARDS[0] for name, tensor in load_file(out / shard).items()}
    packed = {name: tensor for name, tensor in stored.items() if name not in others()}
    summary = inspect_checkpoint(out)

    # Weights replaced: (gate and up + down) of each expert.
    weights = 3 * (32 * 32 + 32 * 16) + 2 * (32 * 32 + 32 * 16) + (48 * 32 + 32 * 24)
    codes = [tensor for name, tensor in packed.items() if name.endswith(("gate_up_proj", "down_proj"))]
    assert summary["bits_per_weight"] == 8 * sum(t.nbytes for t in packed.values()) / weights
    assert summary["code_bits"] == 8 * sum(t.nbytes for t in codes) / weights
    assert summary["model_bytes"] == sum(t.nbytes for t in stored.values())

    formats = [BankFormat.from_dict(bank.format.to_dict()) for bank in banks()]
    assert [(bank["path"], bank["kind"]) for bank in summary["banks"]] == [(f.path, f.kind) for f in formats]
    for bank, format in zip(summary["banks"], formats, strict=True):
        for projection in PROJECTIONS:
            expected = getattr(format, projection)
            entry = bank[projection]
            assert (entry["bytes"], entry["code_bytes"]) == (expected.num_bytes, expected.code_bytes)
            assert entry["bits_per_weight"] == 8 * expected.num_bytes / expected.num_weights
            assert entry["code_bits"] == 8 * expected.code_bytes / expected.num_weights
            assert (entry["codebook"], entry["rank"]) == (expected.codebook, expected.rank)
    assert json.loads(json.dumps(summary)) == summary


def test_inspect_refuses_what_is_not_a_packed_checkpoint(tmp_path, source):
    out = write(tmp_path / "out", source)
    config = json.loads((out / "config.json").read_text())
    for changed, message in [
        (SOURCE_CONFIG, "not a packed checkpoint"),
        (SOURCE_CONFIG | {"quantization_config": None}, "not a packed checkpoint"),
        (SOURCE_CONFIG | {"quantization_config": {"quant_method": "gptq"}}, "not a packed checkpoint"),
        (config | {"quantization_config": config["quantization_config"] | {"format_version": 99}}, "version 99"),
    ]:
        (out / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            inspect_checkpoint(out)
    (out / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        inspect_checkpoint(out)


def test_verify_counts_files_and_bytes(tmp_path, source):
    out = write(tmp_path / "out", source)
    hashed = [path for path in out.iterdir() if path.name != "kbvq_manifest.json"]
    expected = {"files": len(hashed), "bytes": sum(path.stat().st_size for path in hashed)}
    assert verify_checkpoint(out) == expected


@pytest.mark.parametrize("name", [SHARDS[0][0], SHARDS[0][1], "config.json", "tokenizer.json", "kbvq_run.json"])
def test_verify_names_the_damaged_file(tmp_path, source, name):
    out = write(tmp_path / "out", source)
    content = (out / name).read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 1
    for damaged in (bytes(flipped), content[:-1], content + b" ", b""):
        (out / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            verify_checkpoint(out)
    (out / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify_checkpoint(out)


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"files": 3}'])
def test_verify_without_a_usable_manifest(tmp_path, source, manifest):
    out = write(tmp_path / "out", source)
    (out / "kbvq_manifest.json").unlink()
    if manifest is not None:
        (out / "kbvq_manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"kbvq_manifest\.json"):
        verify_checkpoint(out)


def test_damaged_shards_are_named(tmp_path, source):
    out = write(tmp_path / "out", source)
    shard = out / SHARDS[0][1]
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

    def file_with(header, data=8):
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + bytes(data)

    for damaged in (
        content[:-1],
        content + b"\0",
        content[: 8 + length // 2],
        content[:5],
        b"",
        bytes(64),
        b"\xff" * 64,
        file_with([1, 2]),
        file_with({"x": 1}),
        file_with({"x": entry | {"dtype": "F13"}}),
        file_with({"x": entry | {"data_offsets": [0]}}),
        file_with({"x": entry | {"data_offsets": ["0", "8"]}}),
        file_with({"x": entry | {"shape": [3]}}),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=shard.name):
            read_headers(out)
    shard.write_bytes(file_with({"x": entry}))  # the same helper, undamaged: what is left is a contradicted index
    with pytest.raises(CheckpointError, match=r"the index lists lm_head\.weight"):
        read_headers(out)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        read_headers(out)


def test_tensor_in_two_shards_is_refused(tmp_path, source):
    out = write(tmp_path / "out", source)
    shutil.copyfile(out / SHARDS[0][0], out / SHARDS[0][1])
    with pytest.raises(CheckpointError, match="stored in another shard too"):
        read_headers(out)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "3"])
def test_unusable_index_is_named(tmp_path, source, index):
    out = write(tmp_path / "out", source)
    (out / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_headers(out)


def test_folder_without_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        read_headers(tmp_path)


def test_disk_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    check_disk_space(tmp_path / "not" / "yet", 1_000)
    with pytest.raises(CheckpointError, match="1,001 bytes.*1,000 free"):
        check_disk_space(tmp_path / "not" / "yet", 1_001)
