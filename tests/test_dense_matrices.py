"""Attention, dense MLPs, embedding and head at 8 and 4 bits: the whole way, on tiny models."""

import copy
import json

import pytest
import torch
from decoded_models import write_decoded_
from quantizing import Stop, interrupt, quantize
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from kbvq.cli import main
from kbvq.codes.packing import dequantize_expert
from kbvq.errors import CheckpointError, ConfigError
from kbvq.models.dense_parts import find_dense_parts
from kbvq.models.moe_adapters import find_expert_banks
from kbvq.quantization.pipeline import QuantizeOptions, dry_run
from kbvq.recipes import make_recipe
from kbvq.serving.packed_experts import PackedBankModule
from kbvq.serving.packed_matrix import PackedEmbedding, PackedLinear, TiedHead
from kbvq.storage.checkpoint import inspect_checkpoint, verify_checkpoint

PROMPT = torch.arange(3, 51).view(2, 24)

CASES = {
    "tied, 4 bits": ("qwen3_moe_tied", 4, {}),
    "tied, rates by a budget, 4 bits": ("qwen3_moe_tied", 4, {"budget": True}),
    "biases and a gated shared expert, 8 bits": ("qwen2_moe", 8, {}),
    "a dense layer, 4 bits": ("deepseek_v3", 4, {}),
    "tied, tuned end to end, 8 bits": ("qwen3_moe_tied", 8, {"distillation_steps": 2}),
}


def recipe(dense_bits, **changes):
    """Without biases of experts, for which the family's own code has no place."""
    fixed = {"kmeans_iterations": 2, "budget": False, "idre": False, "bcos": False}
    return make_recipe("fast", 3, dense_bits=dense_bits, **(fixed | changes))


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def generate(model):
    return model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, text):
    """(original model, folder of the packed one, the run's record)."""
    arch, bits, changes = CASES[request.param]
    root = tmp_path_factory.mktemp("dense")
    original = save_tiny_model(root / "model", arch)
    record = quantize(root / "model", root / "packed", text, recipe(bits, **changes), samples=8)
    return original, root / "packed", record


@pytest.fixture(scope="module")
def tied(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("tied")
    save_tiny_model(root / "model", "qwen3_moe_tied")
    quantize(root / "model", root / "packed", text, recipe(8), samples=8)
    return root


def written_out(original, loaded):
    """The family's own code with every decoded weight of the loaded model written into it."""
    dense = copy.deepcopy(original)
    with torch.no_grad():
        for path, module in loaded.named_modules():
            if isinstance(module, PackedBankModule):
                write_decoded_(dense.get_submodule(path), module)
            elif isinstance(module, PackedLinear | PackedEmbedding):
                weight = dequantize_expert(module.format.weight, module.projection_tensors("weight"), 0)
                dense.get_submodule(path).weight.copy_(weight)
        for name, parameter in loaded.named_parameters():
            dense.get_parameter(name).copy_(parameter)
    return dense


def test_loaded_model_computes_with_the_decoded_weights(case):
    original, folder, record = case
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    left = {path for path, module in loaded.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    assert left == record["dense"]["left"].keys()
    expected = written_out(original, loaded)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(loaded), generate(expected))
    assert (logits(loaded) - logits(original)).abs().max() > 1e-3


def test_bits_and_bytes_are_those_on_the_disk(case):
    original, folder, record = case
    verify_checkpoint(folder)
    summary = inspect_checkpoint(folder)
    stored = sum(t.numel() * t.element_size() for f in folder.glob("*.safetensors") for t in load_file(f).values())
    weights = sum(parameter.numel() for parameter in original.parameters())
    weights += sum(b.numel() for name, b in original.named_buffers() if name.endswith("e_score_correction_bias"))
    assert (summary["model_bytes"], summary["model_weights"]) == (stored, weights)
    assert record["whole_model"] == {"bytes": stored, "weights": weights, "bits_per_weight": 8 * stored / weights}
    assert {row["path"] for row in summary["dense"]} == {row["path"] for row in record["dense"]["matrices"]}
    limit = {8: 1e-4, 4: 1e-2}[record["dense"]["bits"]]
    assert all(0 < row["relative_error"] < limit for row in record["dense"]["matrices"])
    assert all("router" in reason or "too few" in reason for reason in record["dense"]["left"].values())


def test_a_tied_matrix_is_stored_once_and_coded_for_the_heads_inputs(tmp_path, text):
    """The less its error counts in a direction, the larger it may be there; the errors are those of the definition."""
    original = save_tiny_model(tmp_path / "model", "qwen3_moe_tied", hidden_size=128)
    inputs = []
    original.lm_head.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].flatten(0, 1)))
    logits(original)
    errors = {}
    for budget in (False, True):  # without a budget nothing is known of the head when the embedding is coded
        quantize(tmp_path / "model", tmp_path / str(budget), text, recipe(4, budget=budget), samples=8)
        (packed,) = (tmp_path / str(budget)).glob("model-00001*")
        assert [name for name in load_file(packed) if "lm_head" in name or name.endswith("embed_tokens.weight")] == [
            "model.embed_tokens.weight"
        ]
        embedding = AutoModelForCausalLM.from_pretrained(tmp_path / str(budget), dtype=torch.float32).model.embed_tokens
        lost = original.lm_head.weight.detach() - embedding(torch.arange(embedding.num_embeddings))
        errors[budget] = (inputs[0] @ lost.T).square().mean() / logits(original).square().mean()
    assert errors[True] < 0.8 * errors[False], errors


