"""C++ for the CPU: compiled on first use and kept in a cache, or beforehand for all kinds of this machine's processors.

python -m kbvq_kernels.build        # beside the sources: a wheel or an image made then needs no compiler
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wno-psabi")

TARGETS = {
    ("x86_64", "AVX512 VBMI BF16"): "-march=icelake-client -mavx512bf16",
    ("x86_64", "AVX512 VBMI"): "-march=icelake-client",
    ("x86_64", "AVX512 VNNI"): "-march=cascadelake",
    ("x86_64", "AVX512"): "-march=x86-64-v4",
    ("x86_64", "AVX2"): "-march=x86-64-v3",
    ("x86_64", "DEFAULT"): "-march=x86-64",
    ("aarch64", "DEFAULT"): "-march=armv8-a",
}
"""(machine, what torch calls its vectors, and what they do with bytes) -> flags for what the compiler may use."""

LIBRARIES = {
    "cpu_decode": ("cpu_decode.cpp", "cpu_integer.cpp", "cpu_integer_trellis.cpp"),
    "cpu_feedback": ("cpu_feedback.cpp",),
    "cpu_trellis": ("cpu_trellis.cpp",),
}
"""Library -> what it is made of."""

SOURCES = Path(__file__).parent


def cache_dir() -> Path:
    """$KBVQ_CACHE, else kbvq_kernels below $XDG_CACHE_HOME or ~/.cache."""
    if "KBVQ_CACHE" in os.environ:
        return Path(os.environ["KBVQ_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kbvq_kernels"


def _machine() -> str:
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def target() -> str:
    """The compiler's flags for this processor; on a machine that TARGETS does not know, what compilers take for all."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors == "AVX512" and torch.cpu._is_vnni_supported():
        permutes = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("avx512_vbmi")
        vectors += " VBMI" if permutes else " VNNI"
        vectors += " BF16" if permutes and torch.cpu._is_avx512_bf16_supported() else ""
    flags = TARGETS.get((_machine(), vectors)) or TARGETS.get((_machine(), "DEFAULT"))
    return flags or "-O3"  # given twice


def _file_name(name: str, target: str) -> str:
    """Says what the library was compiled from, so that another version of this package builds its own."""
    files = [*(SOURCES / file for file in LIBRARIES[name]), *sorted(SOURCES.glob("*.h"))]
    key = hashlib.sha256("\0".join([*(file.read_text() for file in files), *FLAGS]).encode()).hexdigest()[:16]
    processor = target.partition("=")[2].replace(" -m", "-") or platform.machine()
    return f"{name}-{processor}-{key}.so"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def _compile(name: str, target: str, compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / f"{name}.so"
        sources = [str(SOURCES / file) for file in LIBRARIES[name]]
        command = [compiler, *target.split(), *FLAGS, *sources, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.replace(path)


def compiled_library(name: str, *, task: str, otherwise: str) -> ctypes.CDLL | None:
    """One of LIBRARIES: beside its sources, else in the cache, else made now with $CXX, g++ or c++; None, and a
    warning, when that cannot be.

    task, otherwise: what the log says that it does ("experts decode"), and how that is done without it.
    """
    file, compiler = _file_name(name, target()), _compiler()
    path = next((folder / file for folder in (SOURCES, cache_dir()) if (folder / file).exists()), None)
    if path is None and compiler is None:
        logger.warning("kbvq: no C++ compiler found; %s with %s on the CPU (slower)", task, otherwise)
        return None
    try:
        if path is None:
            path = cache_dir() / file
            _compile(name, target(), str(compiler), path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("kbvq: %s with %s on the CPU (slower): %s failed: %s", task, otherwise, compiler, detail)
        return None
    logger.info("kbvq: %s with %s on the CPU", task, path)
    return loaded


def main() -> None:
    """Raises subprocess.CalledProcessError when a compilation fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=SOURCES, help="where to; default: beside the sources")
    parser.add_argument(
        "--compiler", default=_compiler(), help="default: $CXX, g++ or c++; or one that compiles across"
    )
    parser.add_argument("--machine", default=_machine(), choices=sorted({machine for machine, _ in TARGETS}))
    options = parser.parse_args()
    for (machine, _), flags in TARGETS.items():
        for name in LIBRARIES if machine == options.machine else ():
            path = options.folder / _file_name(name, flags)
            _compile(name, flags, options.compiler, path)
            print(path)


if __name__ == "__main__":
    main()
