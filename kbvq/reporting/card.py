"""README.md of a packed checkpoint: a model card with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kbvq.reporting.report import evaluation_rows
from kbvq.reporting.run_report import RunReport, read_run
from kbvq.reporting.templates import render

CARD = "README.md"


def write_card(folder: Path) -> Path:
    """Write the model card of a packed checkpoint into its folder, from what the folder holds; returns its path.

    Raises CheckpointError when it is no packed checkpoint.
    """
    path = Path(folder) / CARD
    path.write_text(render("card.md", card_context(read_run(Path(folder)))), encoding="utf-8")
    return path


def card_context(run: RunReport) -> dict[str, Any]:
    """What the template is filled with."""
    source = run.record.get("source") or {}
    calibration = run.record.get("calibration") or {}
    recipe = run.record.get("recipe") or {}
    versions = (run.record.get("environment") or {}).get("versions") or {}
    made = [
        ("recipe", f"{recipe.get('name', 'not recorded')}, codebook {recipe.get('codebook', 'not recorded')}"),
        (
            "calibration",
            f"{calibration.get('samples')} windows of {calibration.get('sequence_length')} tokens of "
            f"{calibration.get('source')}, seed {calibration.get('seed')}",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"),
    ]
    return {
        "metadata": _metadata(run, source),
        "license": source.get("license"),
        "run": run,
        "sizes": [*run.sizes, run.size],
        "rows": evaluation_rows(run.evaluation),
        "made": made,
    }


def _metadata(run: RunReport, source: dict[str, Any]) -> str:
    """The YAML that the hub reads. Values that need it are quoted, as JSON strings are YAML strings."""
    lines = []
    if run.base_model:
        lines += [f"base_model: {_quoted(run.base_model)}", "base_model_relation: quantized"]
    keys = [key for key in ("license", "license_name", "license_link") if source.get(key)]
    lines += [f"{key}: {_quoted(source[key])}" for key in keys]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    bits = round(run.summary["bits_per_weight"])
    lines += [f"- {tag}" for tag in ("kbvq", "moe", "mixture-of-experts", "quantized", f"{bits}-bit")]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    import json

    return json.dumps(str(text))
