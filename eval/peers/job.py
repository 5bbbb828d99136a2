"""What every quantize_*.py script does around its tool: read the job, time the tool, write down the facts.

These scripts run in environments of their own, so this file imports nothing of kbvq.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

GROUP_SIZE = 64


@dataclass(frozen=True)
class Job:
    """One run of a tool.

    model: folder of the 16-bit checkpoint. windows: calibration tokens, [num_windows, window] int64. bits: of a code.
    variant: which of its settings or formats the tool is to use, "" for the one there is.
    output: folder that the tool writes its own packed checkpoint to.
    """

    model: str
    windows: Tensor
    bits: int
    seed: int
    output: Path
    variant: str = ""


def run_job(quantize: Callable[[Job], None], *, packages: Sequence[str]) -> None:
    """Run `quantize` on the job of the command line and write tool.json: seconds (load to save) and versions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--variant", default="")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    quantize(Job(args.model, load_file(args.windows)["tokens"], args.bits, args.seed, args.output, args.variant))
    seconds = time.perf_counter() - start
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    facts = {"seconds": seconds, "threads": torch.get_num_threads(), "versions": versions}
    args.facts.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
