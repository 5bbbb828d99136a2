"""One run in several processes, by torch.distributed with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the runs, how they ended, and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS.parent / "kernels", TESTS)))
    command = [sys.executable, TESTS / "ranks_in_processes.py", folder, "1", "2", "4"]
    environment = os.environ | {"PYTHONPATH": paths}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout.splitlines()[-1]), result.stderr


def record(folder):
    return json.loads((folder / "kbvq_run.json").read_text())


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_ranks_gives_the_same_up_to_the_order_of_sums(runs, count):
    """Moments are summed in another order, so their last bits differ; codes differ only where that breaks a tie."""
    folder, ended, _ = runs
    assert ended["on-1"] == [0] and ended[f"on-{count}"] == [0] * count
    one, many = record(folder / "on-1"), record(folder / f"on-{count}")
    choices = [
        [(row["code_bits"], row["rank"], row["bias"]) for row in r["budget"]["projections"]] for r in (one, many)
    ]
    assert choices[0] == choices[1]
    for a, b in zip(one["layers"], many["layers"], strict=True):
        assert b["output_error"] == pytest.approx(a["output_error"], rel=1e-4)
        for bank_a, bank_b in zip(a["banks"], b["banks"], strict=True):
            assert bank_a["tokens"] == bank_b["tokens"]
            error = bank_a["down_proj"]["relative_error"]
            assert bank_b["down_proj"]["relative_error"] == pytest.approx(error, rel=1e-4)


def test_weights_made_from_the_inverse_of_the_sums_differ_as_with_other_batches(runs):
    """The inverse turns a last bit of the sums into another code now and then, and error feedback carries that on.

    Between batches of 64, 128 and 768 tokens in one process the second layer's error differs by .5 %, the first's not.
    """
    folder, ended, _ = runs
    assert ended["matched-1"] == [0] and ended["matched-2"] == [0, 0]
    one, two = ([layer["output_error"] for layer in record(folder / f"matched-{n}")["layers"]] for n in (1, 2))
    assert two[0] == pytest.approx(one[0], rel=1e-4)
    assert two == pytest.approx(one, rel=0.02)


def test_an_embedding_that_is_the_head_too_is_coded_for_what_the_head_gets_on_all_ranks(runs):
    """Its statistics are sums over all windows, which the ranks share; without them it would be coded as an embedding,
    with another error."""
    folder, ended, _ = runs
    assert ended["tied-1"] == [0] and ended["tied-2"] == [0, 0]
    one, two = ({row["path"]: row for row in record(folder / f"tied-{n}")["dense"]["matrices"]} for n in (1, 2))
    assert one.keys() == two.keys() and "model.embed_tokens" in one
    for path, row in one.items():
        assert two[path]["relative_error"] == pytest.approx(row["relative_error"], rel=1e-3), path


def test_lost_rank_ends_the_run_cleanly_and_another_number_of_ranks_finishes_it(runs):
    folder, ended, said = runs
    assert ended["lost"] == [2, -9] and ended["kept"]
    assert "rank 0: the other processes of the run cannot be reached" in said
    assert ended["resumed"] == [0, 0, 0, 0]
    one, resumed = record(folder / "on-1"), record(folder / "lost")
    errors = [[layer["output_error"] for layer in r["layers"]] for r in (one, resumed)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
