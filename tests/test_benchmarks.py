"""The benchmark scripts run, on small problems, and what they report follows from the problem."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import continuations
import dense_table
import fitted_text
import fixture_table
import generation_speed
import pytest
import rate_potential
import real_table
import row_importance
import task_table
import torch
import trellis_levels
import weight_codes
from tiny_models import save_tiny_model, tiny_tokenizer
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from kbvq.models.calibration import ObservedBank
from kbvq.models.expert_forward import gated
from kbvq.recipes import make_recipe
from kbvq.structures import InputMoments
from kbvq_eval.baseline import BaselineCache

ROOT = Path(__file__).resolve().parent.parent


def test_shared_basis_pays_where_weights_share_and_not_where_they_do_not(tmp_path):
    output = tmp_path / "idre.json"
    command = [sys.executable, ROOT / "eval" / "idre_benchmark.py", "--quick", "--shares", "0", "0.7"]
    subprocess.run([*command, "--output", output], check=True, capture_output=True)
    for row in json.loads(output.read_text())["rows"]:
        assert row["cost_bits"] > 0
        # A basis of rank 8 of 128 takes a sixteenth of white weights, worth .05 bit, and nearly all that is shared.
        assert (row["gain_bits"] > 0.5) == (row["share"] > 0)
    assert "| random | 0.700 |" in output.with_suffix(".md").read_text()


def test_real_table_measures_what_is_missing_and_keeps_what_there_is(tmp_path, text, monkeypatch):
    """Rounding to nearest needs no environment of its own, and a row of ours is quantized: two tools, one text."""
    models = tmp_path / "models"
    save_tiny_model(models / "one", "mixtral", dtype=torch.bfloat16, intermediate_size=64)
    output = tmp_path / "real.json"
    earlier = {"model": "one", "text": "validation", "group": 2, "seed": 0, "samples": 128, "tool": "kbvq fast"}
    earlier["kl"] = 1.0
    numbers = {name: 0.5 for name in real_table.SCORES} | {"bits_per_weight": 2.0, "predicted_tokens": 9}
    output.write_text(json.dumps({"results": [numbers | earlier]}))
    for name in ("calibration.txt", "validation.txt"):
        (tmp_path / name).write_text(text.read_text())
    monkeypatch.setattr(real_table, "DATA", tmp_path)
    monkeypatch.setattr(real_table, "measure", lambda *arguments: numbers | {"tool": "kbvq default", "kl": 0.25})
    arguments = ["--models", str(models), "--model", "one", "--work", str(tmp_path / "work"), "--bits", "2"]
    arguments += ["--only", "fast", "default", "rtn", "--windows", "4", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["real_table.py", *arguments])
    real_table.main()
    rows = {row["tool"]: row for row in json.loads(output.read_text())["results"]}
    assert rows.keys() == {"kbvq fast", "kbvq default", "rtn"}
    assert rows["kbvq fast"]["kl"] == 1.0 and rows["kbvq default"]["predicted_tokens"] == 4 * 255
    assert rows["rtn"]["bits_per_weight"] == 2 + 18 / 64 and rows["rtn"]["kl"] > 0
    assert "| kbvq fast | 2 | 2.000 | 1.0000 |" in output.with_suffix(".md").read_text()


def test_task_table_takes_any_checkpoint_and_pairs_it_with_the_original(tmp_path, monkeypatch):
    """The original beside itself differs by nothing, another network does; bits are what made it says."""
    other = tmp_path / "autoround-2-0"
    shutil.copytree(task_table.MODEL, other / "dense")
    model = AutoModelForCausalLM.from_pretrained(task_table.MODEL, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.neg_()
    model.save_pretrained(other / "dense")
    (other / "row.json").write_text(json.dumps({"minimal_bits": 2.28125}))
    arguments = ["--checkpoint", f"itself={task_table.MODEL}", f"other={other / 'dense'}", "--limit", "12"]
    arguments += ["--output", str(tmp_path / "tasks.json")]
    monkeypatch.setattr(sys, "argv", ["task_table.py", *arguments])
    task_table.main()
    itself, negated = json.loads((tmp_path / "tasks.json").read_text())
    assert itself["bits_per_weight"] is None and negated["bits_per_weight"] == 2.28125
    assert set(itself["tasks"]) == set(task_table.TASKS)
    differences = [metric["difference"] for metrics in itself["tasks"].values() for metric in metrics.values()]
    assert all(difference == {"value": 0.0, "stderr": 0.0} for difference in differences)
    assert negated["tasks"]["fixture_lastword"]["acc"]["difference"]["value"] < 0
    table = (tmp_path / "tasks.md").read_text()
    assert "| other | 2.281 |" in table and "the first 12 items" in table


@pytest.mark.parametrize("group", [2, 3])
def test_rows_of_the_real_table_are_recipes_and_an_ablation_leaves_its_part_out(group):
    for row in real_table.kbvq_rows(group):
        make_recipe(row.recipe, row.bits, **row.changes)
    for row, changes in zip(real_table.ablations(group, "fast"), real_table.PARTS.values(), strict=True):
        whole, part = make_recipe("fast", row.bits), make_recipe(row.recipe, row.bits, **row.changes)
        assert part != whole and dataclasses.replace(whole, **changes) == part


def test_continuations_are_those_of_each_model(tmp_path):
    save_tiny_model(tmp_path / "model", "mixtral")
    texts = continuations.continuations(tmp_path / "model", ("w5 w6", "w7"), 6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for ids, text in (([5, 6], texts[0]), ([7], texts[1])):
        for _ in range(6):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == 1:
                break
        assert tiny_tokenizer().decode(ids[-6:], skip_special_tokens=True) == text
    table = continuations.markdown(("w5 w6", "w7"), {"original": texts, "2.25 bits": ["a\nb", "c"]})
    assert "**w5 w6** …\n\n- original: … " in table and "- 2.25 bits: … a ⏎ b\n" in table


def test_fitted_text_scores_the_windows_of_the_calibration_and_others(tmp_path, text, monkeypatch, capsys):
    save_tiny_model(tmp_path / "model", "mixtral", dtype=torch.float32)
    unseen = tmp_path / "unseen.txt"
    unseen.write_text(" ".join(text.read_text().split()[::-1]))
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    changed.model.norm.weight.data.mul_(1.3)
    changed.save_pretrained(tmp_path / "changed")

    def divergences(checkpoint):
        arguments = ["--original", tmp_path / "model", "--checkpoint", checkpoint, "--calibration", text, "--unseen"]
        arguments += [unseen, "--samples", 4, "--length", 16, "--windows", 3]
        monkeypatch.setattr(sys, "argv", ["fitted_text.py", *map(str, arguments)])
        fitted_text.main()
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == ["calibrated on", "unseen"]
        assert all(line.endswith("48 tokens") for line in lines)
        return [float(line.split()[-5]) for line in lines]

    assert divergences(tmp_path / "model") == [0, 0]
    fitted, other = divergences(tmp_path / "changed")
    assert fitted > 0 and other > 0 and fitted != other


def test_table_of_dense_bits_is_that_of_the_rows_that_are_kept():
    results = Path(dense_table.ROOT) / "docs" / "results"
    kept = json.loads((results / "dense.json").read_text(encoding="utf-8"))
    assert dense_table.markdown(kept["results"], kept["setting"]) == (results / "dense.md").read_text(encoding="utf-8")


def test_code_formats_are_compared_on_one_projection_and_leave_the_model_as_it_was(trained_model):
    model = AutoModelForCausalLM.from_pretrained(trained_model, dtype=torch.float32, experts_implementation="eager")
    tokens = torch.randint(5, 4000, (2, 64), generator=torch.Generator().manual_seed(0))
    problem = weight_codes.read_problem(model, tokens, 1, 2)
    assert problem.moments.tokens.tolist() == sorted(problem.moments.tokens.tolist(), reverse=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    row = weight_codes.measure(problem, model, BaselineCache.of_model(model, tokens), "sign-vq", 2)
    assert row["kl"] > 0 and 0 < row["relative_error"] < 0.1 and row["bits_per_weight"] > 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "| `sign-vq` | " in weight_codes.markdown([row], "")


def test_stretched_levels_help_heavy_tails_and_what_they_save_is_foreseen():
    """Gaussian weights, and the same with a few of ten deviations: coded both ways."""
    generator = torch.Generator().manual_seed(0)
    weights, inputs = torch.randn(2, 128, 64, generator=generator), torch.randn(2, 500, 64, generator=generator)
    moments = InputMoments.zeros(2, 64)
    for expert in range(2):
        moments.add_(expert, inputs[expert][: 400 + 100 * expert], torch.ones(400 + 100 * expert))
    plain = trellis_levels.measure("plain", weights, moments)
    weights[1] *= 1 + 5 * (torch.rand(128, 64, generator=generator) < 0.01)
    heavy = trellis_levels.measure("heavy", weights, moments)
    assert heavy.kurtosis > 4 > plain.kurtosis
    for bits in trellis_levels.BITS:
        old, tail, new, foreseen = heavy.errors[bits]
        assert new < 0.9 * old and tail > plain.errors[bits][1] and abs(foreseen / new - 1) < 0.25
    assert f"| heavy | {heavy.kurtosis:.1f} | " in trellis_levels.markdown([plain, heavy], "")


def test_row_importance_compares_both_orders(tmp_path, monkeypatch):
    folder, output = tmp_path / "model", tmp_path / "rows.md"
    save_tiny_model(folder, "mixtral", dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(
        sys, "argv", ["row_importance.py", "--model", str(folder), "--windows", "2", "--output", str(output)]
    )
    row_importance.main()
    assert "| model.layers.0.mlp.experts | " in output.read_text()
    generator = torch.Generator().manual_seed(0)
    energy = torch.randn(512, generator=generator).exp()
    row = row_importance.measure("gate and up", torch.randn(1024, 64, generator=generator), energy.repeat(2), energy)
    for bits in row_importance.BITS:
        assert row.ideal < row.spread[bits] < 1.2 * row.ideal < 0.8 < row.descending[bits]


def test_rates_of_their_own_are_worth_what_the_errors_differ_by():
    alike = torch.ones(8)
    assert abs(rate_potential.worth(alike, 2)) < 1e-9
    # Four times the error on one half and a quarter on the other: a bit more there and a bit less here.
    apart = torch.tensor([4.0] * 4 + [0.25] * 4)
    at_rates = 4 * (4.0 * 0.0180 + 0.25 * 0.285)
    assert abs(rate_potential.worth(apart, 2) - 0.5 * math.log2(17 * 0.0693 / at_rates)) < 1e-9
    best = min(
        sum(apart[i] * rate_potential.DISTORTION[rate] for i, rate in enumerate(rates))
        for rates in itertools.product((1, 2, 3, 4), repeat=8)
        if sum(rates) <= 16
    )
    assert abs(rate_potential.least_error(apart, 2) - best) < 1e-6


def test_rate_potential_tells_busy_experts(tmp_path, monkeypatch):
    folder, output = tmp_path / "model", tmp_path / "rates.md"
    save_tiny_model(folder, "mixtral", dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", ["rate_potential.py", "--model", str(folder), "--output", str(output)])
    rate_potential.main()
    assert "| model.layers.1.mlp.experts.down_proj | " in output.read_text()
    generator = torch.Generator().manual_seed(0)
    weights = {"gate_up_proj": torch.randn(4, 32, 16, generator=generator), "down_proj": torch.randn(4, 16, 16)}
    module = ObservedBank(weights, gated(silu))
    module.watch_("gate_up_proj", "down_proj", by_routing=True)
    tokens = torch.randn(800, 16, generator=generator)
    busy = (torch.rand(800, generator=generator) * 1.3).long().clamp_max(1) + 2 * (torch.arange(800) % 40 == 0)
    module(tokens, busy[:, None], torch.ones(800, 1))
    for row in rate_potential.measure("bank", module):
        assert row.largest > 20 and row.worth[2]["experts"] > 0.2


def test_bits_above_the_limit_are_means_over_the_experts_of_all_tiers():
    def report(path, experts, bits):
        projections = {name: {"bits_above_limit": bits} for name in ("gate_up_proj", "down_proj")}
        return {"path": path, "tokens": [9] * experts, **projections}

    layers = [{"banks": [report("0.experts", 6, 1.0), report("0.experts.tiers.0", 2, 2.0)]}]
    layers.append({"banks": [report("1.experts", 8, 0.5)]})
    assert fixture_table.bits_above_limit(layers) == [1.25, 1.25, 0.5, 0.5]


def test_decoder_speed_states_both_sizes(tmp_path):
    output = tmp_path / "speed.json"
    command = [sys.executable, ROOT / "eval" / "decoder_speed.py", "--quick", "--seconds", "0.01", "--output", output]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    rows = json.loads(output.read_text())["rows"]
    names = ["RQ-MoE", "QINCo", "RQ-MoE, as many as QINCo", "QINCo, as many as RQ-MoE"]
    assert [row["decoder"] for row in rows[:4]] == names
    for ours, theirs, larger, smaller in zip(rows[::4], rows[1::4], rows[2::4], rows[3::4], strict=True):
        assert (larger["hidden_units"], smaller["hidden_units"]) == (theirs["hidden_units"], ours["hidden_units"])
        assert all(speed > 0 for speed in ours["vectors_per_second"].values())
    assert "bytes, RQ-MoE over QINCo, 16 against 16 units: " in output.with_suffix(".md").read_text()


def test_coding_time_is_split_into_stages(tmp_path):
    output = tmp_path / "speed.json"
    command = [sys.executable, ROOT / "eval" / "speed_benchmark.py", "--models", "Qwen3-30B-A3B", "--recipes", "fast"]
    small = ["--width-divisor", "16", "--experts", "1", "--tokens", "64"]
    subprocess.run([*command, *small, "--output", output], check=True, capture_output=True)
    (row,) = json.loads(output.read_text())["rows"]
    seconds = row["seconds"]
    coding = sum(seconds[stage] for stage in ("column scales", "tables", "factors", "codes", "output correction"))
    assert min(seconds.values()) >= 0 and seconds["codes"] > 0
    weights = 128 * 3 * 128 * 48
    assert row["coding"] * weights > 0.999999e6 * coding  # with what is in none of the stages
    assert abs(row["hours"] * 3600 / (sum(seconds.values()) * 48) - 1) < 1e-9
    assert "| Qwen3-30B-A3B | fast |" in output.with_suffix(".md").read_text()
    subprocess.run([*command, *small, "--coding-alone", "--output", output], check=True, capture_output=True)
    alone = next(row for row in json.loads(output.read_text())["rows"] if row["alone"])
    assert alone["seconds"]["codes"] > 0 and not alone["seconds"].get("limit") and not alone["seconds"].get("report")


def test_generation_speed_has_a_row_for_each_model_and_file(tmp_path, monkeypatch, capsys):
    threads = str(torch.get_num_threads())  # it sets them
    save_tiny_model(tmp_path / "model", "mixtral")
    (tmp_path / "file.gguf").write_bytes(bytes(2_000_000))
    program = tmp_path / "llama-bench"
    rows = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 1234.0}, {"n_prompt": 0, "n_gen": 32, "avg_ts": 56.0}]
    program.write_text(f"#!/bin/sh\necho '{json.dumps(rows)}'\n")
    program.chmod(0o755)
    arguments = ["--models", tmp_path / "model", "--gguf", tmp_path / "file.gguf", "--llama-bench", program]
    monkeypatch.setattr(
        sys, "argv", ["generation_speed.py", *map(str, arguments), "--threads", threads, "--rounds", "1"]
    )
    generation_speed.main()
    out = capsys.readouterr().out
    assert f"| file.gguf | {threads} | 2.0 | 1234 | 56.0 |" in out
    assert out.count(f"| model | {threads} | ") == 1
