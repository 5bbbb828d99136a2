"""Tiny random models of every supported architecture, in memory and in the layout that the hub serves."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 128


def makes(config_class: type[PreTrainedConfig]) -> bool:
    """Whether the installed transformers accepts its own default config: beside a newer huggingface_hub 5.4 refuses
    those that it declares with integers where false stands, OLMoE's among them."""
    try:
        config_class()
    except StrictDataclassError:
        return False
    return True


_BASE = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
_EXPERTS = dict(intermediate_size=96, moe_intermediate_size=32, num_experts_per_tok=2)
# Layer 0 is dense and layer 1 sparse; two shared experts are one MLP of twice the width.
_DEEPSEEK = (
    _BASE
    | _EXPERTS
    | dict(
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
)

ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "mixtral": (MixtralConfig, _BASE | dict(intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (Qwen2MoeConfig, _BASE | _EXPERTS | dict(num_experts=8, shared_expert_intermediate_size=48)),
    "qwen3_moe": (Qwen3MoeConfig, _BASE | _EXPERTS | dict(num_experts=8, head_dim=16, norm_topk_prob=True)),
    "qwen3_moe_tied": (Qwen3MoeConfig, _BASE | _EXPERTS | dict(num_experts=8, head_dim=16, tie_word_embeddings=True)),
    "olmoe": (OlmoeConfig, _BASE | dict(intermediate_size=32, num_experts=8, num_experts_per_tok=2)),
    "deepseek_v2": (DeepseekV2Config, _DEEPSEEK | dict(topk_method="greedy")),
    "deepseek_v3": (DeepseekV3Config, _DEEPSEEK),
}
ARCHITECTURES = {arch: made for arch, made in ARCHITECTURES.items() if makes(made[0])}
"""The six supported families, and one with tied embeddings -> config class and arguments."""


def tiny_config(arch: str, **changes: object) -> PreTrainedConfig:
    config_class, arguments = ARCHITECTURES[arch]
    return config_class(**(arguments | changes))


def tiny_model(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model in eval mode; `changes` override config arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **changes), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm weights too, so that a test sees whether they were loaded.
                parameter.normal_(0, 0.08) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.data = torch.randn(buffer.shape) * 0.1  # float32 in every dtype, as from_pretrained keeps it
    return model


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Splits at white space: the words "w2", "w3" ... have the ids 2, 3 ...; others are <unk> = 0; </s> = 1."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<unk>", model_max_length=256
    )


def save_tiny_model(
    folder: Path,
    arch: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    max_shard_size: str = "1GB",
    **changes: object,
) -> PreTrainedModel:
    """Save `tiny_model` as on the hub, one tensor per expert and projection; returns the model."""
    model = tiny_model(arch, seed, dtype, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return model
