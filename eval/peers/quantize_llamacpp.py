"""Quantize the experts of a model with llama.cpp's block types; runs in the environment of requirements-llamacpp.txt.

The importance of an input is its mean square over the tokens of the calibration windows, per expert, as llama-imatrix
gathers it; an expert that no token reached takes the mean of its bank. Blocks are written as uint8 tensors named
"<prefix>ggml_<TYPE>", all other tensors as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ggml import LIBRARY, load_library, quantize
from importance import InputSquares
from job import Job, run_job
from packed_formats import ExpertName, expert_name, load_checkpoint
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def quantize_experts(job: Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    squares = InputSquares(model)
    for windows in job.windows.split(8):
        model(windows, use_cache=False)
    library = load_library(Path(sys.prefix) / "lib" / LIBRARY)
    packed = {}
    for name, weight in load_checkpoint(Path(job.model)).items():
        expert: ExpertName | None = expert_name(name)
        if expert is None:
            packed[name] = weight
            continue
        importance = squares.mean(expert.layer, expert.expert, expert.projection == "down_proj")
        packed[f"{name.removesuffix('weight')}ggml_{job.variant}"] = quantize(library, weight, importance, job.variant)
    job.output.mkdir(parents=True)
    save_file(packed, job.output / "model.safetensors")


if __name__ == "__main__":
    run_job(quantize_experts, packages=("gguf", "torch", "transformers"))
