"""Runs that are killed again and again: `python eval/resume_benchmark.py`.

A small model is quantized in processes that SIGKILL ends at random: half of them at a random file operation (in the
middle of a write, before a flush, before a rename, after it), half at a random time. Each next process goes on from
what it finds. When a run comes through, its files must be those of a run that nobody disturbed, byte for byte; then
another run starts, until so many processes were killed. Linux only. Writes docs/results/resume.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that was forked has no threads to share work with

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kbvq
from kbvq.quantization.pipeline import QuantizeOptions, quantize_model
from kbvq.recipes import make_recipe
from kbvq.storage import files
from kbvq.storage.checkpoint import MANIFEST
from kbvq.storage.work_folder import MARKER, STATE, WorkFolder, work_folder

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-qwen3-moe"
UNHASHED = ("kbvq_timing.json", "kbvq_metrics.jsonl")


def make_model(folder: Path, layers: int) -> None:
    """A random model with few and narrow experts, and some text for it."""
    config = AutoConfig.from_pretrained(
        MODEL, num_hidden_layers=layers, hidden_size=64, moe_intermediate_size=32, num_experts=4, head_dim=16
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
    text = (ROOT / "tests" / "data" / "calibration.txt").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text[:20000], encoding="utf-8")


def quantize(folder: Path, output: Path, recipe: str) -> None:
    changes = {"kmeans_iterations": 2} | ({"distillation_steps": 2} if recipe == "best" else {})
    quantize_model(
        QuantizeOptions(
            model=str(folder / "model"),
            output=output,
            calibration=str(folder / "text.txt"),
            recipe=make_recipe(recipe, 3.0, **changes),
            samples=12,
            sequence_length=32,
            device="cpu",
        ),
        kbvq_version=kbvq.__version__,
    )


class Operations:
    """Counts what is done to files, and ends the process at one of them."""

    def __init__(self, fatal: int | None, report: Callable[[str], None]) -> None:
        self.count, self.fatal, self.report = 0, fatal, report

    def install(self) -> None:
        files.os = _Os(self)
        files.open = self.open
        files.save_file = self.save_file
        release = WorkFolder.release

        def between_batches(work: WorkFolder) -> None:
            self.reached("between two batches")
            release(work)

        WorkFolder.release = between_batches

    def reached(self, place: str, before: Callable[[], None] = lambda: None) -> None:
        self.count += 1
        if self.count == self.fatal:
            before()
            self.report(place)
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path: Path, mode: str = "r", **options: object) -> object:
        stream = open(path, mode, **options)
        return _Writer(stream, self) if "w" in mode else stream

    def save_file(self, tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata=metadata)
        self.reached("inside a write", lambda: os.truncate(path, os.path.getsize(path) // 2))


class _Writer:
    """A file that is written in two parts."""

    def __init__(self, stream: object, operations: Operations) -> None:
        self.stream, self.operations = stream, operations

    def write(self, content: bytes) -> None:
        half = len(content) // 2
        self.stream.write(content[:half])
        self.operations.reached("inside a write", self.stream.flush)
        self.stream.write(content[half:])

    def __enter__(self) -> _Writer:
        self.stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.__exit__(*error)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


class _Os:
    """The module os, as the files of a run use it."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations

    def fsync(self, descriptor: int) -> None:
        self.operations.reached("before a flush")
        os.fsync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        self.operations.reached("before a rename")
        os.replace(source, target)
        self.operations.reached("after a rename")

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def in_child(
    folder: Path, output: Path, recipe: str, *, operation: int | None = None, seconds: float | None = None
) -> tuple[bool, str, int]:
    """Quantize in a process of its own that is killed at this file operation or after so many seconds.

    Returns whether it came through, where it was killed, and how many file operations it did.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        status = 1
        # Progress bars lock a semaphore that all processes share; one that is killed while it holds it keeps it.
        tqdm.set_lock(threading.RLock())
        try:
            operations = Operations(operation, lambda place: os.write(write, place.encode()))
            operations.install()
            quantize(folder, output, recipe)
            os.write(write, str(operations.count).encode())
            status = 0
        except BaseException:  # os._exit prints nothing of it
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL)) if seconds is not None else None
    if timer:
        timer.start()
    status = os.waitpid(child, 0)[1]
    if timer:
        timer.cancel()
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return True, "", int(answer)
    if not os.WIFSIGNALED(status):
        raise SystemExit("a run stopped with an error instead of being killed; see above")
    if (output / MANIFEST).exists() and not (work_folder(output) / STATE).exists():  # killed behind its end
        return True, "", 0
    return False, answer or "at a random time", 0


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but those that hold times."""
    paths = [path for path in folder.iterdir() if path.name not in UNHASHED]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def kill_runs(recipe: str, layers: int, kills: int, draw: random.Random) -> dict[str, object]:
    """Kill so many processes at least, over as many runs as that takes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, layers)
        started = time.perf_counter()
        _, _, operations = in_child(folder, folder / "undisturbed", recipe)
        seconds = time.perf_counter() - started
        expected = content(folder / "undisturbed")
        places: Counter[str] = Counter()
        runs = 0
        # Where the draws fall depends on how fast this machine is; a run that is never hit in a write shows little.
        while places.total() < kills or not all(places[place] for place in ("inside a write", "at a random time")):
            done = False
            while not done:
                # Soon enough that many are killed within a run, late enough that it gets on.
                if draw.random() < 0.5:
                    done, place, _ = in_child(
                        folder, folder / "out", recipe, operation=draw.randint(1, max(2, operations // layers))
                    )
                else:
                    limit = draw.uniform(0, seconds / 2)
                    done, place, _ = in_child(folder, folder / "out", recipe, seconds=limit)
                if not done:
                    places[place] += 1
            runs += 1
            left = [path.name for path in folder.glob("out.partial/*") if path.name != MARKER]
            if content(folder / "out") != expected or left:
                raise SystemExit(f"{recipe}: a run that was killed gave other files than one that was not")
            shutil.rmtree(folder / "out")
        return {"recipe": recipe, "runs": runs, "kills": places.total(), "places": dict(places)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each recipe")
    parser.add_argument("--recipes", nargs="+", default=["fast", "best"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "resume.md")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    rows = [kill_runs(recipe, options.layers, options.kills, draw) for recipe in options.recipes]
    places = sorted({place for row in rows for place in row["places"]})
    lines = [f"| recipe | runs | killed | {' | '.join(places)} | files equal |", "|---" * (len(places) + 4) + "|"]
    for row in rows:
        counts = " | ".join(str(row["places"].get(place, 0)) for place in places)
        lines.append(f"| {row['recipe']} | {row['runs']} | {row['kills']} | {counts} | all |")
    print(json.dumps(rows))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    note = (
        "\n\nMade by `python eval/resume_benchmark.py`: a small model, quantized by processes that SIGKILL ends; each\n"
        "next one goes on. Of every run that came through, each file was compared with those of an undisturbed run.\n"
    )
    options.output.write_text("\n".join(lines) + note, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
