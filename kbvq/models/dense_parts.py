"""The matrices of a model outside its banks of experts: which of them can be packed, and why the others cannot.

Attention projections, dense MLPs, shared experts that are no bank, the embedding and the head. Routers stay as they
are: they are small, and a token that is sent to another expert cannot be corrected behind it. Norms and convolutions
are no matrices of this kind.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from kbvq.errors import ConfigError
from kbvq.models.moe_adapters import ExpertBank, decoder_layers
from kbvq.recipes import dense_format
from kbvq.structures import MatrixFormat

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of modules that decide how much an expert has to say, and of those that hold them."""


@dataclass(frozen=True)
class DenseParts:
    """formats: of the matrices to be packed, in the order of the model's modules; the embedding and the head among
    them. decoder_layers: path -> index of the decoder layer, of those that are in one. left: path -> why it stays at 16
    bits, of the others."""

    formats: list[MatrixFormat]
    decoder_layers: dict[str, int]
    left: dict[str, str]

    def of_layer(self, index: int) -> list[MatrixFormat]:
        return [format for format in self.formats if self.decoder_layers.get(format.path) == index]

    @property
    def inside(self) -> list[MatrixFormat]:
        """Those in decoder layers."""
        return [format for format in self.formats if format.path in self.decoder_layers]

    @property
    def ends(self) -> list[MatrixFormat]:
        """The embedding and the head, as far as they are packed."""
        return [format for format in self.formats if format.path not in self.decoder_layers]

    @property
    def embedding(self) -> MatrixFormat | None:
        return next((format for format in self.ends if format.kind == "embedding"), None)

    @property
    def head(self) -> MatrixFormat | None:
        """The head, where it is packed for itself."""
        return next((format for format in self.ends if format.kind == "linear"), None)


NOTHING = DenseParts([], {}, {})


def find_dense_parts(
    model: PreTrainedModel,
    banks: Iterable[ExpertBank],
    bits: int,
    *,
    keeps_float32: Callable[[str], bool],
    is_tied: Callable[[str, str], bool],
) -> DenseParts:
    """What is packed at 8 or 4 bits. The model may be on the meta device.

    keeps_float32: whether a parameter stays in float32 whatever the model's dtype. is_tied: whether the weights of head
    and embedding, by their names, are one.
    """
    layers_path = decoder_layers(model)[1]
    in_banks = tuple(f"{bank.path}." for bank in banks)
    paths = {id(module): path for path, module in model.named_modules()}
    ends = [paths.get(id(end), "") for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    embedding, head = (path if path else None for path in ends)
    formats: list[MatrixFormat] = []
    of_layer: dict[str, int] = {}
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        if path.startswith(in_banks) or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        in_layers = path.startswith(f"{layers_path}.")
        if path not in (embedding, head) and (not in_layers or not isinstance(module, nn.Linear)):
            left[path] = "it is neither in the decoder layers nor the embedding or the head"
            continue
        tied = head is not None and embedding is not None and is_tied(f"{head}.weight", f"{embedding}.weight")
        if path == head and tied:
            if embedding in left:
                left[path] = f"it is tied to {embedding}"
            continue
        together = [path, head] if path == embedding and tied else [path]
        reasons = [_why_left(model, str(name), keeps_float32) for name in together]
        if reason := next(filter(None, reasons), None):
            left[path] = reason
            continue
        try:
            weight = dense_format(*module.weight.shape, bits)
        except ConfigError as error:
            left[path] = str(error)
            continue
        kind = "embedding" if path == embedding else "linear"
        formats.append(MatrixFormat(path, kind, weight, tied_head=str(head) if path == embedding and tied else ""))
        if in_layers:
            of_layer[path] = int(path.removeprefix(f"{layers_path}.").partition(".")[0])
    return DenseParts(formats, of_layer, left)


def _why_left(model: PreTrainedModel, path: str, keeps_float32: Callable[[str], bool]) -> str | None:
    owner_path, _, name = path.rpartition(".")
    owner, module = model.get_submodule(owner_path), model.get_submodule(path)
    if type(module) not in (nn.Linear, nn.Embedding):
        return f"it is a {type(module).__name__}"
    classes = [type(model.get_submodule(owner_path.rsplit(".", n)[0])).__name__ for n in range(owner_path.count("."))]
    if any(part in _ROUTERS for part in path.split(".")) or any("Router" in c or "Gating" in c for c in classes):
        return "it belongs to a router"
    if keeps_float32(f"{path}.weight"):
        return "the model keeps it in float32"
    for cls in (type(owner), type(model)):
        if name in _weights_read(cls):
            return f"{cls.__name__} reads its weight directly"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it renormalises its rows"
    return None


@cache
def _weights_read(cls: type) -> frozenset[str]:
    """The modules `name` of which the code of a class takes `….name.weight` or `.bias` instead of calling them; where
    it looks at the device alone, a packed module does as well."""
    found, of_device = set(), set()
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "builtins")) or base in PreTrainedModel.__mro__:
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and node.attr == "device":
                of_device.add(id(node.value))
            is_weight = isinstance(node, ast.Attribute) and node.attr in ("weight", "bias")
            if is_weight and isinstance(node.value, ast.Attribute) and id(node) not in of_device:
                found.add(node.value.attr)
    return frozenset(found)
