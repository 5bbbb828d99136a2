"""Quantize the experts of a model with llm-compressor; runs in the environment of requirements-llmcompressor.txt.

GPTQ, asymmetric, groups of 64, every other setting the tool's own: columns in order of activation within fixed groups,
and every token calibrates every expert.
"""

from __future__ import annotations

from datasets import Dataset
from job import GROUP_SIZE, Job, run_job
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(job: Job) -> None:
    # Without linear layers in place of the fused experts the tool would find nothing to quantize in them.
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(job.model, dtype="auto"))
    weights = {"num_bits": job.bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP_SIZE}
    group = {"targets": [r"re:.*mlp\.experts\..*_proj$"], "weights": weights}
    windows = job.windows.tolist()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]}),
        recipe=GPTQModifier(config_groups={"group_0": group}),
        num_calibration_samples=len(windows),
        max_seq_length=job.windows.shape[1],
    )
    model.save_pretrained(job.output, save_compressed=True)


run_job(quantize, packages=("llmcompressor", "compressed-tensors", "torch", "transformers"))
