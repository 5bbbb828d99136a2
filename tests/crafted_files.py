"""Crafted packed checkpoints: what a damaged or malicious file does to loading and to the kernels.

    python tests/crafted_files.py --files 10000        # about twenty minutes of one core

Packed checkpoints of a tiny model, one for each code format, are damaged at random, in their bytes, headers, tensors,
formats and index. Each is described (`inspect_checkpoint`), loaded and, if that is not refused, run: with few and with
many tokens an expert, in integers and in floats, and in plain torch. One in WHOLE is loaded by transformers, the
others by what transformers calls of kbvq and then by safetensors, which takes a tenth of the time. A file must be
refused by a KbvqError, or by transformers or safetensors themselves before kbvq is asked, or run; any other exception
is a fault, and so is what AddressSanitizer finds, with which the C++ part is compiled: the script starts itself again
with the sanitizer's library loaded, so that tensors are watched too.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from packed_banks import random_bank, random_projection, write_packed
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import kbvq
from kbvq.errors import KbvqError
from kbvq.models.moe_adapters import find_expert_banks
from kbvq.serving.hf import KbvqConfig, KbvqQuantizer
from kbvq.serving.packed_experts import PackedBankModule
from kbvq.storage.checkpoint import inspect_checkpoint
from kbvq.structures import PROJECTIONS, PackedBank, tier_path
from kbvq_kernels import build, cpu

FORMATS = {
    "vq": {"codebook_size": 4096, "num_codebooks": None, "has_scale": True, "has_bias": True},
    "signed": {"vector_dim": 8, "signed": True, "codebook_dtype": "int8", "has_scale": True, "has_column_scale": True},
    "rq": {"codebook": "rq", "vector_dim": 8, "num_stages": 2, "rank": 3, "factor_dtype": "int8"},
    "rq-grouped": {
        "codebook": "rq-grouped", "vector_dim": 8, "num_stages": 3, "num_groups": 5, "codebook_dtype": "int8",
        "num_codebooks": None,
    },
    "rq-grouped, 12 bits": {
        "codebook": "rq-grouped", "num_stages": 2, "num_groups": 3, "codebook_size": 4096, "rank": 2,
    },
    "rq-moe": {"codebook": "rq-moe", "vector_dim": 8, "num_stages": 2, "codebook_dtype": "int8", "has_scale": True},
    "trellis": {"codebook": "trellis", "vector_dim": 1, "codebook_size": 4, "has_scale": True, "tail": 9},
    "trellis, in tiers": {"codebook": "trellis", "vector_dim": 1, "codebook_size": 8, "has_scale": True},
    "trellis, 4 bits": {"codebook": "trellis", "vector_dim": 1, "codebook_size": 16, "has_scale": True, "tail": 30},
}  # fmt: skip
"""Options of both projections; None stands for one codebook per expert."""

WHOLE = 20

MODEL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
"""What makes the tiny Qwen3-MoE smaller still."""

NASTY = (
    0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 255, 256, 257, 4096, 65536, 2**31, 2**63, 2**64, -1, -8, 1.5, float("nan"),
    True, False, None, "", "vq", "rq", "rq-grouped", "rq-moe", "trellis", "int8", "float16", "F16", "U8", "I8", [], [1],
    {}, "8",
)  # fmt: skip


def make_checkpoints(root: Path) -> dict[str, Path]:
    """An undamaged packed checkpoint for each format, below `root`."""
    source = root / "source"
    model = save_tiny_model(source, "qwen3_moe", dtype=torch.bfloat16, tokenizer=False, **MODEL)
    model = AutoModelForCausalLM.from_pretrained(source)
    folders = {}
    for seed, (name, options) in enumerate(FORMATS.items()):
        banks = []
        for number, bank in enumerate(find_expert_banks(model)):
            own = {field: bank.num_experts if value is None else value for field, value in options.items()}
            sizes = bank.num_experts, bank.hidden_size, bank.intermediate_size
            banks.append(random_bank(bank.path, bank.kind, *sizes, seed=10 * seed + number, **own))
            if name.endswith("in tiers"):
                banks[-1:] = in_two_tiers(banks[-1])
        folders[name] = root / name
        write_packed(source, folders[name], model, banks)
    return folders


def in_two_tiers(bank: PackedBank) -> list[PackedBank]:
    """Its experts, even ones and odd ones apart, with contents of their own."""
    tiers = []
    for place in range(2):
        path = tier_path(bank.path, place)
        experts = tuple(range(place, bank.gate_up_proj.format.num_experts, 2))
        projections = {}
        for seed, name in enumerate(PROJECTIONS):
            format = dataclasses.replace(getattr(bank, name).format, num_experts=len(experts))
            projections[name], _ = random_projection(format, seed=100 + 2 * place + seed)
        tiers.append(PackedBank(path, bank.kind, **projections, experts=experts))
    return tiers


class File:
    """A safetensors file taken apart: `header` (JSON) and `data`."""

    def __init__(self, content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        self.header, self.data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])

    def content(self) -> bytes:
        header = json.dumps(self.header).encode()
        return len(header).to_bytes(8, "little") + header + bytes(self.data)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Anywhere in the file: cut, lengthened, or bytes replaced, half of the time in its header."""
    choice = rng.randrange(4)
    if choice == 0:
        return content[: rng.randrange(len(content))]
    if choice == 1:
        return content + rng.randbytes(rng.randrange(1, 64))
    changed = bytearray(content)
    length = 8 + int.from_bytes(content[:8], "little")
    low, high = (0, length) if choice == 2 else (0, len(content))
    for _ in range(rng.choice((1, 2, 8, 64))):
        changed[rng.randrange(low, high)] = rng.choice((rng.randrange(256), 0, 255, ord("9"), ord("["), ord('"')))
    return bytes(changed)


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """One tensor's name, shape, type or place, the metadata, or the form of the JSON itself."""
    file = File(content)
    names = [name for name in file.header if name != "__metadata__"]
    name = rng.choice(names)
    entry = file.header[name]
    choice = rng.randrange(9)
    if choice == 0:
        entry["dtype"] = rng.choice(("F16", "U8", "I8", "BF16", "F32", "I64", "BOOL", "F8_E8M0", "X", 3, None))
    elif choice == 1:
        rng.shuffle(entry["shape"])
    elif choice == 2 and entry["shape"]:
        place = rng.randrange(len(entry["shape"]))
        entry["shape"][place] = rng.choice((*NASTY, -entry["shape"][place], 2 * entry["shape"][place]))
    elif choice == 3:
        entry["data_offsets"][rng.randrange(2)] = rng.choice((*NASTY, len(file.data)))
    elif choice == 4:
        other = file.header[rng.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif choice == 5:
        file.header[rng.choice((name + "x", "", rng.choice(names), "lm_head.weight"))] = file.header.pop(name)
    elif choice == 6:
        file.header["__metadata__"] = rng.choice(({"format": "tf"}, {"a": 1}, None, [], {}, {"format": "pt", "x": "y"}))
    elif choice == 7:
        entry[rng.choice(("dtype", "shape", "data_offsets", "more"))] = rng.choice(NASTY)
    else:
        body = json.dumps(file.header).encode()
        body = rng.choice((
            b" " + body, body + b" ", b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"null", body[:-1] + b',"x":{}}',
            body[:-1] + b"," + json.dumps({name: entry})[1:].encode(), body.replace(b'"U8"', b'"\xff8"'),
        ))  # fmt: skip
        return len(body).to_bytes(8, "little") + body + bytes(file.data)
    return file.content()


def damage_tensor(content: bytes, rng: random.Random) -> bytes:
    """The values of one tensor, or of a part of it; the file stays a valid one."""
    file = File(content)
    # Codes are most of the bytes and any of them is one: take the other tensors as often.
    begin, end = file.header[rng.choice([name for name in file.header if name != "__metadata__"])]["data_offsets"]
    if rng.randrange(2):
        begin = rng.randrange(begin, end)
        end = rng.randrange(begin, end) + 1
    fill = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80", b"\x05", b"\x00\x7c", b"\x00\x7e", b"\xff\x7f", None))
    size = end - begin
    file.data[begin:end] = rng.randbytes(size) if fill is None else (fill * size)[:size]
    return file.content()


def damage_format(config: dict, rng: random.Random) -> dict:
    """One or two fields of quantization_config, mostly of a bank."""
    config = copy.deepcopy(config)
    quantization = config["quantization_config"]
    for _ in range(rng.choice((1, 1, 2))):
        bank = rng.choice(quantization["banks"]) if quantization["banks"] else {}
        projection = bank.get(rng.choice(("gate_up_proj", "down_proj")))
        choice = rng.randrange(8)
        if choice < 5 and isinstance(projection, dict) and projection:
            projection[rng.choice(sorted(projection))] = rng.choice(NASTY)
        elif choice == 5 and bank:
            bank[rng.choice(sorted(bank))] = rng.choice((*NASTY, "routed", "shared", "model", "model.layers.0.mlp"))
        elif choice == 6:
            quantization[rng.choice(sorted(quantization))] = rng.choice(NASTY)
            if not isinstance(quantization.get("banks"), list):
                break
        else:
            quantization["banks"] = rng.choice(([], [*quantization["banks"], copy.deepcopy(bank)]))
    return config


def damage_index(index: dict, rng: random.Random) -> dict:
    """The map from tensors to files."""
    index = copy.deepcopy(index)
    names = sorted(index["weight_map"])
    files = sorted(set(index["weight_map"].values()))
    choice = rng.randrange(4)
    if choice == 0:
        places = (*files, "absent.safetensors", "../config.json", "", 3, None)
        index["weight_map"][rng.choice(names)] = rng.choice(places)
    elif choice == 1:
        del index["weight_map"][rng.choice(names)]
    elif choice == 2:
        index["weight_map"]["more"] = rng.choice(files)
    else:
        index[rng.choice(("weight_map", "metadata"))] = rng.choice(NASTY)
    return index


class Damaged:
    """A copy of a checkpoint in which one file at a time is damaged and mended again."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder = Path(shutil.copytree(folder, work))
        self.banks = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def damage(self, rng: random.Random) -> tuple[str, Path, bytes]:
        """(kind of damage, the file, its undamaged content)."""
        kind = rng.choice(("bytes", "header", "tensor", "tensor", "tensor", "format", "format"))
        if rng.randrange(WHOLE) == 0:
            kind = "index"
        if kind == "format":
            path = self.folder / "config.json"
        elif kind == "index":
            path = self.folder / "model.safetensors.index.json"
        else:
            path = self.folder / rng.choice(sorted(self.banks.values()))
        content = path.read_bytes()
        if kind in ("format", "index"):
            change = {"format": damage_format, "index": damage_index}[kind]
            damaged = json.dumps(change(json.loads(content), rng)).encode()
        else:
            damaged = {"bytes": damage_bytes, "header": damage_header, "tensor": damage_tensor}[kind](content, rng)
        path.write_bytes(damaged)
        return kind, path, content


def load_whole(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(torch.arange(6)[None])
    return model


def load_banks(folder: Path, model: PreTrainedModel, experts: dict[str, nn.Module]) -> PreTrainedModel:
    """What transformers calls of kbvq, on a model on the meta device; the banks' tensors as safetensors reads them."""
    config = KbvqConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    files = sorted(map(str, folder.glob("*.safetensors")))
    for path, module in experts.items():  # those that the last file's banks replaced
        model.set_submodule(path, module)
    KbvqQuantizer(config)._process_model_before_weight_loading(model, checkpoint_files=files)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for path, module in model.named_modules():
        if isinstance(module, PackedBankModule):
            module.load_state_dict({name: tensors[f"{path}.{name}"] for name in module.state_dict()}, assign=True)
    return model


def outcome(folder: Path, load: Callable[[Path], PreTrainedModel]) -> str:
    """How a checkpoint ends: "refused" by kbvq or by "others", or "ran". Raises what kbvq did not mean to raise."""
    try:
        inspect_checkpoint(folder)
    except KbvqError:
        pass  # loading must find it too, or do without what is damaged
    with torch.no_grad():
        try:
            model = load(folder)
        except KbvqError:
            return "refused"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            if any(Path(frame.filename).is_relative_to(Path(kbvq.__file__).parent) for frame in frames):
                raise
            return "others"
        for module in model.modules():
            if isinstance(module, PackedBankModule):
                hidden = module.projection_format("gate_up_proj").in_features
                for tokens, dtype in itertools.product((1, 40), (torch.float32, torch.bfloat16)):
                    experts = getattr(module, "bank_experts", module.num_experts)  # of all its tiers
                    index = torch.arange(2 * tokens).view(tokens, 2) % experts
                    module(torch.randn(tokens, hidden, dtype=dtype), index, torch.ones(tokens, 2, dtype=dtype))
                module.expert_weights(module.num_experts - 1, torch.float32)
    return "ran"


def run(folders: dict[str, Path], work: Path, files: int, seed: int) -> tuple[dict[tuple[str, str], int], list[str]]:
    """Damage `files` checkpoints. ({(kind of damage, outcome): number}, faults)."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    counts: dict[tuple[str, str], int] = collections.Counter()
    faults = []
    damaged = [Damaged(folder, work / name) for name, folder in folders.items()]
    config = AutoConfig.from_pretrained(damaged[0].folder)
    del config.quantization_config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    experts = {bank.path: empty.get_submodule(bank.path) for bank in find_expert_banks(empty)}

    def load(folder: Path) -> PreTrainedModel:
        return load_banks(folder, empty, experts)

    for number in range(files):
        rng = random.Random(f"{seed} {number}")
        checkpoint = rng.choice(damaged)
        kind, path, content = checkpoint.damage(rng)
        try:
            whole = kind == "index" or number % WHOLE == 0
            counts[kind, outcome(checkpoint.folder, load_whole if whole else load)] += 1
        except Exception as error:  # the faults that this looks for
            counts[kind, "fault"] += 1
            faults.append(f"file {number} ({kind}, {path.parent.name}/{path.name}): {type(error).__name__}: {error}")
        path.write_bytes(content)
    return counts, faults


def sanitize() -> None:
    """Compile the decoder with AddressSanitizer, whose library this process has loaded."""
    build.FLAGS = (*build.FLAGS, "-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer")
    cpu.library.cache_clear()
    if cpu.library() is None:
        sys.exit("the decoder was not compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "ASAN_OPTIONS" not in os.environ:
        library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        sanitizer = "detect_leaks=0:allocator_may_return_null=1"
        environment = {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": sanitizer}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | environment).returncode)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        os.environ["KBVQ_CACHE"] = root
        sanitize()
        counts, faults = run(make_checkpoints(Path(root)), Path(root) / "work", options.files, options.seed)
    print("| damaged | files | refused by kbvq | refused by others | ran | faults |\n|---|---|---|---|---|---|")
    for kind in sorted({kind for kind, _ in counts}):
        numbers = [counts[kind, result] for result in ("refused", "others", "ran", "fault")]
        print(f"| {kind} | {sum(numbers)} | " + " | ".join(map(str, numbers)) + " |")
    for fault in faults[:40]:
        print(fault[:400])
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
