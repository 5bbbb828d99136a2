"""What decides the result of a run, in a form that says what differs between two runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kbvq
from kbvq.models.layer_stream import LayerStream
from kbvq.recipes import Recipe
from kbvq.storage.checkpoint import COPIED_FILES
from kbvq.storage.files import file_fingerprint

logger = logging.getLogger("kbvq")

_READERS = 4  # files hashed at a time; hashing lets other threads run


def run_fingerprint(stream: LayerStream, token_ids: Tensor, recipe: Recipe, *, seed: int, version: str) -> dict:
    """By content: the model's files, the calibration tokens, the code of this package; and the configuration.

    The number of threads and of processes may change during a run: it decides the order of sums, not what is summed.
    """
    copied = [path for name in COPIED_FILES if (path := stream.folder / name).is_file()]
    tokens = token_ids.cpu().contiguous().numpy().tobytes()
    return {
        "kbvq": version,
        "code": _hash_sources(Path(kbvq.__file__).parent.rglob("*.py")),
        "torch": torch.__version__,
        "model": _hash_files([stream.folder / "config.json", *stream.shards, *copied], stream.folder),
        "calibration": {"windows": list(token_ids.shape), "tokens": hashlib.sha256(tokens).hexdigest()},
        "recipe": recipe.to_dict(),
        "seed": seed,
        "device": stream.device.type,
        "dtype": str(stream.dtype),
    }


def _hash_files(paths: list[Path], folder: Path) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in paths)
    logger.info(
        "reading the %d files of the model once, %.1f GB, so that a resumed run knows them", len(paths), size / 1e9
    )
    with ThreadPoolExecutor(_READERS) as pool:
        return {
            str(p.relative_to(folder)): found for p, found in zip(paths, pool.map(file_fingerprint, paths), strict=True)
        }


def _hash_sources(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()
