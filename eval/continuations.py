"""The same prompts before and after: `python eval/continuations.py ORIGINAL QUANTIZED [QUANTIZED …] --output FILE.md`.

Twelve fixed prompts, none chosen by what came of it, continued greedily by each model in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbvq.storage.checkpoint import inspect_checkpoint

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
    "The main difference between a virus and a bacterium is that",
    "To make a good cup of tea, you first",
    "In the year 1969, astronauts",
    "The most important rule of good writing is",
    "A prime number is a number that",
    "Dear Sir or Madam, I am writing to",
    "If you drop a stone into a pond,",
    "Plants need sunlight because",
    "The old man looked out of the window and",
)


@torch.no_grad()
def continuations(folder: Path, prompts: tuple[str, ...], new_tokens: int) -> list[str]:
    """Greedy continuations of the prompts by the model in `folder`, one at a time, without the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def markdown(prompts: tuple[str, ...], columns: dict[str, list[str]]) -> str:
    """A section per prompt with a line per model; line breaks become ⏎."""
    lines = ["Fixed prompts, greedy continuations, unselected; made by `python eval/continuations.py`.", ""]
    for index, prompt in enumerate(prompts):
        lines += [f"**{prompt}** …", ""]
        lines += [f"- {label}: … {texts[index].strip().replace(chr(10), ' ⏎ ')}" for label, texts in columns.items()]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("quantized", type=Path, nargs="+", help="checkpoints of kbvq, in folders of different names")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--output", type=Path, help="a Markdown file, beside the screen")
    options = parser.parse_args()
    labels = [f"{path.name}, {inspect_checkpoint(path)['bits_per_weight']:.2f} bits" for path in options.quantized]
    if len(set(labels)) < len(labels):
        parser.error(f"checkpoints are called alike: {'; '.join(labels)}; give their folders different names")
    folders = dict(zip(("original", *labels), (options.original, *options.quantized), strict=True))
    columns = {label: continuations(path, PROMPTS, options.new_tokens) for label, path in folders.items()}
    text = markdown(PROMPTS, columns)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
