"""What a damaged or malicious checkpoint meets: a refusal by name before anything is computed."""

import json

import crafted_files
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kbvq.errors import CheckpointError, ConfigError
from kbvq.storage.checkpoint import read_file_headers
from kbvq.structures import BankFormat, ProjectionFormat

FILES = 200
BANK = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return crafted_files.make_checkpoints(tmp_path_factory.mktemp("crafted"))


@pytest.fixture
def quiet():
    """transformers' report of loading, which the script turns off for good, as it was."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def test_damaged_files_are_refused_or_run(checkpoints, tmp_path, quiet):
    counts, faults = crafted_files.run(checkpoints, tmp_path / "work", FILES, seed=1)
    assert not faults
    assert sum(counts.values()) == FILES
    assert all(counts[kind, "refused"] for kind in ("bytes", "header", "tensor", "format"))
    assert counts["tensor", "ran"]  # most contents are legal: what is run must be run, not turned away


def change(folder, name, change_):
    """Rewrite the tensor `name` of a packed checkpoint; returns a function that mends it."""
    path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    before, tensors = path.read_bytes(), load_file(path)
    change_(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    return lambda: path.write_bytes(before)


@pytest.mark.parametrize(
    ("format", "tensor", "value", "message"),
    [
        ("rq-grouped", "gate_up_proj_groups", 255, r"in \[0, 255\], its format says \[0, 4\]"),
        ("rq-grouped", "down_proj_groups", 5, r"its format says \[0, 4\]"),
        ("rq-grouped, 12 bits", "down_proj_groups", 3, r"its format says \[0, 2\]"),
        ("rq-grouped", "down_proj_codebook", -128, r"its format says \[-127, 127\]"),
        ("signed", "gate_up_proj_codebook", -1, r"its format says \[0, 127\]"),
        ("trellis", "gate_up_proj_scale", float("nan"), "NaN or infinite"),
        ("rq", "gate_up_proj_codebook", float("inf"), "NaN or infinite"),
        ("rq-moe", "down_proj_network", float("nan"), "NaN or infinite"),
        ("rq-moe", "down_proj_codebook", -128, r"its format says \[-127, 127\]"),
    ],
)
def test_a_value_that_its_format_does_not_allow_is_refused_at_load(checkpoints, format, tensor, value, message):
    mend = change(checkpoints[format], f"{BANK}.{tensor}", lambda t: t.view(-1)[-1:].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{BANK}.{tensor} holds values .*{message}"):
        AutoModelForCausalLM.from_pretrained(checkpoints[format])
    mend()
    AutoModelForCausalLM.from_pretrained(checkpoints[format])


def test_groups_that_were_changed_after_loading_are_refused_by_the_kernels(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["rq-grouped"])
    with torch.no_grad():
        model(torch.arange(4)[None])
        model.get_submodule(BANK).gate_up_proj_groups.fill_(255)
        with pytest.raises(ValueError, match="groups holds 255, the format has 5"):
            model(torch.arange(4)[None])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 4.0, "num_experts must be of type int, not 4.0"),
        ("vector_dim", 0, "vector_dim must be at least 1, not 0"),
        ("rank", -1, "rank must be at least 0"),
        ("signed", 1, "signed must be of type bool"),
        ("codebook", ["vq"], "codebook must be of type str"),
        ("num_codebooks", True, "num_codebooks must be of type int"),
    ],
)
def test_fields_of_another_type_are_refused(field, value, message):
    fields = ProjectionFormat(4, 16, 16, "vq", 4, 256).to_dict()
    with pytest.raises(ConfigError, match=message):
        ProjectionFormat(**fields | {field: value})


@pytest.mark.parametrize("path", ["", "model..experts", 3])
def test_a_path_that_names_no_module_is_refused(path):
    fields = ProjectionFormat(4, 16, 16, "vq", 4, 256)
    with pytest.raises(ConfigError, match="must name a module"):
        BankFormat(path, "routed", fields, fields)


def test_an_activation_without_a_kernel_is_served_in_plain_torch_and_says_so(checkpoints, caplog):
    path = checkpoints["vq"] / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"hidden_act": "tanh"}))
    with caplog.at_level("WARNING", logger="kbvq"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints["vq"])
    path.write_text(before)
    assert "gating that no kernel knows" in caplog.text
    assert model(torch.arange(4)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"U8","shape":[-2,-2],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}',
        "[" * 100_000,
    ],
    ids=["negative", "overlap", "repeated", "fraction", "gap", "nested"],
)
def test_header_that_lies_about_its_tensors_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_file_headers([path])
