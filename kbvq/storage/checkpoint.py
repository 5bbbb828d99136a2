"""The packed checkpoint on disk: write it, describe it from its headers, verify it.

A folder that plain transformers loads: safetensors shards with the names of the model in memory, `config.json` with
`quantization_config`, the tokenizer, and four files of our own: `kbvq_run.json` (how it was made),
`kbvq_manifest.json` (SHA-256 of every other file; safetensors itself accepts a flipped bit), `kbvq_timing.json` and
`kbvq_metrics.jsonl` (seconds; outside the manifest, so that equal runs give equal manifests).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kbvq.errors import CheckpointError
from kbvq.storage.files import check_file, copy_file, file_fingerprint, read_json, write_json, write_tensors
from kbvq.structures import PROJECTIONS, WEIGHT, BankFormat, MatrixFormat, ProjectionFormat, TensorSpec, tensor_name

FORMAT_VERSION = 1
INDEX = "model.safetensors.index.json"
MANIFEST = "kbvq_manifest.json"
RUN_RECORD = "kbvq_run.json"
TIMING = "kbvq_timing.json"
METRICS = "kbvq_metrics.jsonl"

COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is copied from the source where it exists. Never code: a packed checkpoint needs no trust_remote_code."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors reads no longer one."""


PackedFormat = BankFormat | MatrixFormat
"""What config.json describes of a packed checkpoint."""


