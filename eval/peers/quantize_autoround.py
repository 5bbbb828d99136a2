"""Quantize the experts of a model with AutoRound; runs in the environment of requirements-autoround.txt.

The setting is AutoRound's tuned default: signed gradient descent on rounding and on the ranges of the groups, 200
iterations of 8 windows per decoder layer, asymmetric, groups of 64.
"""

from __future__ import annotations

from auto_round import AutoRound
from job import GROUP_SIZE, Job, run_job
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(job: Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=job.bits,
        group_size=GROUP_SIZE,
        sym=False,
        iters=200,
        dataset=list(job.windows.split(8)),
        nsamples=len(job.windows),
        seqlen=job.windows.shape[1],
        batch_size=8,
        seed=job.seed,
        ignore_layers="self_attn",
        enable_torch_compile=False,
        device_map="cpu",
    )
    rounder.quantize_and_save(str(job.output), format="auto_round")


run_job(quantize, packages=("auto-round", "torch", "transformers"))
