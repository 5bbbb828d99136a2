"""Every mixture-of-experts architecture of the installed transformers: quantized, loaded and compared, or refused.

    python tests/family_matrix.py [MODEL_TYPE ...]

without arguments writes docs/results/families.md. The models are tiny and random (moe_families), so this is about
layouts, names and calls, not about quality. What each has to pass is `check_family`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from decoded_models import write_decoded_  # noqa: E402
from moe_families import moe_model_types, tiny_config, tiny_model  # noqa: E402
from quantizing import quantize, write_text  # noqa: E402
from tiny_models import tiny_tokenizer  # noqa: E402

import kbvq  # noqa: E402, F401
from kbvq.errors import UnsupportedModelError  # noqa: E402
from kbvq.models.calibration import observe_banks  # noqa: E402
from kbvq.models.layer_stream import LayerStream  # noqa: E402
from kbvq.models.moe_adapters import ExpertBank, find_expert_banks  # noqa: E402
from kbvq.recipes import Recipe, make_recipe  # noqa: E402

PROMPT = torch.arange(3, 27).view(2, 12)


@dataclass(frozen=True)
class Family:
    """What became of an architecture. reason: why it was refused; None for one that passed.

    experts: class of its routed experts. banks: those of its tiny model.
    """

    model_type: str
    experts: str
    banks: list[ExpertBank]
    reason: str | None


def check_family(
    model_type: str, folder: Path, text: Path, *, recipe: Recipe | None = None, **changes: object
) -> Family:
    """Take an architecture through everything; AssertionError where a result is not what it should be.

    1. Its decoder layers, run one by one with observed banks in the experts' places, give the logits of the model.
    2. It is quantized and saved; the checkpoint loads, and gives the logits and the tokens that the original model
       gives with the decoded weights written into its own experts.

    recipe: one without biases (bcos); None for the simplest. Where it changes tensors outside the experts, the original
    gets those too. changes: of the tiny config.
    """
    model = tiny_model(tiny_config(model_type, **changes))
    routed = [
        m for path, m in model.named_modules() if path.endswith(".experts") or type(m).__name__.endswith("Experts")
    ]
    experts = type(routed[0]).__name__ if routed else ""
    source, packed = folder / "source", folder / "packed"
    try:
        banks = find_expert_banks(model)
        model.save_pretrained(source)
        tiny_tokenizer().save_pretrained(source)
        _check_layers(model, source)
        # No biases of our own: the decoded weights are all that changes.
        used = recipe or make_recipe("paper", 2, kmeans_iterations=2, bcos=False)
        with patch("kbvq.quantization.pipeline.AutoTokenizer.from_pretrained", lambda folder: tiny_tokenizer()):
            quantize(source, packed, text, used, samples=2, sequence_length=24)  # some types insist on their own
    except UnsupportedModelError as error:
        return Family(model_type, experts, [], str(error).partition("; docs/results")[0])
    auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    loaded, reference = (auto.from_pretrained(path, dtype=torch.float32) for path in (packed, source))
    if recipe is not None and recipe.matching:
        own = tuple(f"{bank.path}." for bank in banks)
        reference.load_state_dict({n: t for n, t in loaded.state_dict().items() if not n.startswith(own)}, strict=False)
    for bank in banks:
        write_decoded_(reference.get_submodule(bank.path), loaded.get_submodule(bank.path))
    logits, expected = (_logits(m) for m in (loaded, reference))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits, _logits(model), atol=1e-3), "quantization changed nothing"
    tokens, wanted = (
        m.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False) for m in (loaded, reference)
    )
    assert torch.equal(tokens, wanted)
    return Family(model_type, experts, banks, None)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=PROMPT, use_cache=False).logits


@torch.no_grad()
def _check_layers(model: PreTrainedModel, source: Path) -> None:
    stream = LayerStream(source, dtype=torch.float32, device="cpu")
    states, layer_kwargs = stream.layer_inputs(PROMPT)
    assert states[0, 0].numel() == stream.stream_width
    for index, kwargs in enumerate(layer_kwargs):
        with stream.layer(index) as layer:
            own = [bank for bank in stream.banks if bank.decoder_layer == index]
            observe_banks(layer, f"{stream.layers_path}.{index}", own)
            states = layer(states, **kwargs)
            if not isinstance(states, torch.Tensor):
                raise UnsupportedModelError(
                    f"{model.config.model_type}: its decoder layers return more than their output"
                )
    with stream.head():
        torch.testing.assert_close(stream.logits(states), _logits(model), rtol=1e-3, atol=1e-4)


def run(model_types: list[str]) -> list[Family]:
    families = []
    for model_type in model_types:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            text = write_text(Path(folder) / "calibration.txt", words=200)
            try:
                family = check_family(model_type, Path(folder), text)
            except Exception as error:  # whatever else happens is what the table has to say
                first = " ".join(str(error).split())[:160]
                family = Family(model_type, "", [], f"FAILED: {type(error).__name__}: {first}")
        families.append(family)
        print(f"{model_type}: {family.reason or 'passed'} ({time.perf_counter() - started:.1f} s)", flush=True)
    return families


def table(families: list[Family]) -> str:
    passed = [family for family in families if family.reason is None]
    failed = [family for family in families if (family.reason or "").startswith("FAILED")]
    refused = len(families) - len(passed) - len(failed)
    lines = [
        "# Architectures",
        "",
        f"Made by `python tests/family_matrix.py` with transformers {transformers.__version__}: every mixture of "
        "experts that it generates text with, as a tiny random model, quantized, saved, loaded, compared with the "
        "original model's own experts holding the decoded weights, and asked to generate; or refused.",
        "",
        f"**{len(passed)} supported, {refused} refused, {len(failed)} failed, of {len(families)}.**",
        "",
        "| model type | experts | shared experts | served by |",
        "|---|---|---|---|",
    ]
    for family in passed:
        routed = [bank for bank in family.banks if bank.kind == "routed"]
        shared = "packed" if any(bank.kind == "shared" for bank in family.banks) else ""
        by = "plain torch" if routed[0].activation is None else "kernels"
        traits = [trait for trait, has in (("bias", routed[0].has_bias), ("no gate", not routed[0].gated)) if has]
        own = f" ({', '.join(traits)})" if traits else ""
        lines.append(f"| {family.model_type} | {family.experts}{own} | {shared} | {by} |")
    lines += ["", "| refused | reason |", "|---|---|"]
    lines += [f"| {family.model_type} | {family.reason} |" for family in families if family.reason is not None]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "families.md")
    options = parser.parse_args()
    families = run(options.model_types or moe_model_types())
    if not options.model_types:
        options.output.write_text(table(families), encoding="utf-8")
    return int(any((family.reason or "").startswith("FAILED") for family in families))


if __name__ == "__main__":
    sys.exit(main())
