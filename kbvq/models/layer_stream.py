"""A checkpoint read one decoder layer at a time: the whole model is never in memory.

The model is built from its config on the meta device, without weights. Its parameters are then read from the
safetensors shards on demand, with the renamings and fusions that transformers itself applies to a checkpoint.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers import HfQuantizer

from kbvq.errors import CheckpointError, NumericalError, UnsupportedModelError
from kbvq.models.moe_adapters import decoder_layers, find_expert_banks
from kbvq.models.stored_tensors import STORED_DTYPES, TABLE_DTYPES, StoredTensors, check_source_quantization
from kbvq.structures import PROJECTIONS

if TYPE_CHECKING:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

logger = logging.getLogger("kbvq")

_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")

_FINITE_CHUNK = 1 << 24  # elements looked at together


def resolve_model_folder(name_or_path: str) -> Path:
    """The folder of a local model, or of a hub model after downloading its safetensors, JSON and tokenizer files.

    Raises CheckpointError when there is neither such a folder nor such a model, or the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    check_model_name(name_or_path)
    try:
        return Path(
            snapshot_download(
                name_or_path,
                allow_patterns=[*_DOWNLOADED, "README.md"],  # the model card, for its licence
                ignore_patterns=["consolidated*", "original/*"],  # the same weights again, in another layout
            )
        )
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"there is no local folder {name_or_path}, and the hub did not provide such a model ({reason}); check the "
            "name and the connection, or pass a local folder with config.json and the safetensors shards"
        ) from error


def check_model_name(name: str) -> None:
    """Raises CheckpointError for what cannot be the name of a model of the hub."""
    if Path(name).expanduser().exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise CheckpointError(f"{name} is neither a folder nor a model name of the hub; pass one of them")


@dataclass(frozen=True)
class _Source:
    """What a parameter of the model is made from.

    converter: the fusion of several stored tensors, or the split of one, or None for one stored tensor taken as it is.
    keys: (source pattern of the converter, name of the stored tensor), experts in ascending order.
    first: the parameter that is named to the converter: of those it makes, the first.
    """

    converter: WeightConverter | None
    first: str
    keys: list[tuple[str, str]] = field(default_factory=list)


