"""The script of the comparison: what it would run is there and takes what it is given; its pictures."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import plot_results

ROOT = Path(__file__).resolve().parent.parent


def commands(work, **variables):
    script = [ROOT / "eval" / "reproduce_comparison.sh", work, "--dry-run"]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=os.environ | variables)
    return [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]


def test_dry_run_prints_commands_that_the_scripts_take(tmp_path):
    planned = commands(tmp_path)
    scripts = [command[0] for command in planned if command[0] != "-m"]
    assert scripts == [
        "eval/fixture_table.py",
        "eval/peers/run.py",
        *["eval/real_model.py"] * 3,
        "eval/real_table.py",
        "eval/plot_results.py",
    ]
    for command in planned:
        if command[0] != "-m":
            source = (ROOT / command[0]).read_text(encoding="utf-8")
            options = [word for word in command if word.startswith("--")]
            assert options and all(f'"{option}"' in source for option in options), command
    assert not any(tmp_path.iterdir())


def test_a_part_of_it_asks_every_script_for_that_part(tmp_path):
    fixture, peers, plot = commands(
        tmp_path, ROWS="plain VQ,fast", PEERS="rtn", BITS="2", MODELS="", RESULTS="elsewhere"
    )
    assert fixture[fixture.index("--only") + 1 :] == ["plain", "VQ", "fast"]  # echoed without quotes
    assert peers[peers.index("--peer") + 1 :] == ["rtn"] and peers[peers.index("--bits") + 1] == "2"
    assert fixture[fixture.index("--output") + 1] == "elsewhere/fixture.json" and plot[-1] == "elsewhere"
    table = commands(tmp_path, ROWS="fast", PEERS="rtn", MODELS="one")[-2]
    assert table[0] == "eval/real_table.py" and table[table.index("--only") + 1 :] == ["fast", "rtn"]


def test_picture_shows_means_over_seeds_and_every_tool(tmp_path):
    ours = {"label": "fast", "bits": 2, "bits_per_weight": 2.25}
    rows = [ours | {"kl": 0.01}, ours | {"kl": 0.03}, ours | {"label": "default, rq", "kl": 1}]
    peers = [{"peer": "rtn", "bits": 2, "bits_per_weight": 2.28, "scores": {"kl": 0.5}}]
    real = {"group": 2, "bits_per_weight": 2.25, "kl": 0.4, "model": "one"}
    tools = [real | {"tool": "kbvq fast", "text": "test"}, real | {"tool": "autoround", "text": "validation"}]
    for name, content in (("fixture", {"results": rows}), ("peers", {"rows": peers})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert plot_results.bundled_points(tmp_path) == {"kbvq fast": [(2.25, 0.02)], "round to nearest": [(2.28, 0.5)]}
    plot_results.main(["--results", str(tmp_path)])
    assert "SmolLM2" not in (tmp_path / "comparison.svg").read_text()
    (tmp_path / "real.json").write_text(json.dumps({"results": tools}))
    testbed = "SmolLM2-135M, one expert a layer, test text"
    assert plot_results.real_points(tmp_path) == {testbed: {"kbvq fast": [(2.25, 0.4)]}}
    plot_results.main(["--results", str(tmp_path)])
    picture = (tmp_path / "comparison.svg").read_text()
    assert all(f">{text}</text>" in picture for text in (testbed, "kbvq fast", "round to nearest"))
    assert "AutoRound" not in picture and "prefers-color-scheme: dark" in picture
