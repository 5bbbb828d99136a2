"""Packed experts in a model: the kernels against the path in plain torch, and under torch.compile."""

import pytest
import torch
from quantizing import quantize
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from kbvq.recipes import make_recipe
from kbvq.serving.packed_experts import PackedBankModule


def without_kernels(model):
    for module in model.modules():
        if isinstance(module, PackedBankModule):
            module.activation = None
    return model


@pytest.fixture(scope="module")
def packed_fixture(trained_model, data, tmp_path_factory):
    """The bundled model, quantized quickly: the text matters here, not the quality."""
    folder = tmp_path_factory.mktemp("served") / "packed"
    recipe = make_recipe("paper", 2, codebook_scope="bank", max_vectors_per_codeword=16, kmeans_iterations=3)
    quantize(trained_model, folder, data / "calibration.txt", recipe, samples=8, sequence_length=128)
    return folder


def test_greedy_generation_is_that_of_the_plain_torch_path(packed_fixture):
    """Same logits and the same tokens in float32. In bfloat16 both round, each in its own places, and a router may then
    choose another expert: the kernels must be as near to the logits in float32 as plain torch in bfloat16 is."""
    kernels = AutoModelForCausalLM.from_pretrained(packed_fixture, dtype=torch.float32)
    plain = without_kernels(AutoModelForCausalLM.from_pretrained(packed_fixture, dtype=torch.float32))
    prompts = torch.randint(2, 4096, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = plain(prompts).logits
        torch.testing.assert_close(kernels(prompts).logits, exact, rtol=1e-4, atol=1e-4)
        rounded = [AutoModelForCausalLM.from_pretrained(packed_fixture, dtype=torch.bfloat16) for _ in range(2)]
        errors = [
            (model(prompts).logits.float() - exact).abs().mean() for model in (rounded[0], without_kernels(rounded[1]))
        ]
    assert 0 < errors[0] < 1.25 * errors[1]
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(kernels.generate(prompts, **options), plain.generate(prompts, **options))


def test_inputs_that_need_a_gradient_get_one(packed_fixture):
    model = AutoModelForCausalLM.from_pretrained(packed_fixture, dtype=torch.float32)
    embeddings = model.get_input_embeddings()(torch.arange(10)[None]).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ["qwen2_moe", "mixtral"])
def test_whole_graph_compiles(tmp_path, text, arch):
    save_tiny_model(tmp_path / "model", arch)
    quantize(tmp_path / "model", tmp_path / "packed", text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    tokens = torch.arange(2, 26)[None]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_kernels_follow_a_change_of_the_buffers(tmp_path, text):
    save_tiny_model(tmp_path / "model", "qwen3_moe")
    quantize(tmp_path / "model", tmp_path / "packed", text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    tokens = torch.arange(2, 26)[None]
    with torch.no_grad():
        before = model(tokens).logits
        for module in model.modules():
            if isinstance(module, PackedBankModule):
                module.down_proj_codebook.mul_(0.5)
        after = model(tokens).logits
        torch.testing.assert_close(after, without_kernels(model)(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3