def test_saved_copied_and_cast_models_compute_the_same(case, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(case[1], dtype=torch.float32)
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path)["model_bytes"] == inspect_checkpoint(case[1])["model_bytes"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), expected)
    twin = copy.deepcopy(loaded)
    twin.get_input_embeddings().weight_scale.zero_()
    assert torch.equal(logits(loaded), expected) and not torch.equal(logits(twin), expected)
    cast = logits(loaded.to(torch.bfloat16))
    assert cast.dtype == torch.bfloat16
    errors = ((cast.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()
    # By token: a router whose choice is close decides otherwise in 16 bits, for packed and for dense weights alike.
    assert errors.median() < 3e-2 and errors.quantile(0.9) < 8e-2


def test_what_stands_on_a_gradients_way_gives_one(tied):
    loaded = AutoModelForCausalLM.from_pretrained(tied / "packed", dtype=torch.float32)
    assert isinstance(loaded.lm_head, TiedHead)
    embedded = loaded.get_input_embeddings()(PROMPT).requires_grad_()
    found = loaded(inputs_embeds=embedded).logits
    torch.testing.assert_close(found.detach(), logits(loaded), rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    assert embedded.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_a_packed_linear_is_refused_by_name(tied):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    loaded = AutoModelForCausalLM.from_pretrained(tied / "packed", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"Target module PackedLinear\(.* is not supported"):
        peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["q_proj"]))


def test_a_packed_model_compiles_into_one_graph(tied):
    loaded = AutoModelForCausalLM.from_pretrained(tied / "packed", dtype=torch.float32)
    expected = logits(loaded)  # eagerly first
    assert torch.equal(logits(torch.compile(loaded, fullgraph=True, backend="aot_eager")), expected)


@pytest.mark.parametrize(
    ("arch", "changes", "step", "number"),
    [
        ("mixtral", {}, "quantize", 1),
        ("mixtral", {}, "quantize_head", 0),
        ("qwen3_moe_tied", {"budget": True}, "plan", 0),
        ("qwen3_moe_tied", {"budget": True}, "quantize", 0),
    ],
)
def test_a_run_that_is_interrupted_gives_the_same_files(tmp_path, text, monkeypatch, arch, changes, step, number):
    save_tiny_model(tmp_path / "model", arch)
    chosen = recipe(8, **changes)
    expected = quantize(tmp_path / "model", tmp_path / "undisturbed", text, chosen, samples=4)
    with monkeypatch.context() as patch:
        interrupt(patch, step, number)
        with pytest.raises(Stop):
            quantize(tmp_path / "model", tmp_path / "out", text, chosen, samples=4)
    with pytest.raises(CheckpointError, match="recipe.dense_bits was 8 and is 4"):
        quantize(tmp_path / "model", tmp_path / "out", text, recipe(4, **changes), samples=4)
    assert quantize(tmp_path / "model", tmp_path / "out", text, chosen, samples=4) == expected
    for path in (tmp_path / "undisturbed").glob("model*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_dry_run_knows_the_size(tied, text, tmp_path):
    options = QuantizeOptions(str(tied / "model"), tmp_path / "out", str(text), recipe(8), 8, 32, device="cpu")
    plan = dry_run(options)
    assert plan.output_bytes == inspect_checkpoint(tied / "packed")["model_bytes"]
    text_lines = "\n".join(plan.lines())
    assert "weights at 8 bits" in text_lines and f"{plan.model_bits:.3f} of the whole model" in text_lines


def test_command_line(tied, text, capsys):
    common = ["--model", str(tied / "model"), "--calibration", str(text), "--samples", "4", "--sequence-length", "32"]
    arguments = ["quantize", *common, "--output", str(tied / "out"), "--device", "cpu", "--quiet"]
    assert main([*arguments, "--dense-bits", "4", "--recipe", "paper", "--no-idre"]) == 0
    summary = inspect_checkpoint(tied / "out")
    assert [row["weight"]["num_stages"] for row in summary["dense"]] == [1] * len(summary["dense"])
    assert f"{summary['model_bits_per_weight']:.3f} of the whole model" in capsys.readouterr().out
    assert main(["inspect", str(tied / "out")]) == 0
    out = capsys.readouterr().out
    assert "model.embed_tokens" in out
    assert f"whole model: {summary['model_bits_per_weight']:.3f} bits per weight" in out


def test_other_rates_are_refused():
    with pytest.raises(ConfigError, match="--dense-bits 5 is not supported; choose 16, 8 or 4"):
        make_recipe("fast", 2, dense_bits=5)


@pytest.fixture
def damaged(tied, tmp_path):
    """A function that loads the packed model after `change` was applied to its tensors and config."""

    def load(change):
        tensors = {}
        for shard in sorted((tied / "packed").glob("*.safetensors")):
            tensors |= load_file(shard)
        config = json.loads((tied / "packed" / "config.json").read_text())
        change(tensors, config["quantization_config"]["dense"])
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    return load


def change_first(field, value):
    return lambda tensors, dense: dense[0].update({field: value})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, dense: tensors.pop(f"{Q}.weight_scale"), rf"{Q}\.weight_scale is missing"),
        (lambda tensors, dense: tensors[f"{Q}.weight_scale"].fill_(torch.inf), rf"{Q}\.weight_scale holds values"),
        (lambda tensors, dense: tensors.pop("model.embed_tokens.weight"), r"model\.embed_tokens\.weight is missing"),
        (change_first("tied_head", "model.head"), "has no Linear at model.head"),
        (lambda tensors, dense: dense[1]["weight"].update(out_features=32), rf"{Q}\.weight is stored as"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(damaged, change, message):
    with pytest.raises(CheckpointError, match=message):
        damaged(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_first("kind", "table"), "kind must be linear or embedding"),
        (change_first("surprise", 1), "a matrix this version cannot read"),
        (change_first("path", ""), "must name a module"),
        (lambda tensors, dense: dense[1].update(tied_head="lm_head"), "only an embedding has a head"),
        (lambda tensors, dense: dense[1]["weight"].update(has_bias=True), "no bias"),
    ],
)
def test_formats_that_make_no_sense_are_refused(damaged, change, message):
    with pytest.raises(ConfigError, match=message):
        damaged(change)