class TensorHeader(NamedTuple):
    """A stored tensor as its file's header describes it; `num_bytes` is what it occupies on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


class PackedCheckpointWriter:
    """Writes the files of a packed checkpoint into `folder`, each whole and on the disk before it has its name.

    Files of equal content for equal inputs. The number of shards is known beforehand, so each gets its final name at
    once, and a run that was interrupted goes on with the shards that are there.
    """

    def __init__(self, folder: Path, num_shards: int) -> None:
        self.folder, self.num_shards = Path(folder), num_shards

    def shard_name(self, index: int) -> str:
        """The name that transformers looks for."""
        if self.num_shards == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def write_shard(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write one safetensors file now; nothing of it is kept in memory. Returns its fingerprint.

        Raises CheckpointError when the file cannot be written.
        """
        return write_tensors(self.folder / self.shard_name(index), tensors)

    def finish(
        self,
        config: Mapping[str, Any],
        quantization_config: Mapping[str, Any],
        packed: Iterable[PackedFormat],
        source_folder: Path,
        run_record: Mapping[str, Any],
        unhashed: Mapping[str, Path | Mapping[str, Any]] | None = None,
    ) -> None:
        """Complete the folder; may be repeated after an interruption.

        config: the source's config.json. quantization_config: what is added to it. packed: what it describes.
        source_folder: where the tokenizer and the generation config are copied from.
        run_record: how the checkpoint was made; no times, or equal runs would differ. Those go to `unhashed`: files
            outside the manifest by name, each a file to copy or data for JSON.

        Raises CheckpointError when a tensor is missing, stored twice, or not as the format of its bank or matrix says,
        or when a file cannot be written.
        """
        shards = [self.shard_name(index) for index in range(self.num_shards)]
        weight_map: dict[str, str] = {}
        headers: dict[str, TensorHeader] = {}
        for shard in shards:
            of_shard = _read_one_header(self.folder / shard)
            if repeated := sorted(headers.keys() & of_shard.keys()):
                raise CheckpointError(f"{repeated[0]} is written twice; every tensor belongs to one shard")
            headers |= of_shard
            weight_map |= dict.fromkeys(of_shard, shard)
        for format in packed:
            check_packed_tensors(format, headers)
        names = [*shards, "config.json", RUN_RECORD]
        if self.num_shards > 1:
            total_size = sum(header.num_bytes for header in headers.values())
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            write_json(self.folder / INDEX, index)
            names.append(INDEX)
        write_json(self.folder / "config.json", {**config, "quantization_config": quantization_config})
        for name in COPIED_FILES:
            if (Path(source_folder) / name).is_file():
                copy_file(Path(source_folder) / name, self.folder / name)
                names.append(name)
        write_json(self.folder / RUN_RECORD, run_record)
        for name, content in (unhashed or {}).items():
            if isinstance(content, Path):
                copy_file(content, self.folder / name)
            else:
                write_json(self.folder / name, content)
        manifest = {name: file_fingerprint(self.folder / name) for name in sorted(names)}
        write_json(self.folder / MANIFEST, {"files": manifest})


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a safetensors checkpoint by name, from the headers of its shards alone.

    Raises CheckpointError for a missing, truncated or unreadable shard, or one that contradicts the index.
    """
    folder = Path(folder)
    index_path = folder / INDEX
    if not index_path.exists():
        if not (folder / "model.safetensors").exists():
            raise CheckpointError(f"{folder} holds neither model.safetensors nor {index_path.name}; check the path")
        return read_file_headers([folder / "model.safetensors"])
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map from tensor to file; fetch the checkpoint again")
    headers = read_file_headers([folder / file for file in sorted(set(weight_map.values()))])
    missing = sorted(weight_map.keys() - headers.keys())
    if missing:
        raise CheckpointError(f"{folder}: the index lists {missing[0]}, no shard holds it; fetch the checkpoint again")
    return headers


def read_file_headers(files: Iterable[str | Path]) -> dict[str, TensorHeader]:
    """As `read_headers`, for given safetensors files."""
    headers: dict[str, TensorHeader] = {}
    for file in map(Path, files):
        for name, header in _read_one_header(file).items():
            if name in headers:
                raise CheckpointError(f"{file}: {name} is stored in another shard too; fetch the checkpoint again")
            headers[name] = header
    return headers


def check_packed_tensors(packed: PackedFormat, headers: Mapping[str, TensorHeader]) -> None:
    """Raises CheckpointError unless every tensor of it is stored with the shape and dtype of its format."""
    for name, spec in packed.tensors().items():
        if name not in headers:
            raise CheckpointError(f"{name} is missing from the packed checkpoint; fetch or quantize it again")
        header = headers[name]
        if (header.shape, header.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(
                f"{name} is stored as {list(header.shape)} {header.dtype}, its format says {list(spec.shape)} "
                f"{spec.dtype}; fetch or quantize the checkpoint again"
            )


def check_packed_contents(packed: Iterable[PackedFormat], files: Iterable[str | Path]) -> None:
    """Raises CheckpointError for a value of the packed tensors that is not finite or outside the bounds of its format.

    The kernels look tables up by what is stored: a group that does not exist would be read past them. Codes are not
    read; any byte is one. `files` are those whose headers `check_packed_tensors` has passed.
    """
    stored = [item for format in packed for item in format.tensors().items()]
    specs = {name: spec for name, spec in stored if spec.bounds or spec.dtype.is_floating_point}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in sorted(specs.keys() & set(tensors.keys())):
                    _check_values(name, specs[name], tensors.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}; fetch it again") from error


def _check_values(name: str, spec: TensorSpec, tensor: Tensor) -> None:
    """Raises CheckpointError for a value that is not finite or outside the bounds of `spec`."""
    if spec.dtype.is_floating_point and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} holds values that are NaN or infinite; fetch or quantize the checkpoint again")
    if spec.bounds and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < spec.bounds[0] or high > spec.bounds[1]:
            raise CheckpointError(
                f"{name} holds values in [{low}, {high}], its format says {list(spec.bounds)}; fetch or quantize the "
                "checkpoint again"
            )


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """What a packed checkpoint holds, from config.json and the headers: bytes are those on disk.

    bits_per_weight: 8 · bytes of every tensor that replaces expert weights / number of expert weights replaced.
    code_bits: the same of the codes alone. dense: the packed matrices outside the banks, in the same numbers.
    model_bytes, model_weights, model_bits_per_weight: of the whole model (`whole_model`).

    Raises CheckpointError when the folder is not a packed checkpoint or a tensor contradicts its format.
    """
    config = _quantization_config(Path(folder))
    if config.get("quant_method") != "kbvq" or not isinstance(config.get("banks"), list):
        raise CheckpointError(f"{folder} is not a packed checkpoint: config.json has no kbvq quantization_config")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {config.get('format_version')}, this kbvq reads {FORMAT_VERSION}; "
            "upgrade kbvq, or quantize the model again"
        )
    headers = read_headers(folder)
    banks, dense = [], []
    formats: list[PackedFormat] = []
    total = {"weights": 0, "bytes": 0, "code_bytes": 0}
    for bank in map(BankFormat.from_dict, config["banks"]):
        check_packed_tensors(bank, headers)
        projections = {}
        for projection in PROJECTIONS:
            counts = _counts(bank.path, projection, getattr(bank, projection), headers)
            projections[projection] = getattr(bank, projection).to_dict() | counts | _bits(counts)
            total = {key: total[key] + counts[key] for key in total}
        banks.append({"path": bank.path, "kind": bank.kind, "experts": list(bank.experts), **projections})
        formats.append(bank)
    for matrix in map(MatrixFormat.from_dict, config.get("dense", [])):
        check_packed_tensors(matrix, headers)
        counts = _counts(matrix.path, WEIGHT, matrix.weight, headers)
        dense.append(matrix.to_dict() | counts | _bits(counts))
        formats.append(matrix)
    whole = whole_model(headers, formats)
    return {
        "format_version": FORMAT_VERSION,
        "kbvq_version": config.get("kbvq_version"),
        "recipe": config.get("recipe"),
        **_bits(total),
        **total,
        "model_bytes": whole["bytes"],
        "model_weights": whole["weights"],
        "model_bits_per_weight": whole["bits_per_weight"],
        "banks": banks,
        "dense": dense,
    }


def whole_model(headers: Mapping[str, TensorHeader], packed: Iterable[PackedFormat]) -> dict[str, float]:
    """Of all tensors: their bytes on disk, the weights that they are or replace, and bits per weight."""
    replacing: set[str] = set()
    weights = 0
    for format in packed:
        replacing |= format.tensors().keys()
        if isinstance(format, MatrixFormat):
            weights += format.weight.num_weights
        else:
            weights += sum(getattr(format, projection).num_weights for projection in PROJECTIONS)
    weights += sum(math.prod(header.shape) for name, header in headers.items() if name not in replacing)
    num_bytes = sum(header.num_bytes for header in headers.values())
    return {"bytes": num_bytes, "weights": weights, "bits_per_weight": 8 * num_bytes / max(weights, 1)}


def verify_checkpoint(folder: Path) -> dict[str, int]:
    """Compare every file with the manifest's size and SHA-256.

    Returns the number of files and of bytes that were read. Raises CheckpointError naming the first file that is
    missing or differs.
    """
    folder = Path(folder)
    expected = read_json(folder / MANIFEST).get("files")
    if not isinstance(expected, dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no files; fetch the checkpoint again")
    num_bytes = 0
    for name, fingerprint in expected.items():
        check_file(folder / name, fingerprint, "fetch the checkpoint again")
        num_bytes += fingerprint["bytes"]
    return {"files": len(expected), "bytes": num_bytes}


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raises CheckpointError when the disk of `folder` (which need not exist yet) has less than `needed_bytes` free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder} needs about {needed_bytes:,} bytes and its disk has {free:,} free; "
            "free some space, or choose another output folder"
        )


def _counts(
    path: str, projection: str, format: ProjectionFormat, headers: Mapping[str, TensorHeader]
) -> dict[str, int]:
    stored = {name: headers[tensor_name(path, projection, name)].num_bytes for name in format.tensors()}
    return {"weights": format.num_weights, "bytes": sum(stored.values()), "code_bytes": stored["codes"]}


def _bits(counts: Mapping[str, int]) -> dict[str, float]:
    weights = max(counts["weights"], 1)
    return {"bits_per_weight": 8 * counts["bytes"] / weights, "code_bits": 8 * counts["code_bytes"] / weights}


def _read_one_header(file: Path) -> dict[str, TensorHeader]:
    damaged = f"{file} is not a complete safetensors file; fetch it again"
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(damaged)
            entries = json.loads(stream.read(length), object_pairs_hook=_without_repeats)
        entries.pop("__metadata__", None)
        headers, places = {}, []
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            headers[name] = TensorHeader(SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), end - begin)
            places.append((begin, end, name))
            if not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"])):
                raise CheckpointError(f"{damaged} ({name} has no shape and place in the file)")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}; check the path") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(damaged) from error
    filled = 0
    for begin, end, name in sorted(places):
        if begin != filled or headers[name].num_bytes != math.prod(headers[name].shape) * headers[name].dtype.itemsize:
            raise CheckpointError(f"{damaged} ({name} does not fill its place)")
        filled = end
    if size != 8 + length + filled:
        raise CheckpointError(damaged)
    return headers


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ; of two equal ones readers disagree which counts."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is repeated")
    return values


def _quantization_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json").get("quantization_config")
    return config if isinstance(config, dict) else {}


def is_packed_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and _quantization_config(folder).get("quant_method") == "kbvq"
