"""The files that collections of vectors are published in (BigANN, Deep1B, Contriever as faiss keeps it).

.fvecs, .bvecs, .ivecs (TEXMEX): each vector is its dimension as int32 and then so many float32, uint8 or int32, all
little-endian. .fbin, .u8bin, .i8bin (big-ann-benchmarks): the number of vectors and the dimension as uint32, then the
values. .npy: a matrix.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kbvq.errors import ConfigError

_ITEMS = {".fvecs": np.dtype("<f4"), ".bvecs": np.dtype("u1"), ".ivecs": np.dtype("<i4")}
_BLOCKS = {".fbin": np.dtype("<f4"), ".u8bin": np.dtype("u1"), ".i8bin": np.dtype("i1")}


def read_vectors(path: Path, count: int | None = None) -> Tensor:
    """The first `count` vectors, all if None, float32 [n, d]. Only they are read of a file that is longer.

    Raises ConfigError for another kind of file, one that is cut off or empty, whose vectors differ in dimension, or
    that has fewer vectors than asked for.
    """
    kinds = (*_ITEMS, *_BLOCKS, ".npy")
    if path.suffix not in kinds:
        raise ConfigError(f"{path}: vectors are read from {', '.join(kinds)}")
    try:
        if path.suffix == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix in _ITEMS:
            values = _items(path, _ITEMS[path.suffix], count)
        else:
            values = _block(path, _BLOCKS[path.suffix])
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if values.ndim != 2 or not values.size:
        raise ConfigError(f"{path} holds no vectors but an array of shape {list(values.shape)}")
    if count is not None and len(values) < count:
        raise ConfigError(f"{path} holds {len(values)} vectors, {count} are asked for")
    return torch.from_numpy(np.array(values[:count], dtype=np.float32))


def _items(path: Path, dtype: np.dtype, count: int | None) -> np.ndarray:
    head = np.fromfile(path, dtype="<i4", count=1)
    if not len(head) or head[0] < 1:
        raise ValueError("it does not begin with a dimension")
    length = 4 + int(head[0]) * dtype.itemsize
    if path.stat().st_size % length:
        raise ValueError(f"it is no whole number of vectors of {head[0]} dimensions; it may be cut off")
    rows = np.memmap(path, dtype="u1", mode="r").reshape(-1, length)[:count]
    if (rows[:, :4] != rows[0, :4]).any():
        raise ValueError("its vectors differ in dimension")
    return np.ascontiguousarray(rows[:, 4:]).view(dtype)


def _block(path: Path, dtype: np.dtype) -> np.ndarray:
    head = np.fromfile(path, dtype="<u4", count=2)
    if len(head) < 2 or path.stat().st_size != 8 + int(head[0]) * int(head[1]) * dtype.itemsize:
        raise ValueError("its size is not that of the vectors it announces; it may be cut off")
    return np.memmap(path, dtype=dtype, mode="r", offset=8, shape=(int(head[0]), int(head[1])))
