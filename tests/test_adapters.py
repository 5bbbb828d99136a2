"""LoRA of peft over packed experts: trained, saved, loaded and merged; beside the same model with decoded experts."""

import pytest
import torch
from decoded_models import write_decoded_
from packed_banks import random_bank, write_packed
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kbvq.models.moe_adapters import find_expert_banks
from kbvq.serving.packed_experts import PackedBankModule

peft = pytest.importorskip("peft", reason="peft is not installed")

# peft 0.21 reads it of every transformers model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS = torch.arange(3, 27).view(2, 12)


def save_packed(root, **options):
    """A packed checkpoint of a tiny Qwen2-MoE, routed and shared experts: root / "packed", its original in "source"."""
    model = save_tiny_model(root / "source", "qwen2_moe")
    options = {"has_scale": True, "has_column_scale": True} | options
    banks = [
        random_bank(bank.path, bank.kind, bank.num_experts, bank.hidden_size, bank.intermediate_size, seed, **options)
        for seed, bank in enumerate(find_expert_banks(model))
    ]
    write_packed(root / "source", root / "packed", model, banks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    save_packed(root, has_bias=True)
    return root / "packed"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_lora(model, **options):
    """The same start for every model: peft draws A at random, and B is drawn too, so that A has a gradient."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **({"target_modules": ATTENTION} | options))
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


def gradients(model):
    """Of one step's loss, by the names of the trained parameters."""
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.fixture
def pair(tmp_path):
    """A packed model, without biases of experts, and the family's own code holding what its experts decode to."""
    save_packed(tmp_path)
    packed = load(tmp_path / "packed")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    for path, module in packed.named_modules():
        if isinstance(module, PackedBankModule):
            write_decoded_(original.get_submodule(path), module)
    return packed, original


def test_a_step_has_the_gradients_of_the_decoded_model(pair):
    packed, original = pair
    found, expected = gradients(with_lora(packed)), gradients(with_lora(original))
    assert found.keys() == expected.keys() and len(found) == 2 * len(ATTENTION) * 2  # A and B, two layers
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_router_that_is_trained_alone_gets_its_gradient(pair):
    """Nothing before the first router needs one there: only the routing weights do."""
    packed, original = pair
    for model in (packed, original):
        model.requires_grad_(False)
        model.model.layers[0].mlp.gate.weight.requires_grad_()
    ((name, found),) = gradients(packed).items()
    expected = gradients(original)[name]
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_an_adapter_is_trained_saved_loaded_and_merged(folder, tmp_path):
    adapted = with_lora(load(folder))
    before = logits(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    gradients(adapted)
    optimizer.step()
    trained = logits(adapted)
    assert not torch.equal(trained, before)
    adapted.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    assert torch.equal(logits(again), trained)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(input_ids=TOKENS, **options), adapted.generate(input_ids=TOKENS, **options))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


def test_the_trainer_trains_adapters_and_nothing_else(folder, tmp_path):
    settings = TrainingArguments(
        tmp_path, max_steps=1, use_cpu=True, report_to="none", save_strategy="no", dataloader_pin_memory=False
    )
    adapted = with_lora(load(folder))
    before = logits(adapted)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    Trainer(adapted, settings, train_dataset=rows).train()
    assert not torch.equal(logits(adapted), before)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(load(folder), settings, train_dataset=rows)


def test_the_own_interface_of_transformers_takes_the_adapter(folder, tmp_path):
    adapted = with_lora(load(folder))
    adapted.save_pretrained(tmp_path)
    model = load(folder)
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), logits(adapted))


def test_adapters_of_the_packed_experts_are_refused_by_name(folder):
    with pytest.raises(ValueError, match="Target module PackedExperts.* is not supported"):
        with_lora(load(folder), target_modules=["experts"])
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        with_lora(load(folder), target_modules=None, target_parameters=["experts.gate_up_proj"])