class LayerStream:
    """A model folder (safetensors in the layout of the hub), opened and checked.

    dtype: what embeddings and layers are materialised in; parameters that `from_pretrained` keeps in float32 stay so.
    device: where they are materialised.

    model: the skeleton on the meta device, in eval mode, without cache; of a model that sees or hears, the whole, which
        then works on text. text_config: the part of its config that describes the decoder layers.
    stream_width: values that a layer hands on for a token: hidden_size, times the residual streams of a model that has
        several.
    banks: its banks of experts (find_expert_banks). layers: its decoder layers. layers_path: their module path.
    shards: the files that hold its tensors.
    source_bytes: size of the stored tensors that the model uses. dense_bytes: of what is outside the banks, as
        `layer_tensors` and `outer_tensors` give it. source_quantization: the checkpoint's quantization_config, if it is
        published in FP8 or MXFP4; such weights are decoded when they are read.

    Raises CheckpointError for a missing or unreadable file, a missing, misshapen or unsupported tensor and a model that
    is already quantized; UnsupportedModelError for a model that kbvq cannot quantize, or that the installed
    transformers could not load packed. No weight is read for that.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        self._before_layers: list[str] = []  # names of the tensors that are in memory for `layer_inputs`
        self._arguments_checked = False
        self.config, self.source_quantization = _load_config(folder)
        self.model = _build_skeleton(self.config, dtype)
        self.text_config = self.config.get_text_config()
        self.stream_width: int = self.text_config.hidden_size * getattr(self.text_config, "hc_count", 1)
        self.banks = find_expert_banks(self.model)
        check_names_are_kept(self.model, [f"{bank.path}.{name}" for bank in self.banks for name in PROJECTIONS])
        self.layers, self.layers_path = decoder_layers(self.model)
        self.num_layers = len(self.layers)
        self._initialize_buffers(self.model)

        self._files = StoredTensors(folder, self.source_quantization)
        self._stored = self._files.tensors
        self._skeleton = self.model.state_dict()
        self._float32 = [pattern.replace("*", ".*") for pattern in self.model._get_dtype_plan(dtype)]
        self._sources = self._match_sources()
        # Tied parameters are one object under two names; the first name is the one that is loaded and stored.
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        first_name: dict[int, str] = {}
        self._tied = {n: first for n, p in parameters.items() if (first := first_name.setdefault(id(p), n)) != n}
        for name, first in self._tied.items():
            if name in self._sources:
                self._sources.setdefault(first, self._sources[name])
        self._check_sources()

        used = {key for source in self._sources.values() for _, key in source.keys}
        self.shards = self._files.shards
        self.source_bytes = sum(self._stored[key].num_bytes for key in used)
        in_banks = tuple(f"{bank.path}." for bank in self.banks)
        self.dense_bytes = sum(
            self.written_bytes(name)
            for name in self._sources
            if name not in self._tied and not name.startswith(in_banks)
        )

    def check_finite(self) -> None:
        """Read every weight once; NumericalError names the first with a NaN or an infinity."""
        keys = sorted({key for source in self._sources.values() for _, key in source.keys}, key=dot_natural_key)
        for key in tqdm(keys, desc="checking weights", unit="tensor", disable=None):
            # Reopened for each tensor: pages of a mapped shard count as memory in use until it is closed.
            with self._files.open() as fetch:
                for chunk in fetch(key).flatten().split(_FINITE_CHUNK):
                    # The extremes of a tensor are NaN if anything is.
                    if chunk.numel() and not torch.stack(torch.aminmax(chunk)).isfinite().all():
                        raise NumericalError(
                            f"{key} in {self._stored[key].shard} contains NaN or infinite values; get an intact copy"
                        )

    @torch.no_grad()
    def layer_inputs(self, input_ids: Tensor) -> tuple[Tensor, list[dict]]:
        """Embeddings of a batch and the keyword arguments that each decoder layer gets for it.

        input_ids: [B, S] integers. Returns hidden states [B, S, H] in `dtype` on `device` (with a dimension more in
        models of several residual streams), and for every layer its arguments: attention mask, position embeddings and
        so on, as the model's own forward makes them. They depend on B and S alone; UnsupportedModelError when they do
        not. What stands before the layers stays in memory until a layer is opened.
        """
        if not self._before_layers:
            parent = self.layers_path.rpartition(".")[0]
            names = [name for name in self._skeleton if name.startswith(f"{parent}.")]
            self._before_layers = [name for name in names if not name.startswith(f"{self.layers_path}.")]
            self._materialize(self._before_layers)
        input_ids = input_ids.to(self.device)
        hidden_states, layer_kwargs = self._enter_layers(input_ids)
        if not self._arguments_checked:
            other = self._enter_layers((input_ids + 1) % self.text_config.vocab_size)[1]
            for index, (one, two) in enumerate(zip(layer_kwargs, other, strict=True)):
                for name in one:
                    if not _equal(one[name], two[name]):
                        raise UnsupportedModelError(
                            f"{self.config.model_type}: the argument {name} of decoder layer {index} depends on the "
                            "tokens; kbvq runs layers on the hidden states alone"
                        )
            self._arguments_checked = True
        return hidden_states, layer_kwargs

    def _enter_layers(self, input_ids: Tensor) -> tuple[Tensor, list[dict]]:
        """What the first layer gets, and the other arguments of all layers."""
        hidden_states: list[Tensor] = []
        layer_kwargs: list[dict] = []

        def record(layer: nn.Module, *args: object, **kwargs: object) -> Tensor:
            bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
            arguments = list(bound.arguments)[1:]  # without self
            states = bound.arguments[arguments[0]]
            named = {name: bound.arguments[name] for name in arguments[1:]}
            for name, parameter in bound.signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    named |= named.pop(name, {})
            hidden_states.append(states)
            layer_kwargs.append(named)
            if len(layer_kwargs) == self.num_layers:
                raise _LayersPassed
            return states

        for layer in self.layers:
            layer.forward = partial(record, layer)
        try:
            self.model.base_model(input_ids=input_ids, use_cache=False)
        except _LayersPassed:
            pass
        except (ValueError, TypeError, IndexError) as error:
            if int(input_ids.max()) >= self.text_config.vocab_size:  # not the model's fault
                raise
            raise UnsupportedModelError(
                f"{self.config.model_type}: its decoder layers hand on more than hidden states, or its forward needs "
                f"more than token ids ({error}); kbvq runs layers on the hidden states alone"
            ) from error
        finally:
            for layer in self.layers:
                del layer.forward
        return hidden_states[0], layer_kwargs

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights, in `dtype` on `device`, until the block is left.

        Banks may be replaced by other modules inside the block; afterwards the skeleton is as it was.
        """
        path = f"{self.layers_path}.{index}"
        for name in self._before_layers:
            self._put(name, self._skeleton[name])
        self._before_layers = []
        originals = {b.path: self.model.get_submodule(b.path) for b in self.banks if b.decoder_layer == index}
        try:
            self._initialize_buffers(self.layers[index])
            self._materialize([name for name in self._skeleton if name.startswith(f"{path}.")])
            yield self.layers[index]
        finally:
            for bank_path, module in originals.items():
                self.model.set_submodule(bank_path, module)
            self.layers[index].to("meta")
            return_freed_memory()

    @contextmanager
    def head(self) -> Iterator[None]:
        """Everything outside the decoder layers with its weights, for `logits`, until the block is left."""
        with self._materialized([name for name in self._skeleton if not name.startswith(f"{self.layers_path}.")]):
            yield

    @contextmanager
    def whole(self, banks: Mapping[str, nn.Module], dense: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
        """The model with all its weights outside the banks, and these modules in the banks' places by their paths,
        until the block is left.

        dense: parameters outside the banks that differ from the stored ones, by their names in the model.
        """
        prefixes = tuple(f"{path}." for path in banks)
        originals = {path: self.model.get_submodule(path) for path in banks}
        try:
            for path, module in banks.items():
                self.model.set_submodule(path, module)
            with self._materialized([name for name in self._skeleton if not name.startswith(prefixes)]):
                for name, tensor in dense.items():
                    self.replace_(name, tensor)
                yield self.model
        finally:
            for path, module in originals.items():
                self.model.set_submodule(path, module)

    def load(self) -> PreTrainedModel:
        """The model with all its weights for good, as `from_pretrained` makes it; the stream is not used afterwards.

        `from_pretrained` keeps every shard mapped until the last weight is read, and for as long as any weight that it
        takes as it is: all pages of the checkpoint are then resident beside the copies made of them. Here the shards
        are mapped anew for each parameter, and the pages of one that is copied are given back before the next.
        """
        for layer in self.layers:
            self._initialize_buffers(layer)
        tied = {name: first for name, first in self._tied.items() if self.is_tied(name, first)}
        self._materialize([name for name in self._skeleton if name not in tied])
        for name, first in tied.items():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[leaf] = self.model.get_parameter(first)
        self.config.use_cache = True
        if self.model.can_generate() and (self.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return_freed_memory()
        return self.model

    def last_outputs(self, token_ids: Tensor) -> Tensor:
        """The last decoder layer's output for these windows, [B, S] -> [B, S, H] on `device`, differentiable.

        Inside `whole` only.
        """
        forward = partial(self.model, input_ids=token_ids.to(self.device), use_cache=False)
        return _stopped_at(self.layers[-1].register_forward_hook, forward)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """What the model makes of the last decoder layer's output: [B, S, H] -> [B, S, vocabulary] on `device`,
        differentiable.

        Inside `head` or `whole` only.
        """
        hidden_states = hidden_states.to(self.device)
        own = [layer.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:  # the model's own forward, with its norm, head and scaling, around no layers
            layer.forward = lambda *args, **kwargs: hidden_states
        try:
            embedded = hidden_states.new_zeros(*hidden_states.shape[:2], self.text_config.hidden_size)
            return self.model(inputs_embeds=embedded, use_cache=False).logits
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def head_inputs(self, hidden_states: Tensor) -> Tensor:
        """What the head gets of the last decoder layer's output, of the same shape. Inside `head` or `whole` only."""
        head = self.model.get_output_embeddings()
        return _stopped_at(head.register_forward_pre_hook, partial(self.logits, hidden_states))[0]

    def layer_tensors(self, index: int, dense: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of decoder layer `index` outside its banks, by their names in the model, in the dtype stored;
        those in `dense` with its values."""
        banks = tuple(f"{bank.path}." for bank in self.banks)
        prefix = f"{self.layers_path}.{index}."
        stored = self._read([name for name in self._sources if name.startswith(prefix) and not name.startswith(banks)])
        changed = {} if dense is None else {name: dense[name] for name in stored if name in dense}
        return stored | {name: tensor.to(stored[name].dtype) for name, tensor in changed.items()}

    def outer_tensors(self) -> dict[str, Tensor]:
        """The tensors outside the decoder layers, as `layer_tensors` gives them.

        A tied parameter appears once, unless the checkpoint stores two different tensors: then `from_pretrained` does
        not tie them either.
        """
        tensors = self._read([name for name in self._sources if not name.startswith(f"{self.layers_path}.")])
        for name, first in self._tied.items():
            if name in tensors and torch.equal(tensors[name], tensors[first]):
                del tensors[name]
        return tensors

    def keeps_float32(self, name: str) -> bool:
        """Whether `from_pretrained` keeps a parameter in float32 whatever the dtype of the model."""
        return any(re.search(pattern, name) for pattern in self._float32)

    def is_tied(self, name: str, first: str) -> bool:
        """Whether two parameters of the model are one, by the config and by what the checkpoint stores; reads both only
        where it stores both."""
        if self._tied.get(name) != first and self._tied.get(first) != name:
            return False
        if name not in self._sources or first not in self._sources or self._sources[name] is self._sources[first]:
            return True
        tensors = self._read([name, first])
        return torch.equal(tensors[name], tensors[first])

    def weight(self, name: str) -> Tensor:
        """A parameter in the dtype stored, on `device`."""
        stored = name if name in self._sources else self._tied[name]
        return self._read([stored])[stored].to(self.device)

    def replace_(self, name: str, tensor: Tensor) -> None:
        """Put other values in the place of a parameter that is in memory, until it leaves it."""
        self._put(name, tensor.to(self.device, self.model.get_parameter(name).dtype))

    def _match_sources(self) -> dict[str, _Source]:
        """Name in the model -> the stored tensors it is made from, as `from_pretrained` matches them."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
        converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        sources: dict[str, _Source] = {}
        unused = []
        for key in sorted(self._stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, self._skeleton)
            if name not in self._skeleton and key in self._skeleton:
                name, pattern = key, None
            if name not in self._skeleton:
                unused.append(key)
                continue
            converter = None if pattern is None else converter_of[pattern]
            for target in _targets(name, converter):
                if target not in self._skeleton:
                    raise UnsupportedModelError(
                        f"{self.config.model_type}: {key} is stored for {target} too, which the model does not have"
                    )
                source = sources.setdefault(target, _Source(converter, name))
                source.keys.append((pattern or key, key))
        if unused:
            logger.warning("%d stored tensors are not part of the model, e.g. %s", len(unused), unused[0])
        return sources

    def _check_sources(self) -> None:
        """Every parameter has its stored tensors, of a supported dtype, and they make up its shape."""
        for name, parameter in self._skeleton.items():
            if name not in self._sources:
                if name in self._tied:
                    continue
                raise CheckpointError(f"{self.folder}: no shard has {name}; get a complete copy of the checkpoint")
            source = self._sources[name]
            for _, key in source.keys:
                if self._stored[key].dtype not in (STORED_DTYPES if parameter.is_floating_point() else TABLE_DTYPES):
                    raise CheckpointError(
                        f"{self._stored[key].shard}: {key} is stored as {self._stored[key].dtype}; kbvq reads "
                        f"{', '.join(STORED_DTYPES)}: convert the checkpoint to bfloat16 first"
                    )
            if source.converter is not None:
                num_experts = parameter.shape[0] * len(source.converter.target_patterns)
                self._check_experts(name, source.converter, source.keys, num_experts)
            try:
                shape = self._assemble(name, lambda key: torch.empty(self._stored[key].shape, device="meta")).shape
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(f"{self.folder}: {name} cannot be fused from its experts: {error}") from error
            if shape != parameter.shape:
                raise CheckpointError(
                    f"{self.folder}: {name} is {tuple(shape)} in the shards but {tuple(parameter.shape)} by "
                    "config.json; they do not belong together"
                )

    def _check_experts(
        self, name: str, converter: WeightConverter, keys: list[tuple[str, str]], num_experts: int
    ) -> None:
        """Each source pattern of a fused parameter, such as "experts.*.up_proj.weight", has a tensor per expert."""
        for pattern in converter.source_patterns:
            if "experts" not in pattern or "*" not in pattern:  # another fusion, such as that of q, k and v
                continue
            found = [key for key_pattern, key in keys if key_pattern == pattern]
            present = {int(part) for key in found for part in re.findall(r"\.experts\.(\d+)\.", key)}
            missing = sorted(set(range(num_experts)) - present)
            if missing:
                key = pattern.replace("*", str(missing[0])).lstrip(".")
                raise CheckpointError(
                    f"{self.folder}: no shard has {key} for {name} ({len(missing)} of {num_experts} experts are "
                    "missing); get a complete copy of the checkpoint"
                )

    def _assemble(self, name: str, fetch: Callable[[str], Tensor]) -> Tensor:
        """A parameter from its stored tensors, which `fetch` provides."""
        source = self._sources[name]
        if source.converter is None:
            return fetch(source.keys[0][1])
        converter = copy.deepcopy(source.converter)
        for pattern, key in source.keys:
            # It is declared for futures; `from_pretrained` gives it callables too.
            converter.add_tensor(source.first, key, pattern, lambda key=key: fetch(key))  # type: ignore[arg-type]
        tensor = converter.convert(source.first, model=self.model, config=self.config)[name]
        return tensor[0] if isinstance(tensor, list) else tensor

    def written_bytes(self, name: str) -> int:
        """Bytes that a parameter outside the banks takes in the packed checkpoint where it is not packed."""
        return self._skeleton[name].numel() * self._written_dtype(name).itemsize

    def _written_dtype(self, name: str) -> torch.dtype:
        """That of a parameter outside the banks in the packed checkpoint."""
        return (STORED_DTYPES | TABLE_DTYPES)[self._stored[self._sources[name].keys[0][1]].dtype]

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Parameters in the dtype stored, on the CPU."""
        with self._files.open() as fetch:
            return {name: self._assemble(name, fetch) for name in names}

    def _materialize(self, names: list[str]) -> None:
        """Give these parameters and buffers their weights."""
        for name in names:
            stored = name if name in self._sources else self._tied[name]
            dtype = torch.float32 if self.keeps_float32(name) else self._skeleton[name].dtype
            # Reopened for each: pages of a mapped shard stay resident as long as any tensor of that mapping is in use.
            with self._files.open() as fetch:
                # Cast once fused: a copy of each expert in a wider dtype would cost more memory than the layer itself.
                read = partial(fetch, device=self.device, dtype=dtype)
                tensor = self._assemble(stored, read).to(dtype)
            self._put(name, tensor)

    @contextmanager
    def _materialized(self, names: list[str]) -> Iterator[None]:
        """These parameters and buffers with their weights until the block is left."""
        try:
            self._materialize(names)
            yield
        finally:
            for name in names:
                self._put(name, self._skeleton[name])
            self._before_layers = []  # they are among the names
            return_freed_memory()

    def _initialize_buffers(self, root: nn.Module) -> None:
        """Compute the buffers that are in no shard, such as rotary frequencies, as `from_pretrained` does.

        Only while the parameters of `root` are on the meta device: the call would draw them anew.
        """
        for module in root.modules():
            if module is not root and module in self.layers:
                continue
            kept = module._buffers.items()
            buffers = {n: b for n, b in kept if b is not None and n in module._non_persistent_buffers_set}
            if any(buffer.is_meta for buffer in buffers.values()):
                for name, buffer in buffers.items():
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
                self.model._init_weights(module)

    def _put(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def check_names_are_kept(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse what the installed transformers could not load: packed tensors, which have `names` of the model, where it
    would convert these as if they were in the layout of the hub.

    Since a quantizer can take conversions out (KbvqQuantizer.update_weight_conversions) there are none; 5.4 transposes
    the experts of Qwen3-VL. Raises UnsupportedModelError.
    """
    if hasattr(HfQuantizer, "update_weight_conversions"):
        return
    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    skeleton = model.state_dict()
    for name in names:
        if rename_source_key(name, renamings, converters, model.base_model_prefix, skeleton)[1] is not None:
            raise UnsupportedModelError(
                f"{model.config.model_type}: transformers {transformers.__version__} would convert the packed {name} "
                "when it loads it; upgrade transformers"
            )


def _targets(name: str, converter: WeightConverter | None) -> list[str]:
    """The parameters that are made together with the first of them."""
    if converter is None:
        return [name]
    first, *others = converter.target_patterns
    return [name, *(name.replace(first, other) for other in others)]


class _LayersPassed(Exception):
    """Ends the model's forward once what it was run for is recorded."""


def _stopped_at(attach: Callable[[Callable[..., None]], RemovableHandle], forward: Callable[[], object]) -> Any:
    """The last argument of the hook that is attached, when `forward` first calls it; what would follow does not run."""
    found: list[object] = []

    def keep(*arguments: object) -> None:
        found.append(arguments[-1])
        raise _LayersPassed

    hook = attach(keep)
    try:
        forward()
    except _LayersPassed:
        pass
    finally:
        hook.remove()
    return found[0]


def return_freed_memory() -> None:
    """Give freed heap pages back to the system, where the C library has a call for it (glibc).

    Without it the process grows with the number of layers: glibc does not reuse a freed block for an aligned allocation
    of the same size, as torch makes them, so the blocks of every layer come on top of those of the layers before.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _load_config(folder: Path) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """The config without its quantization_config, and that."""
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json; pass the folder of a transformers model") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    quantization = check_source_quantization(folder, data)
    config = read_config(folder)
    if quantization is not None:
        del config.quantization_config
    return config, quantization


def read_config(folder: Path) -> PreTrainedConfig:
    """What transformers makes of a folder's config.json. Raises UnsupportedModelError where the installed one cannot.

    Versions with checks of their own refuse valid configs too: 5.4 beside a newer huggingface_hub those of OLMoE and of
    ERNIE 4.5 VL, which it declares with integers where false stands.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} describes no model that transformers knows ({transformers.__version__}): {error}"
        ) from error


def auto_class(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """The auto class of transformers that makes the model a checkpoint was saved from, of those that write text.

    Raises UnsupportedModelError when there is none.
    """
    classes = [
        auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping
    ]
    if not classes:
        raise UnsupportedModelError(f"{config.model_type} is no causal language model that transformers knows")
    named = [c for c in classes if cast(type, c._model_mapping[type(config)]).__name__ in (config.architectures or ())]
    return (named or classes)[0]


def _build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    config.use_cache = False
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def _equal(one: object, two: object) -> bool:
    """Whether two arguments of a layer are the same, tensors by their values."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_equal(one[name], two[name]) for name in one)
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return type(one) is type(two) and (not isinstance(one, (int, float, str, bool)) or one == two)
