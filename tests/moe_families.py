"""Every mixture-of-experts architecture of the installed transformers, as a tiny random model.

An architecture is a `model_type` that transformers generates text with (as a causal language model, or as a model that
also sees or hears) and whose modeling file defines experts. Which ones there are is read from the files, so that none
is forgotten when transformers grows.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from tiny_models import makes
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB_SIZE = 128
LAYERS = 2
MAX_PARAMETERS = 20_000_000

_SIZES: dict[str, object] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    d_model=64,
    num_hidden_layers=LAYERS,
    num_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    ffn_hidden_size=96,
    intermediate_size_mlp=96,
    dense_intermediate_size=96,
    prefix_dense_intermediate_size=96,
    moe_intermediate_size=32,
    expert_ffn_hidden_size=32,
    shared_intermediate_size=48,
    shared_expert_intermediate_size=48,
    shared_experts_intermediate_size=32,
    moe_shared_expert_intermediate_size=48,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_k=2,
    moe_topk=2,
    n_group=1,
    topk_group=1,
    num_expert_group=1,
    first_k_dense_replace=1,
    num_dense_layers=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    o_lora_rank=16,
    o_groups=2,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    index_topk=32,
    index_head_dim=16,
    index_n_heads=2,
    linear_head_dim=16,
    linear_num_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    mamba_n_groups=2,
    mamba_chunk_size=16,
    mamba_dt_rank=8,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=16,
    router_hidden_size=32,
    max_position_embeddings=256,
    max_seq_len=256,
    model_max_length=256,
    sliding_window=16,
    num_nextn_predict_layers=0,
    mlp_layer_types=["dense", "sparse"],
    depth=LAYERS,
    num_heads=4,
    out_hidden_size=64,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
"""What makes a config small; a config gets those that it has."""

_OWN: dict[str, dict[str, object]] = {
    "bailing_hybrid": dict(layer_group_size=2),
    "dbrx": dict(
        n_heads=4,
        n_layers=LAYERS,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, hidden_size=64),
    ),
    "deepseek_v4": dict(mlp_layer_types=["hash_moe", "moe"]),
    "doge": dict(is_moe=True, num_experts=16),
    "dots3_note_text": dict(
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=24,
        swa_qk_nope_head_dim=16,
        swa_v_head_dim=16,
        head_dim=24,
    ),
    "dots3_note_audio_encoder": dict(adapter_input_size=64, adapter_out_dim=64),
    "dots3_note_vision_encoder": dict(adapter_in_dim=64, adapter_out_dim=64, num_attention_heads=4),
    "ernie4_5_vl_moe_text": dict(
        moe_intermediate_size=[32, 32],
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2]),
    ),
    "flint": dict(mlp_only_layers=[0]),
    "gemma4_text": dict(
        enable_moe_block=True,
        top_k_experts=2,
        hidden_size_per_layer_input=0,
        global_head_dim=16,
        num_kv_shared_layers=0,
    ),
    "gemma4": dict(image_token_id=125, video_token_id=126, audio_token_id=127),
    "glm4v_moe_text": dict(
        rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[1, 1, 2]
        )
    ),
    "glm5_next_text": dict(qk_rope_head_dim=0),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(head_dim=8, zero_expert_num=2),
    "muse_spark_audio": dict(patch_sizes=[4, 4], hidden_sizes=[32, 64], depths=[1, 1]),
    "nemotron_h": dict(hybrid_override_pattern="*E"),  # which old and new versions of transformers take
    "qwen3_omni_moe_audio_encoder": dict(
        encoder_layers=LAYERS,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        d_model=64,
        output_dim=64,
        downsample_hidden_size=16,
    ),
    "qwen3_omni_moe_vision_encoder": dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
    "qwen4_exp_text": dict(
        indexer_n_heads=4,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=32,
        indexer_compress_ratio=4,
        hc_lowrank=16,
        ngram_vocab_size_base=64,
    ),
    "inkling2_vision": dict(text_hidden_size=64),
    "qwen3_omni_moe_thinker": dict(vision_start_token_id=125),
    "zaya": dict(num_experts_per_tok=1),
}
"""What single architectures need besides."""


REFUSED_WITH_OLD_TRANSFORMERS = {"aria_text": "does not use the fused experts interface"}
"""Why 5.4 and 5.17 refuse architectures that later versions serve, as expressions that their messages match."""
REFUSED_WITH_THE_OLDEST_TRANSFORMERS = {
    # up to 5.4 its router has the width of the experts, and they multiply with the wrong side of their matrices
    "dbrx": r"gives .*ffn\.router 32 inputs, its experts 64.*upgrade transformers",
    "qwen3_vl_moe": "would convert the packed .*experts.gate_up_proj when it loads it; upgrade transformers",
}
"""The same of 5.4 alone."""
if transformers.__version__.startswith("5.4."):
    REFUSED_WITH_OLD_TRANSFORMERS |= REFUSED_WITH_THE_OLDEST_TRANSFORMERS
elif not transformers.__version__.startswith("5.17."):
    REFUSED_WITH_OLD_TRANSFORMERS.clear()


def moe_model_types() -> list[str]:
    """The model types of all architectures of which transformers makes a config, in alphabetical order."""
    folder = Path(transformers.__file__).parent / "models"
    experts = re.compile(r"^class \w*(Experts?|MoE|Moe|MOE)\w*\(", re.MULTILINE)
    modules = {
        file.parent.name for file in folder.glob("*/modeling_*.py") if experts.search(file.read_text(encoding="utf-8"))
    }
    return sorted(
        model_type
        for model_type in CONFIG_MAPPING_NAMES
        if model_type_to_module_name(model_type) in modules
        and makes(CONFIG_MAPPING[model_type])
        and (
            model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        )
    )


def tiny_config(model_type: str, **changes: object) -> PreTrainedConfig:
    """The smallest config of an architecture that has its kinds of layers, two in all."""
    return _shrunk(CONFIG_MAPPING[model_type], **changes)


def _shrunk(config_class: type[PreTrainedConfig], **changes: object) -> PreTrainedConfig:
    model_type = config_class.model_type
    usual = config_class()
    parts = {}
    for part in getattr(config_class, "sub_configs", {}):
        default = getattr(usual, part, None)
        if getattr(default, "model_type", None) in CONFIG_MAPPING_NAMES:
            parts[part] = _shrunk(type(default)).to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in usual.to_dict() or hasattr(config_class, name)}
    if "kv_lora_rank" in sizes:  # latent attention: as many keys as queries, and heads of a width that follows
        sizes["num_key_value_heads"] = 4
        sizes.pop("head_dim", None)
    kinds = list(dict.fromkeys(getattr(usual, "layer_types", None) or ()))
    own = _OWN.get(model_type, {})
    declared = isinstance(getattr(config_class, "layer_types", None), property) or "hybrid_override_pattern" in own
    if kinds and not declared:
        sizes["layer_types"] = [kinds[0], kinds[-1]]
    return config_class(**(sizes | parts | own | changes))


def tiny_model(config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in eval mode: matrices normal, the rest as transformers makes it, but no bias zero."""
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device("meta"):
            size = auto.from_config(config, dtype=dtype).num_parameters()
        if size > MAX_PARAMETERS:
            raise ValueError(f"{config.model_type}: its tiny config makes {size:,} parameters; add sizes to _OWN")
        model = auto.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.08)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.1)
    return model
