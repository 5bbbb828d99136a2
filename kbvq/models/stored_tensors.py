"""The tensors of a checkpoint as they are stored: their headers, and their values on demand.

Some checkpoints are published in less than 16 bits: FP8 with a scale for each block of 128 × 128 (`X` beside
`X_scale_inv`; DeepSeek-V3, MiniMax-M2, the FP8 editions of others), or MXFP4 (`X_blocks` beside `X_scales`; gpt-oss).
Here such a pair is one tensor, decoded when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kbvq.errors import CheckpointError

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors dtypes that a weight may have."""

TABLE_DTYPES = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
"""And those of tables of integers, which some models keep beside their weights."""

DECODED = "BF16"
"""What a weight of less than 16 bits is written as where it is not packed: the dtype those models are made for."""

_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_MXFP4_GROUP = 32  # weights that share an exponent


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, as the headers describe it.

    dtype: in safetensors notation, e.g. "BF16"; DECODED for a pair that is decoded. shape: decoded. num_bytes: on disk.
    parts: names of the stored tensors that it is read from, one, or two: values and scales. scheme: how the two make
    one, "fp8" or "mxfp4".
    """

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    parts: tuple[str, ...]
    scheme: str | None = None


class StoredTensors:
    """Every tensor of a folder of safetensors shards, by its name in the files.

    tensors: one for each pair of values and scales. shards: the files that hold them.

    Raises CheckpointError for a missing or damaged file and for a pair that is not what `quantization` says.
    """

    def __init__(self, folder: Path, quantization: Mapping[str, Any] | None = None) -> None:
        """quantization: the checkpoint's quantization_config (`check_source_quantization`), None without one."""
        quantization = quantization or {}
        self._raw = _read_headers(folder)
        self._block = quantization.get("weight_block_size")
        self.shards = sorted({stored.shard for stored in self._raw.values()})
        self.tensors = dict(self._raw)
        if quantization.get("quant_method") == "fp8":
            self._pair_("fp8", "", "_scale_inv", self._fp8_shape)
        elif quantization.get("quant_method") == "mxfp4":
            self._pair_("mxfp4", "_blocks", "_scales", self._mxfp4_shape)

    def _pair_(
        self, scheme: str, values: str, scales: str, decoded_shape: Callable[[str, str], tuple[int, ...]]
    ) -> None:
        """Make one tensor of each name with both suffixes."""
        for scales_name in [name for name in self._raw if name.endswith(scales)]:
            name = scales_name.removesuffix(scales)
            parts = name + values, scales_name
            if parts[0] not in self._raw:
                raise CheckpointError(
                    f"{self._raw[scales_name].shard} has {scales_name} and no shard has {parts[0]}; get a complete "
                    "copy of the checkpoint"
                )
            shape = decoded_shape(*parts)
            num_bytes = sum(self._raw[part].num_bytes for part in parts)
            for part in parts:
                del self.tensors[part]
            self.tensors[name] = StoredTensor(self._raw[parts[0]].shard, DECODED, shape, num_bytes, parts, scheme)

    def _fp8_shape(self, values: str, scales: str) -> tuple[int, ...]:
        shape, grid = self._raw[values].shape, self._raw[scales].shape
        self._check_dtype(values, ("F8_E4M3", "F8_E5M2"))
        self._check_dtype(scales, _SCALES)
        if self._block is None:
            expected = shape[:-2]  # one scale for each matrix
            fits = math.prod(grid) == math.prod(expected)
        else:
            expected = (*shape[:-2], *(-(-size // block) for size, block in zip(shape[-2:], self._block, strict=True)))
            fits = grid == expected
        if len(shape) < 2 or not fits:
            raise CheckpointError(
                f"{self._raw[scales].shard}: {scales} is {list(grid)}, blocks of {self._block} of {values} "
                f"{list(shape)} need {list(expected)}; config.json and shards do not belong together"
            )
        return shape

    def _mxfp4_shape(self, values: str, scales: str) -> tuple[int, ...]:
        shape = self._raw[values].shape
        self._check_dtype(values, ("U8",))
        self._check_dtype(scales, ("U8",))
        if len(shape) != 4 or shape[-1] != _MXFP4_GROUP // 2 or self._raw[scales].shape != shape[:-1]:
            raise CheckpointError(
                f"{self._raw[values].shard}: {values} {list(shape)} and {scales} {list(self._raw[scales].shape)} are "
                f"not [experts, rows, groups, {_MXFP4_GROUP // 2}] and [experts, rows, groups]; get an intact copy"
            )
        return shape[0], shape[2] * _MXFP4_GROUP, shape[1]

    def _check_dtype(self, name: str, wanted: tuple[str, ...]) -> None:
        stored = self._raw[name]
        if stored.dtype not in wanted:
            raise CheckpointError(
                f"{stored.shard}: {name} is stored as {stored.dtype}; kbvq reads {', '.join(wanted)} there: convert "
                "the checkpoint to bfloat16 first"
            )

    @contextmanager
    def open(self) -> Iterator[Callable[..., Tensor]]:
        """`fetch(name, *, device="cpu", dtype=None)`, the tensor of that name on a device; shards are opened when first
        needed, and closed at the end. dtype: of a tensor that is decoded (None for DECODED); others come as stored."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def read(name: str, device: torch.device | str) -> Tensor:
                shard = self._raw[name].shard
                if shard not in opened:
                    opened[shard] = stack.enter_context(safe_open(shard, framework="pt"))
                return opened[shard].get_tensor(name).to(device)

            def fetch(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
                stored = self.tensors[name]
                parts = [read(part, device) for part in stored.parts]
                if stored.scheme is None:
                    return parts[0]
                dtype = dtype or STORED_DTYPES[DECODED]
                if stored.scheme == "mxfp4":
                    return decode_mxfp4(*parts, dtype=dtype)
                return decode_fp8(*parts, block=self._block, dtype=dtype)

            yield fetch


def check_source_quantization(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint that kbvq can read, None without one.

    Raises CheckpointError for a checkpoint that is quantized in another way.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method", "an unnamed method")
    if method not in ("fp8", "mxfp4"):
        raise CheckpointError(
            f"{folder} is already quantized by {method}; pass the original model, unquantized or published in FP8 or "
            "MXFP4"
        )
    block = quantization.get("weight_block_size")
    if block is not None and not (len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise CheckpointError(f"{folder}/config.json: weight_block_size {block} is not two sizes; get an intact copy")
    return dict(quantization)


def decode_fp8(values: Tensor, scales: Tensor, *, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """values [..., N, K] in a float8, scales [..., ⌈N/b⌉, ⌈K/c⌉] for blocks of b × c, or one for each matrix where
    `block` is None -> [..., N, K] in `dtype`, multiplied in float32.

    The last blocks may be cut short, as in DeepSeek-V3, whose kv_a_proj_with_mqa has 576 rows: transformers' own
    `Fp8Dequantize` refuses those.
    """
    decoded = torch.empty(values.shape, dtype=dtype, device=values.device)
    rows, columns = values.shape[-2:]
    b, c = block or (rows, columns)
    grid = scales.reshape(-1, -(-rows // b), -(-columns // c)).float()
    for index, matrix in enumerate(values.reshape(-1, rows, columns)):  # one by one: float32 is four times the memory
        scale = grid[index].repeat_interleave(b, 0)[:rows].repeat_interleave(c, 1)[:, :columns]
        decoded.view(-1, rows, columns)[index] = matrix.float() * scale
    return decoded


def decode_mxfp4(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """blocks [E, N, G, 16], two weights in a byte, scales [E, N, G], the exponents plus 127 -> [E, 32 G, N] in `dtype`,
    transposed as gpt-oss computes with it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, rows, groups, _ = blocks.shape
    decoded = torch.empty(experts, groups * _MXFP4_GROUP, rows, dtype=dtype, device=blocks.device)
    for expert in range(experts):  # one by one: the library's function needs several times their memory
        one = slice(expert, expert + 1)
        decoded[one] = convert_moe_packed_tensors(blocks[one], scales[one], dtype=dtype)
    return decoded


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every stored tensor of a folder by its name, from the headers of the shards."""
    index = folder / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error!r}") from error
    shards = sorted(set(weight_map.values())) or ["model.safetensors"]
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; kbvq needs the complete checkpoint as safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    header = file.get_slice(key)
                    dtype, shape = header.get_dtype(), tuple(header.get_shape())
                    num_bytes = math.prod(shape) * _ITEM_SIZES.get(dtype, 0)  # others are refused where they are used
                    stored[key] = StoredTensor(path, dtype, shape, num_bytes, (key,))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from error
    for key, shard in weight_map.items():
        if key not in stored:
            raise CheckpointError(f"{folder / shard} lacks {key}, which the index places there; download both again")
    return stored


_ITEM_SIZES = {name: dtype.itemsize for name, dtype in (STORED_DTYPES | TABLE_DTYPES).items()} | {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
