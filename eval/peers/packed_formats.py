"""Read the packed checkpoints of the peers: dense weights out of them, and the bits that they really store.

Two layouts cover the integer tools, both with a weight [out_features, in_features] in groups of g along the input.
Codes and zero points are packed into int32 words as one little-endian stream of bits along one dimension; a code may
cross words (3 bits: 32 codes in 3 words).

GPTQ (AutoRound, and GPTQModel's second version of it): qweight [in · bits / 32, out]; qzeros [in / g, out · bits / 32];
scales 16-bit [in / g, out]; optionally g_idx int32 [in], the group of each input.
compressed-tensors "pack-quantized" (llm-compressor): weight_packed [out, in · bits / 32]; weight_zero_point
[out · bits / 32, in / g]; weight_scale 16-bit [out, in / g]; weight_shape int64 [2].

llama.cpp: "<prefix>ggml_<TYPE>" uint8 [out, bytes of a row that is padded to whole blocks], read by the package gguf.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import load_file
from torch import Tensor

GPTQ_TENSORS = frozenset({"qweight", "qzeros", "scales", "g_idx"})
COMPRESSED_TENSORS = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"})
GGML_TYPES = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 2, "Q2_K": 2, "IQ3_XXS": 3, "IQ3_S": 3, "Q3_K": 3}
"""Type of llama.cpp's blocks -> the width of code that it competes with."""
GGML_TENSORS = frozenset(f"ggml_{name}" for name in GGML_TYPES)
MAX_RELATIVE_ERROR = 1.0
"""‖dense - original‖ / ‖original‖ of a weight of zeros. Rounding to 2 bits costs 0.45, error feedback takes it to 0.7;
codes read in a wrong order or with wrong zero points cost 1.4 and more."""


