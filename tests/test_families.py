"""A few architectures of each kind through the whole matrix; tests/family_matrix.py runs all of them."""

import re
from pathlib import Path

import pytest
from family_matrix import check_family
from moe_families import REFUSED_WITH_OLD_TRANSFORMERS, moe_model_types
from quantizing import write_text

from kbvq.recipes import make_recipe
from kbvq.storage.checkpoint import inspect_checkpoint
from kbvq.structures import PROJECTIONS

REPRESENTATIVE = [
    "gpt_oss",  # biases, transposed, interleaved, a gating of its own
    "llama4_text",  # called with the tokens of all experts at once
    "dbrx",  # three matrices with the rows of all experts
    "nemotron_h",  # no gate, hybrid of attention and Mamba
    "qwen3_next",  # linear attention, a shared expert
    "deepseek_v4",  # several residual streams, experts chosen by the token
    "qwen3_vl_moe",  # a model that sees, on text
    "ernie4_5_vl_moe",  # experts of text and of images in one list, of which calibration reaches the first
    "qwen4_exp_text",  # several residual streams
]

KNOWN = moe_model_types()
"""Older versions of transformers lack some."""

BUDGETED = ["gpt_oss", "llama4_text", "deepseek_v3", "qwen3_next", "jamba"]


@pytest.mark.parametrize("model_type", [t for t in REPRESENTATIVE if t in KNOWN])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")  # 5.4, of its own NemotronH
def test_representative_architectures(model_type, tmp_path):
    family = check_family(model_type, tmp_path, write_text(tmp_path / "calibration.txt", words=200))
    refused = ({"deepseek_v4": "input_ids"} | REFUSED_WITH_OLD_TRANSFORMERS).get(model_type)
    assert family.reason is None if refused is None else re.search(refused, family.reason)
    assert not any("vision" in bank.path for bank in family.banks)


@pytest.mark.parametrize("model_type", BUDGETED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_budget_and_trellis(model_type, tmp_path):
    recipe = make_recipe("default", 3, bcos=False)
    family = check_family(model_type, tmp_path, write_text(tmp_path / "calibration.txt", words=200), recipe=recipe)
    assert family.reason is None
    summary = inspect_checkpoint(tmp_path / "packed")
    assert {bank[p]["codebook"] for bank in summary["banks"] for p in PROJECTIONS} == {"trellis"}
    assert summary["bits_per_weight"] <= 3


def test_the_table_lists_every_architecture():
    """The table in docs was made with this transformers or a newer one: it knows all that are installed."""
    table = (Path(__file__).parent.parent / "docs" / "results" / "families.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| (\w+) \|", table, re.MULTILINE))
    assert set(KNOWN) <= listed
