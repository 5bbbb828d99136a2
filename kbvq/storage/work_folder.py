"""`<output>.partial`: what a run has finished, kept so that after any interruption the same command goes on.

    .kbvq_partial        marks the folder as ours; locked while a run works in it
    state.json           the last step done, what it carries on, and size and SHA-256 of every file that belongs to it
    activations-*.bin    tensors too large for memory, mapped from the disk
    carry-*.safetensors  the other tensors
    metrics.jsonl        a line per step
    checkpoint/          the packed checkpoint as far as it is written; becomes the output
    replaced/            the old output, while it is being replaced

A step is done when state.json, which is replaced as a whole, says so. Files are new for every step and never changed;
those of the step before are deleted after that, so at each moment one complete state is on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from kbvq.errors import CheckpointError
from kbvq.models.ranks import ONE, Ranks
from kbvq.storage.checkpoint import MANIFEST, is_packed_checkpoint
from kbvq.storage.files import (
    check_file,
    file_fingerprint,
    not_written,
    open_mapping,
    read_json,
    reserve_mapping,
    sync_folder,
    sync_mapping,
    unnamed_mapping,
    write_json,
    write_tensors,
)
from kbvq.storage.records import StoredFile, from_json, to_json

logger = logging.getLogger("kbvq")

STATE_VERSION = 1
MARKER = ".kbvq_partial"
STATE = "state.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint"
_REPLACED = "replaced"
_START_ANEW = "pass --fresh to start anew"


class _Mapped(NamedTuple):
    name: str
    mapping: mmap.mmap


class WorkFolder:
    """A run's hold on its output and on the folder of its state; a context manager.

    done: steps finished so far, those of interrupted runs included. carry: what the last one left to the next.
    checkpoint: folder of the packed checkpoint. path: the work folder.

    Raises CheckpointError, at construction, when another run works there, or when `output` is not empty and
    `overwrite` is False, or when overwriting would delete something that is not a packed checkpoint.
    """

    def __init__(self, output: Path, *, overwrite: bool = False, ranks: Ranks = ONE) -> None:
        self.output = Path(output).absolute()
        self.path = work_folder(self.output)
        self.checkpoint = self.path / CHECKPOINT
        self.done = 0
        self.carry: Any = None
        self._ranks = ranks
        self._overwrite = overwrite
        self._fingerprint: Mapping[str, Any] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._mapped: dict[int, _Mapped] = {}  # by the address of the tensor
        self._count = 0
        self._lock: int | None = None
        ranks.first(self._claim)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.carry = None
        self._mapped.clear()
        if self._ranks.is_first:
            self._let_go()

    def resume(self, fingerprint: Mapping[str, Any], classes: Iterable[type], *, fresh: bool = False) -> bool:
        """Take up the state of an interrupted run of the same fingerprint, or start with none. Returns whether there
        was one that finished everything but was not yet moved to the output.

        fingerprint: nested JSON-ready data; everything that decides what the run computes. classes: dataclasses that
        may be carried. fresh: throw away what is there.
        Raises CheckpointError for a state of another fingerprint, saying what differs, of another version, or damaged.
        """
        self._fingerprint = json.loads(json.dumps(fingerprint))
        state = self._ranks.first(lambda: self._start(fresh))
        if state is None:
            return False
        self._files = state["files"]
        self._count, self.done = state["count"], state["done"]
        if state["complete"]:
            return True
        tensors = {}
        for name, where in state["tensors"].items():
            tensors[name] = self._map(where["file"], torch.Size(where["shape"]), getattr(torch, where["dtype"]))
        if state["carried"] is not None:
            tensors |= load_file(self.path / state["carried"])
        self.carry = from_json(state["carry"], tensors, (*classes, StoredFile))
        return False

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A new tensor that lives in a file of the folder; one and the same for all processes.

        Its pages are the system's to write and to drop, and `release` takes them off this process.
        Raises CheckpointError when the disk has no room for it.
        """
        shape = torch.Size(shape)
        name = f"activations-{self._count:05d}.bin"
        self._count += 1

        def make() -> None:
            reserve_mapping(self.path / name, shape.numel() * dtype.itemsize).close()

        self._ranks.first(make)
        return self._map(name, shape, dtype)

    def empty_like(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype)

    def scratch(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """A float32 tensor of zeros on the CPU that lives in a file without a name; of this process, and gone from the
        disk with the tensor. Its pages are the system's to write and to drop.

        Raises CheckpointError when the disk has no room for it.
        """
        mapping = unnamed_mapping(self.path, 4 * math.prod(shape))
        return torch.frombuffer(mapping, dtype=torch.float32).view(shape)

    def release(self) -> None:
        """Take the pages of all mapped tensors off this process; they are read from the file again when needed."""
        if sys.platform == "linux":
            for mapped in self._mapped.values():
                mapped.mapping.madvise(mmap.MADV_DONTNEED)

    def store(self, name: str, write: Callable[[Path], Mapping[str, Any]]) -> StoredFile:
        """A file that stays for as long as a carry refers to it; name: relative to the folder.

        write: puts it there, whole, and returns its fingerprint; the first process calls it.
        """
        return StoredFile(name, self._ranks.first(lambda: dict(write(self.path / name))))

    def commit(self, carry: object, metrics: Mapping[str, Any]) -> None:
        """One more step is done: from here on the run goes on after it, whatever happens.

        carry: what the next step needs (see records), StoredFiles included. metrics: a line for metrics.jsonl.
        Raises CheckpointError when the disk is full; the state before is as it was.
        """
        self.done += 1
        for mapped in self._mapped.values():
            if not self._ranks.is_first:  # the first process does so below, and asks the disk
                mapped.mapping.flush()
        self._ranks.wait()
        self._ranks.first(lambda: self._save(carry, metrics))
        self.carry = carry

    def complete(self) -> None:
        """The checkpoint is whole and on the disk: move it to the output and delete the folder."""
        self._ranks.first(self._complete)

    def move_to_output(self) -> None:
        """What is left to do for a state that is complete."""
        self._ranks.first(self._move_to_output)

    def _claim(self) -> None:
        marker = self.path / MARKER
        if self.path.exists() and not marker.is_file() and any(self.path.iterdir()):
            raise CheckpointError(f"{self.path} is in the way and was not made by kbvq; move or delete it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be created: {error}; choose another output folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 100, 0).decode(errors="replace").strip()
            os.close(self._lock)
            self._lock = None
            raise CheckpointError(
                f"another run ({holder or 'just started'}) is writing {self.output}; wait for it, or choose another "
                "output folder"
            ) from error
        if not marker.is_file() or os.stat(marker).st_ino != os.fstat(self._lock).st_ino:
            raise CheckpointError(f"another run has just finished {self.output}; look there before starting again")
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        try:
            self._check_output()
        except CheckpointError:
            self._let_go()
            raise

    def _let_go(self) -> None:
        """Without a finished step there is nothing in the folder to keep."""
        if self._lock is None:
            return
        if self.path.exists() and not (self.path / STATE).exists():
            self._restore_replaced()
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _check_output(self) -> None:
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise CheckpointError(f"{self.output} is a file; choose another output folder")
        if not any(self.output.iterdir()) or self._is_published():
            return
        if not self._overwrite:
            raise CheckpointError(f"{self.output} is not empty; pass --overwrite to replace it, or choose another")
        if not is_packed_checkpoint(self.output):
            raise CheckpointError(
                f"{self.output} is not a packed checkpoint, and overwriting would delete what it holds; "
                "choose another output folder, or empty this one"
            )

    def _is_published(self) -> bool:
        """Whether the output is what this folder's run has put there, and only the clean-up is missing."""
        if not (self.path / STATE).is_file() or self.checkpoint.exists() or not (self.output / MANIFEST).is_file():
            return False
        state = read_state(self.path)
        return state["complete"] and state["files"].get(MANIFEST) == file_fingerprint(self.output / MANIFEST)

    def _start(self, fresh: bool) -> dict[str, Any] | None:
        """The state to go on from, checked, or None after making room for a new one."""
        if not fresh and (self.path / STATE).is_file():
            state = verify_state(self.path, files=False)
            if differences := _differences(state["fingerprint"], self._fingerprint):
                raise CheckpointError(
                    f"{self.path} holds an interrupted run of something else: {'; '.join(differences)}. Repeat its "
                    f"command to finish it, or {_START_ANEW}"
                )
            if not state["complete"]:
                verify_state(self.path)
                self._delete_all_but(state["files"])
                _truncate(self.path / METRICS, state["metrics_bytes"])
                logger.info("going on after step %d of an interrupted run in %s", state["done"], self.path)
                return state
            if self.checkpoint.exists() or self._is_published():
                return state
        self._restore_replaced()
        for path in self.path.iterdir():
            if path.name == MARKER:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.checkpoint.mkdir()
        sync_folder(self.path)
        return None

    def _restore_replaced(self) -> None:
        """Put an old output back that was moved away before the new one took its place."""
        if (self.path / _REPLACED).exists() and not self.output.exists():
            (self.path / _REPLACED).rename(self.output)

    def _map(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        mapping = open_mapping(self.path / name)
        tensor = torch.frombuffer(mapping, dtype=dtype).view(shape)
        self._mapped[tensor.data_ptr()] = _Mapped(name, mapping)
        return tensor

    def _save(self, carry: object, metrics: Mapping[str, Any]) -> None:
        data, tensors, stored = to_json(carry)
        files = {file.name: file.fingerprint for file in stored}
        where: dict[str, dict[str, Any]] = {}
        small: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            mapped = self._mapped.get(tensor.data_ptr())
            if mapped is None or tensor.nbytes != len(mapped.mapping):
                small[name] = tensor
                continue
            if mapped.name not in self._files:
                sync_mapping(self.path / mapped.name, mapped.mapping)
                self._files[mapped.name] = file_fingerprint(self.path / mapped.name)
            files[mapped.name] = self._files[mapped.name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            where[name] = {"file": mapped.name, "shape": list(tensor.shape), "dtype": dtype}
        carried = None
        if small:
            carried = f"carry-{self.done:05d}.safetensors"
            files[carried] = write_tensors(self.path / carried, small)
        self._files = files
        self._write_state(
            {
                "complete": False,
                "carry": data,
                "carried": carried,
                "tensors": where,
                "metrics_bytes": _append_line(self.path / METRICS, metrics),
            }
        )
        self._delete_all_but(files)
        self._mapped = {address: mapped for address, mapped in self._mapped.items() if mapped.name in files}

    def _write_state(self, fields: Mapping[str, Any]) -> None:
        state = {
            "state_version": STATE_VERSION,
            "fingerprint": self._fingerprint,
            "done": self.done,
            "count": self._count,
            "files": self._files,
            **fields,
        }
        write_json(self.path / STATE, state | {"sha256": _own_hash(state)})

    def _delete_all_but(self, files: Iterable[str]) -> None:
        """Delete what does not belong to the state: left by an interrupted step, or by the step before."""
        kept = {self.path / name for name in (*files, MARKER, STATE, METRICS)}
        for path in (*self.path.iterdir(), *self.checkpoint.iterdir()):
            if path.is_file() and path not in kept:
                path.unlink()

    def _complete(self) -> None:
        manifest = read_json(self.checkpoint / MANIFEST)["files"]
        for name, fingerprint in self._files.items():
            folder, _, shard = name.rpartition("/")
            if folder == CHECKPOINT and manifest.get(shard) != fingerprint:
                raise CheckpointError(f"{self.path / name} changed after it was written; {_START_ANEW}")
        self._files = {MANIFEST: file_fingerprint(self.checkpoint / MANIFEST)}
        self._write_state({"complete": True})
        self._move_to_output()

    def _move_to_output(self) -> None:
        try:
            if self.checkpoint.exists():
                if self.output.exists():
                    self.output.rename(self.path / _REPLACED)
                try:
                    self.checkpoint.rename(self.output)
                except OSError:
                    self._restore_replaced()
                    raise
                sync_folder(self.output.parent)
            # Last what tells the next run that this one was at its end, and then that the folder is ours.
            last = {STATE: 1, MARKER: 2}
            for path in sorted(self.path.iterdir(), key=lambda path: last.get(path.name, 0)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.path.rmdir()
        except OSError as error:
            raise CheckpointError(
                f"{self.output} could not be completed: {error}; everything is in {self.path}, and the same command "
                "goes on from there"
            ) from error


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a work folder. Raises CheckpointError when it is damaged or of another version."""
    path = folder / STATE
    state = read_json(path, _START_ANEW)
    version = state.get("state_version")
    if version != STATE_VERSION:
        raise CheckpointError(
            f"{path} has version {version}, this kbvq reads {STATE_VERSION}; finish the run with the version that "
            f"began it, or {_START_ANEW}"
        )
    if state.pop("sha256", None) != _own_hash(state):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one; {_START_ANEW}")
    return state


def verify_state(folder: Path, *, files: bool = True) -> dict[str, Any]:
    """The state of a work folder, every file of it compared with its recorded size and SHA-256 unless `files` is False.

    Raises CheckpointError naming the first file that is missing or differs.
    """
    state = read_state(folder)
    if files and not state["complete"]:
        for name, fingerprint in state["files"].items():
            check_file(folder / name, fingerprint, _START_ANEW)
    return state


def work_folder(output: Path) -> Path:
    """Where a run with that output keeps its state."""
    return output.with_name(output.name + ".partial")


def is_work_folder(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def _own_hash(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """What differs between two fingerprints, by the path of each value."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        parts = [(f"{path}.{key}".lstrip("."), found.get(key), wanted.get(key)) for key in keys]
        return [line for name, a, b in parts for line in _differences(a, b, name)]
    return [] if found == wanted else [f"{path} was {_short(found)} and is {_short(wanted)}"]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "…" + text[-4:]


def _append_line(path: Path, data: Mapping[str, Any]) -> int:
    """Add a line of JSON; returns the size of the file then."""
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(data) + "\n")
            stream.flush()
            return stream.tell()
    except OSError as error:
        raise not_written(path, error) from error


def _truncate(path: Path, num_bytes: int) -> None:
    if path.exists() and path.stat().st_size > num_bytes:
        os.truncate(path, num_bytes)
