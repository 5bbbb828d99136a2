"""Quantize the experts of a model with GPTQModel; runs in the environment of requirements-gptqmodel.txt.

GPTQ with activation order, asymmetric, groups of 64, every other setting the tool's own.
"""

from __future__ import annotations

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT
from job import GROUP_SIZE, Job, run_job


def quantize(job: Job) -> None:
    config = QuantizeConfig(
        bits=job.bits,
        group_size=GROUP_SIZE,
        desc_act=True,
        sym=False,
        # The second version of the format stores zero points as they are.
        format=FORMAT.GPTQ_V2,
        # "-:" leaves modules out.
        dynamic={r"-:.*\.self_attn\..*": {}},
        device="cpu",
    )
    model = GPTQModel.load(job.model, config)
    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in job.windows.tolist()]
    model.quantize(examples, batch_size=8, backend=BACKEND.TORCH)
    model.save(str(job.output))


run_job(quantize, packages=("gptqmodel", "torch", "transformers"))
