"""The benchmark scripts run, on small problems, and what they report follows from the problem."""

import json
import subprocess
import sys
from pathlib import Path

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
