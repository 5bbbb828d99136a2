import dataclasses
import json

import torch
from quantizing import quantize
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from kbvq.recipes import make_recipe

TOKENS = torch.randint(2, 128, (8, 32), generator=torch.Generator().manual_seed(5))


def divergence(original, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        p, q = (model(TOKENS).logits.log_softmax(-1) for model in (original, loaded))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_distillation_lowers_the_divergence_and_changes_neither_codes_nor_routers(tmp_path, text):
    """A family with shared experts, a plain codebook; unseen random words."""
    original = save_tiny_model(tmp_path / "model", "qwen2_moe")
    recipe = make_recipe("fast", 2, budget=False, kmeans_iterations=5)
    distilled = dataclasses.replace(recipe, distillation_steps=40, distillation_rate=1e-2)
    records = {
        name: quantize(tmp_path / "model", tmp_path / name, text, chosen, samples=64)
        for name, chosen in (("plain", recipe), ("distilled", distilled), ("again", distilled))
    }
    assert divergence(original, tmp_path / "distilled") < 0.95 * divergence(original, tmp_path / "plain")
    assert records["plain"]["bits_per_weight"] == records["distilled"]["bits_per_weight"]
    assert records["plain"]["calibration"]["tuning_samples"] == 0
    plain, tuned, again = (
        {k: v for file in sorted((tmp_path / name).glob("*.safetensors")) for k, v in load_file(file).items()}
        for name in ("plain", "distilled", "again")
    )
    assert plain.keys() == tuned.keys()
    assert all(torch.equal(tuned[name], again[name]) for name in tuned)
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    of_banks = {name for name in changed if ".mlp." in name}
    kinds = ("_codebook", "_codebook_scale", "_scale", "_column_scale", "_bias")
    assert of_banks and all(name.endswith(kinds) for name in of_banks)  # neither codes nor routers
    assert any(name.endswith("gate_up_proj_codebook") for name in of_banks)
    dense = {name for name in plain if ".self_attn." in name or name.endswith("layernorm.weight")}
    assert len(dense) >= 12 and changed - of_banks == dense  # neither embeddings nor the head


def test_dense_parameters_stay_where_their_rate_is_zero(tmp_path, text):
    original = save_tiny_model(tmp_path / "model", "mixtral")
    recipe = make_recipe("fast", 2, budget=False, kmeans_iterations=2, matching=False, distillation_steps=2)
    quantize(tmp_path / "model", tmp_path / "packed", text, dataclasses.replace(recipe, dense_rate=0.0))
    kept = {k: v for file in (tmp_path / "packed").glob("*.safetensors") for k, v in load_file(file).items()}
    stored = original.state_dict()
    names = [name for name in stored if "experts" not in name and name in kept]
    assert len(names) > 10 and all(torch.equal(kept[name], stored[name]) for name in names)


def test_best_recipe_runs_from_end_to_end(tmp_path, text):
    """The trellis code, a budget and end-to-end tuning together."""
    original = save_tiny_model(tmp_path / "model", "mixtral", hidden_size=128, intermediate_size=128)
    recipe = make_recipe("best", 2.75, distillation_steps=3)
    record = quantize(tmp_path / "model", tmp_path / "packed", text, recipe)
    assert 2.7225 <= record["bits_per_weight"] <= 2.75
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    banks = config["quantization_config"]["banks"]
    assert {bank[projection]["codebook"] for bank in banks for projection in ("gate_up_proj", "down_proj")} == {
        "trellis"
    }
    assert {row["bank"] for row in record["budget"]["projections"]} == {bank["path"] for bank in banks}
    assert divergence(original, tmp_path / "packed") < 0.05
