"""llama.cpp's own quantizer, called as a C library: libggml-base out of the sources that llama-cpp-python ships."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from torch.nn import functional as F

SOURCES = "llama-cpp-python==0.3.36"
LIBRARY = "libggml-base.so"

logger = logging.getLogger("peers")


def build_library(python: Path, folder: Path) -> None:
    """Put the library at `folder`/lib/libggml-base.so: fetch the sources with pip, build the one target with CMake.

    Needs cmake and a C++ compiler; two minutes on one core.
    """
    work = folder / "ggml"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    download = [
        python,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        work,
        SOURCES,
    ]
    subprocess.run(download, check=True)
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        members = [member for member in archive.getmembers() if "/vendor/llama.cpp/ggml/" in member.name]
        archive.extractall(work, members=members, filter="data")
    source = next(work.glob("*/vendor/llama.cpp/ggml"))
    # Its own project would install files that the archive lacks; as a part of another it does not.
    (work / "CMakeLists.txt").write_text(
        f'cmake_minimum_required(VERSION 3.18)\nproject(peer C CXX)\nadd_subdirectory("{source}" ggml)\n',
        encoding="utf-8",
    )
    off = [f"-DGGML_{name}=OFF" for name in ("CPU", "OPENMP", "CCACHE", "NATIVE")]
    configure = ["cmake", "-S", work, "-B", work / "build", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON"]
    subprocess.run([*configure, *off], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", work / "build", "--target", "ggml-base"], check=True, capture_output=True)
    built = next(path for path in (work / "build").rglob(f"{LIBRARY}*") if not path.is_symlink())
    shutil.copy(built, folder / "lib" / LIBRARY)
    shutil.rmtree(work)


def load_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return library


def quantize(library: ctypes.CDLL, weight: Tensor, importance: Tensor, type_name: str) -> Tensor:
    """Blocks of a weight [rows, n]: uint8 [rows, bytes], rows padded with zeros of no importance to whole blocks.

    importance: [n], of the squared error of each input. Raises RuntimeError unless the library fills the blocks.
    """
    type_ = GGMLQuantizationType[type_name]
    block, size = GGML_QUANT_SIZES[type_]
    padding = (0, -weight.shape[1] % block)
    values, weights = (
        np.ascontiguousarray(F.pad(tensor.float(), padding).numpy(), dtype=np.float32)
        for tensor in (weight, importance)
    )
    rows, columns = values.shape
    blocks = np.zeros((rows, columns // block * size), dtype=np.uint8)
    written = library.ggml_quantize_chunk(
        int(type_), values.ctypes.data, blocks.ctypes.data, 0, rows, columns, weights.ctypes.data
    )
    if written != blocks.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {type_name}, {blocks.nbytes} are expected")
    return torch.from_numpy(blocks)
