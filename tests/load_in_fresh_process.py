"""Run as a script: load packed checkpoints as a user does, and store what they compute.

Argument: a JSON file with a list of {"folder", "options" (of from_pretrained), "result" (file to write)}.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import kbvq  # noqa: F401

PROMPT = torch.arange(3, 27).view(2, 12)


def outputs(model):
    """Logits of the prompt, and six tokens generated from it."""
    with torch.no_grad():
        logits = model(PROMPT).logits
        tokens = model.generate(PROMPT, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return {"logits": logits, "tokens": tokens}


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        cases = json.load(stream)
    for case in cases:
        save_file(outputs(AutoModelForCausalLM.from_pretrained(case["folder"], **case["options"])), case["result"])
