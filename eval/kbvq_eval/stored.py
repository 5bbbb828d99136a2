"""What checkpoints of any tool store, by the headers of their files: all tensors, and those of the experts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from kbvq.storage.checkpoint import inspect_checkpoint, is_packed_checkpoint, read_file_headers

_EXPERTS = re.compile(
    r"\.experts\.|\.shared_experts?\."  # as the hub and the tools that keep its names store them
    r"|^blk\.\d+\.ffn_(gate|up|down|gate_up)_(exps|shexp)\."  # as llama.cpp does
)


@dataclass(frozen=True)
class Stored:
    """Bytes and elements of a checkpoint's tensors, and of those that stand under the experts' names, shared ones too.

    Where weights are packed, the number of elements is that of the words that hold them.
    """

    num_bytes: int
    num_elements: int
    expert_bytes: int
    expert_elements: int


def stored(model: Path) -> Stored | None:
    """Of a folder of safetensors or a .gguf file; None for anything else."""
    if model.suffix == ".gguf" and model.is_file():
        from gguf import GGUFReader

        tensors = [(t.name, int(t.n_bytes), int(t.n_elements)) for t in GGUFReader(model).tensors]
    elif model.is_dir() and (files := sorted(model.glob("*.safetensors"))):
        headers = read_file_headers(files)
        tensors = [(name, header.num_bytes, math.prod(header.shape)) for name, header in headers.items()]
    else:
        return None
    experts = [entry for entry in tensors if _EXPERTS.search(entry[0])]
    return Stored(*(sum(entry[place] for entry in some) for some in (tensors, experts) for place in (1, 2)))


@dataclass(frozen=True)
class Size:
    """bits: per expert weight, with everything that is stored under the experts' names. model_bits: per parameter of
    the whole model, with everything that is stored. num_bytes: of all tensors. None where it cannot be told."""

    bits: float | None = None
    model_bits: float | None = None
    num_bytes: int | None = None


def size(model: Path, original: Stored | None) -> Size:
    """Of a checkpoint; the weights are counted in the original, because packed ones are counted in words."""
    found = stored(model)
    if found is None:
        return Size()
    if original is None:
        return Size(num_bytes=found.num_bytes)
    bits = None
    if is_packed_checkpoint(model):
        bits = inspect_checkpoint(model)["bits_per_weight"]
    elif found.expert_bytes and original.expert_elements:
        bits = 8 * found.expert_bytes / original.expert_elements
    return Size(bits, 8 * found.num_bytes / original.num_elements, found.num_bytes)
