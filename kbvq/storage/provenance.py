"""What a result depends on besides its options: versions, the commit, the machine, and where the model came from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "lm_eval")

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def provenance(model: str, folder: Path, token_ids: Tensor) -> dict[str, Any]:
    """The fields of a run record that say what it was made from and with.

    model: as the run was asked for it, `folder` where it is. token_ids: the calibration windows.
    """
    return {
        "source": source(model, folder),
        "calibration_sha256": hashlib.sha256(token_ids.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "environment": {"versions": versions(), "commit": commit(), "hardware": hardware()},
    }


def source(model: str, folder: Path) -> dict[str, Any]:
    """name: of the original on the hub, else None: a path says nothing elsewhere. folder: its name alone. license and
    license_name, license_link: from its model card, where it has one."""
    on_hub = _HUB_NAME.fullmatch(model) and not Path(model).exists()
    found: dict[str, Any] = {"name": model if on_hub else None, "folder": Path(folder).resolve().name}
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\s*\n(.*?)\n---", text, flags=re.DOTALL)
    for key in ("license", "license_name", "license_link"):
        line = re.search(rf"^{key}:[ \t]*(\S.*?)\s*$", header[1], flags=re.MULTILINE) if header else None
        if line:
            found[key] = line[1].strip("\"'")
    return found


def versions() -> dict[str, str]:
    """Of kbvq, Python and the packages that a result depends on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in ("kbvq", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the source tree that kbvq runs from, with "-dirty" when it differs; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """The machine: processor, cores, threads in use, memory in bytes (None where the system does not say), GPU."""
    processor, memory = platform.machine(), None
    if Path("/proc/cpuinfo").is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        processor = named[1] if named else processor
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
