"""Statistics of the experts on the disk, gathered group by group: the bytes of a run that has them all in memory."""

import math
from dataclasses import replace

import pytest
import torch
from plan_table import CONFIGS, write_model
from quantizing import quantize
from tiny_models import save_tiny_model

from kbvq.errors import ConfigError
from kbvq.models.calibration import LayerRunner
from kbvq.models.layer_stream import LayerStream
from kbvq.quantization import pipeline, run_plan
from kbvq.quantization.pipeline import QuantizeOptions, prepare_run
from kbvq.quantization.planning import check_budget
from kbvq.quantization.run_plan import make_plan
from kbvq.recipes import make_recipe
from kbvq.storage.work_folder import WorkFolder

# Experts as those of DeepSeek-V3: many, and wide for how deep they are, so that nothing is as large as their moments.
EXPERTS, WIDTH = 24, 192
SHAPE = dict(hidden_size=WIDTH, num_experts=EXPERTS, moe_intermediate_size=8, shared_expert_intermediate_size=8)

RECIPES = {
    "paper": make_recipe("paper", 2, kmeans_iterations=1, codebook_scope="bank"),
    "fast": make_recipe("fast", 3, kmeans_iterations=1, max_vectors_per_codeword=8),
    "default": make_recipe("default", 3, dense_bits=4),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spilled") / "model"
    save_tiny_model(folder, "qwen2_moe", **SHAPE)
    return folder


def tensors(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_within_less_memory_gives_the_same_bytes(model, tmp_path, text, monkeypatch, name):
    for module in (run_plan, pipeline):  # four batches; one of 8192 tokens would be all of the memory planned here
        monkeypatch.setattr(module, "TOKENS_PER_BATCH", 64)
    passes, files = [], []
    watch, scratch = LayerRunner.watch, WorkFolder.scratch
    monkeypatch.setattr(LayerRunner, "watch", lambda *given: (passes.append(1), watch(*given))[1])
    monkeypatch.setattr(
        WorkFolder,
        "scratch",
        lambda self, *shape, device: (files.append(shape), scratch(self, *shape, device=device))[1],
    )
    options = {"samples": 8, "sequence_length": 32, "device": "cpu"}
    asked = QuantizeOptions(str(model), tmp_path / "spilled", str(text), RECIPES[name], **options)
    expected = quantize(model, tmp_path / "in-memory", text, RECIPES[name], **options)
    whole, before = prepare_run(asked, model).plan, len(passes)
    assert not whole.spills and not files

    least = whole.least_memory
    assert least < whole.memory.total
    plan = prepare_run(replace(asked, max_memory=int(least) + 1), model).plan
    assert 0 < plan.statistics_at_once < plan.disk.parts["statistics"]
    with pytest.raises(ConfigError, match="Qwen2MoeForCausalLM.* of statistics on the disk already"):
        quantize(model, tmp_path / "spilled", text, RECIPES[name], **options, max_memory=int(least) - 1)

    found = quantize(model, tmp_path / "spilled", text, RECIPES[name], **options, max_memory=int(least) + 1)
    assert tensors(tmp_path / "spilled") == tensors(tmp_path / "in-memory")
    assert found["layers"] == expected["layers"]
    assert len(passes) - before > before + 1  # each group of experts has its own
    assert (EXPERTS, WIDTH, WIDTH) in files


def test_deepseek_v3_is_planned_with_its_statistics_on_the_disk_or_refused_with_the_numbers(tmp_path):
    write_model(tmp_path, CONFIGS["DeepSeek-V3"])
    stream, recipe = LayerStream(tmp_path, dtype=torch.float32, device="cpu"), make_recipe("default", 2.25)
    formats = check_budget(stream.banks, recipe)
    whole, spilled = (
        make_plan(stream, formats, recipe, samples=128, sequence_length=2048, limit=limit)
        for limit in (math.inf, 192e9)
    )
    assert not whole.spills and spilled.spills
    moments = 4 * 256 * 7168**2  # of gate and up in float32, and as much of their factors while they are coded
    assert moments < whole.memory.parts["statistics"] < 1.1 * moments
    assert 2 * moments < spilled.disk.parts["statistics"] < 2.2 * moments
    assert spilled.memory.total == whole.least_memory < 192e9 < whole.memory.total - 1.9 * moments
    # At most a half of the experts' moments, and the sums of what they are to give, beside the layer: two passes.
    assert moments < spilled.statistics_at_once < 2 * moments
    assert sum(spilled.seconds.values()) > 1.2 * sum(whole.seconds.values())
    lines = ["\n".join(plan.lines()) for plan in (whole, spilled)]
    hint, note = "187 GB with statistics on the disk, by --max-memory", "statistics of the experts there"
    assert [(hint in text, note in text) for text in lines] == [(True, False), (False, True)]
    for plan, part in ((whole, "statistics 57.13 GB"), (spilled, "with 110 GB of statistics on the disk already")):
        with pytest.raises(ConfigError, match=rf"DeepseekV3ForCausalLM.*{part}.* --max-memory allows 64.00 GB"):
            plan.check(tmp_path, max_memory=64 * 10**9, device=torch.device("cpu"))