def parts(model, bits=8, float32=()):
    named = dict(model.named_parameters(remove_duplicate=False))
    return find_dense_parts(
        model,
        find_expert_banks(model),
        bits,
        keeps_float32=lambda name: name in float32,
        is_tied=lambda name, other: named[name] is named[other],
    )


class ReadsItsProjection(nn.Module):
    """Stands for attention code that takes a weight instead of calling the module."""

    def __init__(self, original):
        super().__init__()
        self.q_proj, self.k_proj = original.q_proj, original.k_proj

    def forward(self, x):
        self.k_proj.weight.device  # noqa: B018
        return x @ self.q_proj.weight.T


def test_what_cannot_be_packed_is_left_and_named():
    model = tiny_model("qwen2_moe", num_hidden_layers=1, num_key_value_heads=4)
    layer = model.model.layers[0]
    layer.self_attn = ReadsItsProjection(layer.self_attn)
    layer.narrow = nn.Linear(4, 64)
    layer.input_layernorm = nn.Embedding(3, 4)
    found = parts(model, float32=("lm_head.weight",))
    assert [format.path for format in found.formats] == ["model.embed_tokens", "model.layers.0.self_attn.k_proj"]
    assert found.head is None and found.of_layer(0) == found.formats[1:]
    assert found.left == {
        "model.layers.0.self_attn.q_proj": "ReadsItsProjection reads its weight directly",
        "model.layers.0.mlp.shared_expert_gate": "it belongs to a router",
        "model.layers.0.input_layernorm": "it is neither in the decoder layers nor the embedding or the head",
        "model.layers.0.narrow": "64x4 weights are too few for tables of 256",
        "lm_head": "the model keeps it in float32",
    }


def test_a_tied_embedding_is_packed_with_its_head_or_not_at_all():
    model = tiny_model("qwen3_moe_tied", num_key_value_heads=4)
    assert parts(model).embedding.tied_head == "lm_head" and parts(model).head is None
    left = parts(model, float32=("lm_head.weight",)).left
    assert left == {
        "model.embed_tokens": "the model keeps it in float32",
        "lm_head": "it is tied to model.embed_tokens",
    }