_EXPERT = re.compile(
    r"\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:experts\.(\d+)|shared_experts?)\."
    r"(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class ExpertName:
    """What the name of an expert's weight in a checkpoint says; expert: None for a shared one."""

    layer: int
    expert: int | None
    projection: str


def expert_name(name: str) -> ExpertName | None:
    """Of an expert's weight, as the hub stores it; None for every other tensor."""
    found = _EXPERT.search(name)
    if found is None:
        return None
    layer, expert, projection = found.groups()
    return ExpertName(int(layer), None if expert is None else int(expert), _MIXTRAL.get(projection, projection))


def names_in_tools(name: str) -> tuple[str, ...]:
    """What tools call a tensor that a Mixtral's checkpoint has by this name: that, or as transformers calls module and
    matrix in memory, or the matrix alone so. Other names are the same everywhere."""
    matrix = re.sub(r"\.(w[123])\.", lambda match: f".{_MIXTRAL[match[1]]}.", name)
    return tuple(dict.fromkeys((name, matrix, matrix.replace(".block_sparse_moe.", ".mlp."))))


def load_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@dataclass(frozen=True)
class StoredSize:
    """Bytes that a checkpoint stores for expert weights, by tensor kind ("qweight", "scales", …), and their number."""

    num_weights: int
    num_bytes: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(self.num_bytes.values()) / self.num_weights


def minimal_bits(bits: int, group_size: int) -> float:
    """Bits per weight of codes, one 16-bit scale and one zero point of `bits` bits a group, without any padding."""
    return bits + (16 + bits) / group_size


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Asymmetric rounding of [out, in] to the nearest of 2^bits levels per group; float32, scales rounded to float16.

    The range of a group is its minimum to its maximum with zero included, as the peers have it.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    levels = 2**bits - 1
    scale = ((high - low) / levels).half().float().clamp(min=torch.finfo(torch.float16).tiny)
    zero = (-low / scale).round().clamp(0, levels)
    codes = (groups / scale + zero).round().clamp(0, levels)
    return ((codes - zero) * scale).flatten(-2)


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Codes [..., 32 · n / bits] int64 out of int32 words [..., n] that hold them as one little-endian bit stream."""
    stream = (words.long().unsqueeze(-1) >> torch.arange(32)) & 1
    codes = stream.flatten(-2).unflatten(-1, (-1, bits))
    return (codes << torch.arange(bits)).sum(-1)


def dequantize_gptq(tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
    """Weight [out, in] float32. Zero points are stored as they are (AutoRound, and GPTQ's second format).

    How many bits a code has follows from in_features: a tool may give each projection a width of its own.
    """
    bits = 32 * tensors["qweight"].shape[0] // in_features
    codes = unpack_stream(tensors["qweight"].t(), bits)
    zeros = unpack_stream(tensors["qzeros"], bits).t()
    scales = tensors["scales"].t().float()
    in_features, num_groups = codes.shape[1], scales.shape[1]
    group = tensors.get("g_idx", torch.arange(in_features) // (in_features // num_groups)).long()
    return (codes - zeros[:, group]) * scales[:, group]


def dequantize_compressed_tensors(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Weight [out, in] float32. Signed codes and zero points are stored with 2^(bits - 1) added to both."""
    codes = unpack_stream(tensors["weight_packed"], bits)
    zeros = unpack_stream(tensors["weight_zero_point"].t(), bits).t()
    scales = tensors["weight_scale"].float()
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    return (codes - zeros[:, group]) * scales[:, group]


def dequantize_ggml(blocks: Tensor, type_name: str, in_features: int) -> Tensor:
    """Weight [out, in_features] float32 of llama.cpp's blocks, without the padding of a row."""
    values = gguf.quants.dequantize(blocks.numpy(), GGMLQuantizationType[type_name])
    return torch.from_numpy(values[:, :in_features].copy())


def ggml_bits(type_name: str) -> float:
    """Bits per weight of a block of that type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return 8 * size / block


def dense_checkpoint(
    packed: Mapping[str, Tensor], original: Mapping[str, Tensor], *, bits: int
) -> tuple[dict[str, Tensor], StoredSize]:
    """The original checkpoint with each expert weight as `packed` has it (float32), and what `packed` stores for them.

    packed, original: name -> tensor; which are an expert's weights is told by `expert_name`. Raises
    ValueError unless every expert weight is packed, is close to the original, and takes fewer bytes, and every other
    tensor is bit for bit the original's.
    """
    dense: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    num_weights = 0
    for name, weight in original.items():
        if expert_name(name) is None:
            stored_name = next((n for n in names_in_tools(name) if n in packed), None)
            if stored_name is None or not torch.equal(packed[stored_name].to(weight.dtype), weight):
                raise ValueError(f"{name} is no expert weight and was changed or left out by the tool")
            dense[name] = weight
            continue
        prefix = name.removesuffix("weight")
        kinds = GPTQ_TENSORS | COMPRESSED_TENSORS | GGML_TENSORS
        stored = {
            kind: packed[stem + kind] for stem in names_in_tools(prefix) for kind in kinds if stem + kind in packed
        }
        if "qweight" in stored:
            dense[name] = dequantize_gptq(stored, weight.shape[1])
        elif GGML_TENSORS & stored.keys():
            kind, blocks = next(iter(stored.items()))
            dense[name] = dequantize_ggml(blocks, kind.removeprefix("ggml_"), weight.shape[1])
        elif "weight_packed" in stored:
            dense[name] = dequantize_compressed_tensors(stored, bits)
        else:
            raise ValueError(f"{name} was not quantized: the tool's checkpoint holds no codes for it")
        if dense[name].shape != weight.shape:
            raise ValueError(f"{name} unpacks to {list(dense[name].shape)}, the original is {list(weight.shape)}")
        error = ((dense[name] - weight.float()).norm() / weight.float().norm()).item()
        if not error <= MAX_RELATIVE_ERROR:
            raise ValueError(f"{name} unpacks to a relative error of {error:.2f}; the layout is not the one read here")
        for kind, tensor in stored.items():
            sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
        num_weights += weight.numel()
    size = StoredSize(num_weights, sizes)
    assert_experts_shrank(size, sum(tensor.nbytes for name, tensor in original.items() if expert_name(name)))
    return dense, size


def assert_experts_shrank(size: StoredSize, original_bytes: int) -> None:
    """ValueError unless the experts take less than a third of their bytes before (3 bits of 16 are a fifth)."""
    stored = sum(size.num_bytes.values())
    if not 0 < stored < original_bytes / 3:
        raise ValueError(f"experts take {stored} bytes of {original_bytes} before: the tool did not quantize them")
