"""Writing that survives a crash: a file is there whole, under its name, and on the disk, or not at all.

Everything that kbvq keeps is written through this file: to a name of its own, flushed to the disk, renamed, and the
folder flushed, which is what makes the new name last. What was under the name before stays until then.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kbvq.errors import CheckpointError

TEMPORARY = ".writing"
"""Suffix of a file that is not complete yet."""

_BLOCK = 1 << 20


def write_file(path: Path, content: Callable[[BinaryIO], object]) -> None:
    """Put what `content` writes under `path`; raises CheckpointError, naming it, when the disk is full or fails."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as stream:
            content(stream)
            stream.flush()
            os.fsync(stream.fileno())
        keep_file(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise not_written(path, error) from error


def keep_file(temporary: Path, path: Path) -> None:
    """Rename a complete file, already flushed, to its final name, and make the name last."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, whole and on the disk; returns its fingerprint. Raises CheckpointError, naming it."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        fingerprint = file_fingerprint(temporary)
        keep_file(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise not_written(path, error) from error
    return fingerprint


def copy_file(source: Path, path: Path) -> None:
    """A copy under `path`. Raises as `write_file`."""
    with open(source, "rb") as original:
        write_file(path, lambda stream: shutil.copyfileobj(original, stream))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON with sorted keys, so that equal data give equal files. Raises as `write_file`."""
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    write_file(path, lambda stream: stream.write(text.encode()))


def read_json(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, with the remedy, when the file is missing or holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; check the path") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; {remedy}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; {remedy}")
    return data


def file_fingerprint(path: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": of the content}."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def check_file(path: Path, expected: Mapping[str, Any], remedy: str) -> None:
    """Raises CheckpointError unless the file is there with that fingerprint."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {remedy}")
    if file_fingerprint(path) != dict(expected):
        raise CheckpointError(f"{path} is damaged: its size or SHA-256 is not the recorded one; {remedy}")


def reserve_mapping(path: Path, num_bytes: int) -> mmap.mmap:
    """A new file of that size, its place on the disk reserved, mapped into memory for reading and writing.

    A full disk must show here: once the file is mapped it would end the process with SIGBUS. Raises CheckpointError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, num_bytes)
            else:
                _fill(descriptor, num_bytes)
            return mmap.mmap(descriptor, num_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise not_written(path, error) from error


def unnamed_mapping(folder: Path, num_bytes: int) -> mmap.mmap:
    """As `reserve_mapping`, a file that has no name and is gone with the mapping."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, num_bytes)
            else:
                _fill(stream.fileno(), num_bytes)
            return mmap.mmap(stream.fileno(), num_bytes)
    except OSError as error:
        raise not_written(folder, error) from error


def open_mapping(path: Path) -> mmap.mmap:
    """An existing file, mapped for reading and writing."""
    with open(path, "r+b") as stream:
        return mmap.mmap(stream.fileno(), 0)


def sync_mapping(path: Path, mapping: mmap.mmap) -> None:
    """Flush a mapped file to the disk."""
    try:
        mapping.flush()
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        sync_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make renames, new names and deletions in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(path: Path, error: Exception) -> CheckpointError:
    """The error of a write that failed, most often for want of space."""
    return CheckpointError(
        f"{path} could not be written: {error}; free some space, or choose another output folder. What a run had "
        "finished before is kept, and the same command goes on from there"
    )


def _fill(descriptor: int, num_bytes: int) -> None:
    for start in range(0, num_bytes, _BLOCK):
        os.write(descriptor, bytes(min(_BLOCK, num_bytes - start)))
