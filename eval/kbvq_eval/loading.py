"""Models by their own loaders: what transformers reads, other tools' packed checkpoints, and llama.cpp's files.

AutoRound, compressed-tensors and others are read by transformers' quantizers, GPTQ by GPTQModel's own loader, because
transformers' does not know experts that are stored one by one; a .gguf by transformers' reader, which unpacks it. What
a loader lacks is said when a model is named, before anything is measured.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kbvq.errors import CheckpointError, ConfigError, UnsupportedModelError
from kbvq.models.layer_stream import LayerStream, resolve_model_folder, return_freed_memory
from kbvq_eval.parts import fingerprint

logger = logging.getLogger("kbvq")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

REMEDIES = {
    "auto-round": "pip install auto-round",
    "gptq": "pip install gptqmodel",
    "compressed-tensors": "pip install compressed-tensors",
    "gguf": "pip install 'kbvq[eval]'",
}
"""Format -> how its loader is installed; of others, transformers' own message says it."""

_EXPERT_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Metadata of a .gguf -> name in the configuration."""


class LoadedModel:
    """A model that is loaded when it is first needed, and dropped before another one is.

    path: folder, hub name or .gguf file. device: for `device_map`. dtype: a name of DTYPES. vocabulary: the tokenizer
    of the original for a .gguf, where transformers reads the tokens well and how text is cut less well; the file must
    list the same tokens. Raises CheckpointError for what cannot be read, ConfigError for a loader that is not
    installed and for another vocabulary.
    """

    def __init__(
        self, path: str, device: str, dtype: str, *, vocabulary: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.path, self.device, self.dtype = path, device, dtype
        self.is_gguf = path.endswith(".gguf")
        if self.is_gguf:
            _check_gguf(Path(path))
        self.fingerprint = fingerprint(path)
        try:
            self.config = AutoConfig.from_pretrained(**self._where())
            if self.is_gguf:
                _read_expert_widths(Path(path), self.config)
            self.method = "gguf" if self.is_gguf else quantization_method(self.config)
            if self.is_gguf and vocabulary is not None:
                _check_tokens(Path(path), vocabulary)
                self.tokenizer = vocabulary
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(**self._where())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load {path}: {error}") from error
        if not self.is_gguf:
            check_loader(path, self.config, device)
        if self.method == "gptq" and dtype == "float32":
            raise ConfigError(f"{path}: GPTQModel computes in 16 bits only; pass --dtype bfloat16 for all of them")
        self._model: PreTrainedModel | None = None

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    def model(self) -> PreTrainedModel:
        """Raises CheckpointError also when the checkpoint lacks weights of the model, which would stay random, and when
        another tool's loader leaves some of its checkpoint out."""
        if self._model is None:
            load = {"gptq": _load_gptq, None: self._load_original}.get(self.method, self._load)
            try:
                self._model = load(self.path, DTYPES[self.dtype], self.device).eval()
            except torch.OutOfMemoryError:
                raise
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                raise CheckpointError(f"cannot load {self.path}: {error}") from error
        return self._model

    def drop(self) -> None:
        if self._model is not None:
            self._model = None
            gc.collect()
            return_freed_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _where(self) -> dict[str, str]:
        """How transformers is told which files."""
        if not self.is_gguf:
            return {"pretrained_model_name_or_path": self.path}
        path = Path(self.path)
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}

    def _load_original(self, path: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
        """In main memory a parameter at a time (`LayerStream.load`) for the families that kbvq quantizes: transformers
        takes twice the model there."""
        if device == "cpu":
            try:
                stream = LayerStream(resolve_model_folder(path), dtype=dtype, device=device)
            except (UnsupportedModelError, CheckpointError) as error:
                logger.info("%s is loaded by transformers: %s", path, error)
            else:
                return stream.load()
        return self._load(path, dtype, device)

    def _load(self, path: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
        model, found = AutoModelForCausalLM.from_pretrained(
            **self._where(), config=self.config, dtype=dtype, device_map=device, output_loading_info=True
        )
        if self.method not in (None, "kbvq") and found["unexpected_keys"]:
            raise CheckpointError(
                f"{path}: {self.method}'s loader takes no notice of {min(found['unexpected_keys'])}, nor of "
                f"{len(found['unexpected_keys']) - 1} others, so what it makes is not what the checkpoint holds"
            )
        missing = sorted([*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])])
        if missing:
            raise CheckpointError(
                f"{path}: transformers does not find {missing[0]} in it, nor {len(missing) - 1} others, and would "
                "leave them random; the checkpoint is not complete, or is of a layout that its loader does not know"
            )
        return model


def quantization_method(config: Any) -> str | None:
    """What quantized a checkpoint, by its configuration: "kbvq", "gptq", "auto-round", …; None if nothing did."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = settings.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def check_loader(path: str, config: Any, device: str) -> None:
    """Raises ConfigError when the loader of a quantized checkpoint is not installed or cannot run here."""
    method = quantization_method(config)
    if method is None or method == "kbvq":
        return
    try:
        if method == "gptq":
            import gptqmodel  # noqa: F401
        else:
            from transformers.quantizers import AutoHfQuantizer

            quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
            quantizer.validate_environment(device_map={"": device}, dtype=None)
    except (ImportError, ValueError, RuntimeError) as error:
        remedy = f"; {REMEDIES[method]}" if method in REMEDIES else ""
        raise ConfigError(f"{path} was quantized by {method}, whose loader cannot be used: {error}{remedy}") from error


def _load_gptq(path: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.TORCH if device == "cpu" else BACKEND.AUTO
    return GPTQModel.load(path, device=device, dtype=dtype, backend=backend).model


def _check_gguf(path: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{path} needs the package gguf ({error}); {REMEDIES['gguf']}") from error
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; a .gguf must be on this machine")
    if path.stem.rpartition("-of-")[2].isdigit():
        raise ConfigError(f"{path} is one of several parts, which transformers cannot read; join them with gguf-split")


def _read_expert_widths(path: Path, config: Any) -> None:
    """Put the widths of routed and shared experts into a configuration, which transformers leaves at its defaults."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.get_field("general.architecture")
    for key, name in _EXPERT_WIDTHS.items():
        field = None if architecture is None else reader.get_field(f"{architecture.contents()}.{key}")
        if field is not None and hasattr(config, name):
            setattr(config, name, int(field.contents()))


def _check_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError unless the file lists the tokenizer's tokens; it may add others behind, as padding."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.tokens")
    theirs = [] if field is None else field.contents()
    for token in range(len(tokenizer)):
        ours = tokenizer.convert_ids_to_tokens(token)
        found = theirs[token] if token < len(theirs) else None
        if ours is not None and ours != found:
            raise ConfigError(
                f"token {token} of {path} is {found!r} and the baseline's is {ours!r}: their vocabularies differ; "
                "compare a model with the one it was made from"
            )
