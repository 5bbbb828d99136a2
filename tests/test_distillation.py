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


def test_distillation_lowers_the_divergence_and_changes_only_what_is_continuous(tmp_path, text):
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
    plain, tuned, again = (
        {k: v for file in sorted((tmp_path / name).glob("*.safetensors")) for k, v in load_file(file).items()}
        for name in ("plain", "distilled", "again")
    )
    assert plain.keys() == tuned.keys()
    assert all(torch.equal(tuned[name], again[name]) for name in tuned)
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    kinds = ("_codebook", "_codebook_scale", "_scale", "_column_scale", "_bias")
    assert changed and all("mlp." in name and name.endswith(kinds) for name in changed)
    assert any(name.endswith("gate_up_proj_codebook") for name in changed)


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
