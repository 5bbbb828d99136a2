"""The lm-eval model `kbvq`: packed checkpoints in lm-eval's own command line.

    lm_eval --model kbvq --model_args pretrained=DIR --tasks arc_easy
    kbvq lm-eval --model kbvq --model_args pretrained=DIR --tasks arc_easy

The first finds it by lm_eval_plugin.py. In Python, importing this module is enough.
"""

from __future__ import annotations

import sys
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import kbvq  # noqa: F401 - registers the quantization method with transformers


@register_model("kbvq")
class KbvqLM(HFLM):
    """lm-eval's model of transformers, with packed checkpoints; its arguments are those of `hf`. Progress bars only
    on a terminal."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())


def main(arguments: list[str]) -> None:
    """lm-eval's command line with these arguments."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
