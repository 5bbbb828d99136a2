"""`generate` and a loaded model as people use them: padding, beams, caches, an assistant, copies, casts."""

import copy

import pytest
import torch
from packed_banks import random_bank, write_packed
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from kbvq.models.moe_adapters import find_expert_banks
from kbvq.serving.packed_experts import PackedBankModule

OPTIONS = {"codebook": "trellis", "vector_dim": 1, "codebook_size": 4, "has_scale": True, "tail": 9}
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed checkpoint of a tiny Qwen3-MoE in float32, so that equal mathematics gives equal tokens."""
    root = tmp_path_factory.mktemp("generate")
    save_tiny_model(root / "source", "qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(root / "source", dtype=torch.float32)
    banks = []
    for seed, bank in enumerate(find_expert_banks(model)):
        sizes = bank.num_experts, bank.hidden_size, bank.intermediate_size
        banks.append(random_bank(bank.path, bank.kind, *sizes, seed=seed, **OPTIONS))
    write_packed(root / "source", root / "packed", model, banks)
    return root / "packed"


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts(count, length=7):
    return torch.randint(2, 128, (count, length), generator=torch.Generator().manual_seed(3))


def generate(model, tokens, **options):
    return model.generate(tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **options)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_padding_changes_nothing(model):
    long, short = prompts(2)
    short = short[:4]
    padded = torch.stack([long, torch.cat([torch.zeros(3, dtype=torch.int64), short])])
    together = generate(model, padded, attention_mask=(torch.arange(7) >= torch.tensor([[0], [3]])).long())
    assert torch.equal(together[0], generate(model, long[None])[0])
    assert torch.equal(together[1, 3:], generate(model, short[None])[0])


def test_beams_are_those_of_the_plain_torch_path(model):
    options = {"num_beams": 3, "num_return_sequences": 2}
    kernels = generate(model, prompts(2), **options)
    for module in model.modules():
        if isinstance(module, PackedBankModule):
            module.activation_name = None
    assert torch.equal(kernels, generate(model, prompts(2), **options))


def test_static_cache_gives_the_tokens_of_the_dynamic_one(model):
    assert torch.equal(generate(model, prompts(2), cache_implementation="static"), generate(model, prompts(2)))


def test_a_compiled_forward_pass_generates_the_same_tokens(model):
    expected = generate(model, prompts(2))
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(generate(model, prompts(2), cache_implementation="static"), expected)


def test_assistant_changes_nothing(model, folder):
    assistant = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assistant.model.layers = assistant.model.layers[:1]
    assert torch.equal(generate(model, prompts(1), assistant_model=assistant), generate(model, prompts(1)))


def test_saving_a_loaded_model_and_loading_it_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again, prompts(1)), logits(model, prompts(1)))


def test_a_copy_is_equal_and_independent(model):
    before = logits(model, prompts(1))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, prompts(1)), before)
    for module in twin.modules():
        if isinstance(module, PackedBankModule):
            module.down_proj_scale.zero_()
    assert not torch.equal(logits(twin, prompts(1)), before)
    assert torch.equal(logits(model, prompts(1)), before)


def test_half_is_refused_by_name(model):
    """transformers refuses it for every quantized model: the dtype is chosen when loading."""
    with pytest.raises(ValueError, match=r"`\.half\(\)` is not supported for quantized model"):
        model.half()


@pytest.mark.parametrize("cast", ["bfloat16", "double"])
def test_a_cast_model_computes_the_same_within_its_rounding(model, cast):
    expected = logits(model, prompts(1))
    model = getattr(model, cast)()
    error = (logits(model, prompts(1)).float() - expected).norm() / expected.norm()
    # A dozen roundings a layer; double runs the experts in float32.
    assert error < {"bfloat16": 8e-2, "double": 1e-5}[cast]
