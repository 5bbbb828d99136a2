"""C++ for the CPU, compiled on first use and kept in a cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


def cache_dir() -> Path:
    """$KBVQ_CACHE, else kbvq_kernels below $XDG_CACHE_HOME or ~/.cache."""
    if "KBVQ_CACHE" in os.environ:
        return Path(os.environ["KBVQ_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kbvq_kernels"


def _processor() -> str:
    """What -march=native depends on: a cache shared between machines keeps one library for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def compiled_library(name: str, *, task: str, otherwise: str) -> ctypes.CDLL | None:
    """The library made of `name`.cpp beside this file with $CXX, g++ or c++; None, and a warning, when that cannot be.

    task, otherwise: what the log says that it does ("experts decode"), and how that is done without it.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        logger.warning("kbvq: no C++ compiler found; %s with %s on the CPU (slower)", task, otherwise)
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    key = hashlib.sha256("\0".join([source.read_text(), compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    path = cache_dir() / f"{name}-{key}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / f"{name}.so"
                command = [compiler, *FLAGS, str(source), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.replace(path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("kbvq: %s with %s on the CPU (slower): %s failed: %s", task, otherwise, compiler, detail)
        return None
    logger.info("kbvq: %s with %s (compiled by %s) on the CPU", task, path, compiler)
    return loaded
