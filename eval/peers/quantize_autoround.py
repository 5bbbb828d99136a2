"""Quantize the experts of a model with AutoRound; runs in the environment of requirements-autoround.txt.

Signed gradient descent on rounding and on the ranges of the groups, per decoder layer; asymmetric, groups of 64.
Without a variant its tuned default: 200 iterations of 8 windows. "best": what its authors advise at 2 bits, the recipe
auto-round-best (1000 iterations) with enable_alg_ext, their variant of the algorithm for that width. "mixed": the
default's iterations, with AutoScheme's choice of 2 or 4 bits for each projection, 2.3 on average.
"""

from __future__ import annotations

from auto_round import AutoRound, AutoScheme
from job import GROUP_SIZE, Job, run_job
from transformers import AutoModelForCausalLM, AutoTokenizer

MIXED_BITS = 2.3
"""Average bits of a code when they are mixed."""


def quantize(job: Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    width: dict[str, object] = {"bits": job.bits}
    if job.variant == "mixed":
        width = {"scheme": AutoScheme(avg_bits=MIXED_BITS, options=("W2A16G64", "W4A16"), ignore_scale_zp_bits=True)}
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        group_size=GROUP_SIZE,
        sym=False,
        iters=1000 if job.variant == "best" else 200,
        enable_alg_ext=job.variant == "best",
        dataset=list(job.windows.split(8)),
        nsamples=len(job.windows),
        seqlen=job.windows.shape[1],
        batch_size=8,
        seed=job.seed,
        ignore_layers="self_attn,shared_expert_gate",
        enable_torch_compile=False,
        device_map="cpu",
        **width,
    )
    rounder.quantize_and_save(str(job.output), format="auto_round")


run_job(quantize, packages=("auto-round", "torch", "transformers"))
