"""The packed checkpoint on disk: write it, describe it from its headers, verify it.

A folder that plain transformers loads: safetensors shards with the names of the model in memory, `config.json` with
`quantization_config`, the tokenizer, and three files of our own: `kbvq_run.json` (how it was made),
`kbvq_manifest.json` (SHA-256 of every other file; safetensors itself accepts a flipped bit) and `kbvq_timing.json`
(seconds; outside the manifest, so that equal runs give equal manifests).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kbvq.errors import CheckpointError
from kbvq.structures import PROJECTIONS, BankFormat, TensorSpec, tensor_name

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "kbvq_manifest.json"
RUN_RECORD = "kbvq_run.json"
TIMING = "kbvq_timing.json"

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


class TensorHeader(NamedTuple):
    """A stored tensor as its file's header describes it; `num_bytes` is what it occupies on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


class PackedCheckpointWriter:
    """Writes a packed checkpoint shard by shard into `<output>.partial`, and moves it to `output` at the end.

    An existing folder stays as it is until `finish` has everything on disk. Equal inputs give identical files.

    Raises CheckpointError, at construction, when `output` is not empty and `overwrite` is False, or when
    overwriting would delete something that is not a packed checkpoint.
    """

    _MARKER = ".kbvq_partial"

    def __init__(self, output: Path, overwrite: bool = False) -> None:
        self.output = Path(output).absolute()
        self.partial = self.output.with_name(self.output.name + ".partial")
        self._replaced = self.output.with_name(self.output.name + ".replaced")
        self._headers: dict[str, TensorHeader] = {}
        self._shard_names: list[list[str]] = []
        self._check_output(overwrite)
        self._start_partial()

    def add_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file now; nothing of it is kept in memory.

        Raises CheckpointError when a name was written before or the file cannot be written.
        """
        repeated = sorted(self._headers.keys() & tensors.keys())
        if repeated:
            raise CheckpointError(f"{repeated[0]} is written twice; every tensor belongs to one shard")
        path = self._shard_path(len(self._shard_names))
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(stored, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} could not be written: {error}; free some space, or choose another output folder"
            ) from error
        self._shard_names.append(sorted(stored))
        for name, tensor in stored.items():
            self._headers[name] = TensorHeader(tensor.dtype, tuple(tensor.shape), tensor.nbytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors written so far."""
        return sum(header.num_bytes for header in self._headers.values())

    def finish(
        self,
        config: Mapping[str, Any],
        quantization_config: Mapping[str, Any],
        banks: Iterable[BankFormat],
        source_folder: Path,
        run_record: Mapping[str, Any],
        timing: Mapping[str, Any] | None = None,
    ) -> None:
        """Complete the folder and move it to `output`.

        config: the source's config.json. quantization_config: what is added to it.
        source_folder: where the tokenizer and the generation config are copied from.
        run_record: how the checkpoint was made; no times, or equal runs would differ. Those go to `timing`.

        Raises CheckpointError when a tensor of a bank was not written as its format says, or when the folder
        cannot be moved; a folder that was to be replaced is put back then.
        """
        for bank in banks:
            check_bank_tensors(bank, self._headers)
        try:
            self._name_shards()
            _write_json(self.partial / "config.json", {**config, "quantization_config": quantization_config})
            for name in COPIED_FILES:
                if (Path(source_folder) / name).is_file():
                    shutil.copyfile(Path(source_folder) / name, self.partial / name)
            _write_json(self.partial / RUN_RECORD, run_record)
            (self.partial / self._MARKER).unlink()
            manifest = {p.name: _fingerprint(p) for p in sorted(self.partial.iterdir())}
            _write_json(self.partial / MANIFEST, {"files": manifest})
            if timing is not None:
                _write_json(self.partial / TIMING, timing)
            self._move_to_output()
        except OSError as error:
            raise CheckpointError(
                f"{self.output} could not be completed: {error}; what was written is in {self.partial}"
            ) from error

    def _check_output(self, overwrite: bool) -> None:
        if self._replaced.exists():
            raise CheckpointError(
                f"{self._replaced} holds a checkpoint that an interrupted run was replacing; move it back or delete it"
            )
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise CheckpointError(f"{self.output} is a file; choose another output folder")
        if not any(self.output.iterdir()):
            return
        if not overwrite:
            raise CheckpointError(f"{self.output} is not empty; pass --overwrite to replace it, or choose another")
        if not _is_packed_checkpoint(self.output):
            raise CheckpointError(
                f"{self.output} is not a packed checkpoint, and overwriting would delete what it holds; "
                "choose another output folder, or empty this one"
            )

    def _start_partial(self) -> None:
        if self.partial.exists():
            if not (self.partial / self._MARKER).is_file():
                raise CheckpointError(f"{self.partial} is in the way and was not made by kbvq; move or delete it")
            logger.warning("removing %s, left by an interrupted run", self.partial)
            shutil.rmtree(self.partial)
        try:
            self.partial.mkdir(parents=True)
            (self.partial / self._MARKER).touch()
        except OSError as error:
            raise CheckpointError(f"{self.partial} cannot be created: {error}; choose another output folder") from error

    def _shard_path(self, index: int) -> Path:
        return self.partial / f"shard-{index + 1:05d}.safetensors"

    def _name_shards(self) -> None:
        """Give the shards the names that transformers looks for, now that their number is known."""
        total = len(self._shard_names)
        if total == 1:
            self._shard_path(0).rename(self.partial / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shard_names):
            file = f"model-{index + 1:05d}-of-{total:05d}.safetensors"
            self._shard_path(index).rename(self.partial / file)
            weight_map |= dict.fromkeys(names, file)
        index_json = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        _write_json(self.partial / "model.safetensors.index.json", index_json)

    def _move_to_output(self) -> None:
        if not self.output.exists():
            self.partial.rename(self.output)
            return
        self.output.rename(self._replaced)
        try:
            self.partial.rename(self.output)
        except OSError:
            self._replaced.rename(self.output)
            raise
        shutil.rmtree(self._replaced)


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a safetensors checkpoint by name, from the headers of its shards alone.

    Raises CheckpointError for a missing, truncated or unreadable shard, or one that contradicts the index.
    """
    folder = Path(folder)
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        if not (folder / "model.safetensors").exists():
            raise CheckpointError(f"{folder} holds neither model.safetensors nor {index_path.name}; check the path")
        return read_file_headers([folder / "model.safetensors"])
    weight_map = _read_json(index_path).get("weight_map")
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


def check_bank_tensors(bank: BankFormat, headers: Mapping[str, TensorHeader]) -> None:
    """Raises CheckpointError unless every tensor of the bank is stored with the shape and dtype of its format."""
    for name, spec in bank.tensors().items():
        if name not in headers:
            raise CheckpointError(f"{name} is missing from the packed checkpoint; fetch or quantize it again")
        header = headers[name]
        if (header.shape, header.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(
                f"{name} is stored as {list(header.shape)} {header.dtype}, its format says {list(spec.shape)} "
                f"{spec.dtype}; fetch or quantize the checkpoint again"
            )


def check_bank_contents(banks: Iterable[BankFormat], files: Iterable[str | Path]) -> None:
    """Raises CheckpointError for a value of the banks that is not finite or outside the bounds of its format.

    The kernels look tables up by what is stored: a group that does not exist would be read past them. Codes are not
    read; any byte is one. `files` are those whose headers `check_bank_tensors` has passed.
    """
    stored = [item for bank in banks for item in bank.tensors().items()]
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
    code_bits: the same of the codes alone. model_bytes: all tensors of the model.

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
    banks = []
    total = {"weights": 0, "bytes": 0, "code_bytes": 0}
    for bank in map(BankFormat.from_dict, config["banks"]):
        check_bank_tensors(bank, headers)
        projections = {}
        for projection in PROJECTIONS:
            format = getattr(bank, projection)
            stored = {name: headers[tensor_name(bank.path, projection, name)].num_bytes for name in format.tensors()}
            counts = {
                "weights": format.num_weights,
                "bytes": sum(stored.values()),
                "code_bytes": stored["codes"],
            }
            projections[projection] = format.to_dict() | counts | _bits(counts)
            total = {key: total[key] + counts[key] for key in total}
        banks.append({"path": bank.path, "kind": bank.kind, **projections})
    return {
        "format_version": FORMAT_VERSION,
        "kbvq_version": config.get("kbvq_version"),
        "recipe": config.get("recipe"),
        **_bits(total),
        **total,
        "model_bytes": sum(header.num_bytes for header in headers.values()),
        "banks": banks,
    }


def verify_checkpoint(folder: Path) -> dict[str, int]:
    """Compare every file with the manifest's size and SHA-256.

    Returns the number of files and of bytes that were read. Raises CheckpointError naming the first file that is
    missing or differs.
    """
    folder = Path(folder)
    expected = _read_json(folder / MANIFEST).get("files")
    if not isinstance(expected, dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no files; fetch the checkpoint again")
    num_bytes = 0
    for name, fingerprint in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
        actual = _fingerprint(path)
        if actual != fingerprint:
            raise CheckpointError(f"{path} is damaged: it is not what {MANIFEST} records; fetch it again")
        num_bytes += actual["bytes"]
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
    config = _read_json(folder / "config.json").get("quantization_config")
    return config if isinstance(config, dict) else {}


def _is_packed_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and _quantization_config(folder).get("quant_method") == "kbvq"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; check the path") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
