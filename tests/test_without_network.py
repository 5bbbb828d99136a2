"""Local models and texts are quantized, evaluated and compared without asking anything of a network."""

import json
import os
import subprocess
import sys

from tiny_models import save_tiny_model

# Every attempt fails, as where there is no network, and is counted: a library may try again in another way.
_ALONE = """
import json, socket, sys
attempts = []

def refuse(*arguments, **options):
    attempts.append(str(arguments[-2:]))
    raise socket.gaierror(socket.EAI_AGAIN, "no network")

socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refuse
from kbvq.cli import main
print(json.dumps({"status": [main(step) for step in json.loads(sys.argv[1])], "attempts": attempts}))
"""


def test_no_step_asks_a_network(text, data, tmp_path):
    original, packed = tmp_path / "original", tmp_path / "packed"
    save_tiny_model(original, "qwen3_moe")
    common = ["--device", "cpu", "--quiet"]
    quantize = ["quantize", "--model", original, "--output", packed, "--calibration", text, "--recipe", "paper"]
    measured = ["--baseline", original, "--perplexity", text, "--window", "64"]
    tasks = ["--tasks", "fixture_cloze", "--include-path", data / "tasks", "--limit", "2", "--generation", "--report"]
    steps = [
        [*quantize, "--samples", "4", "--sequence-length", "32", *common],
        ["eval", packed, *measured, *tasks, *common],
        ["compare", packed, original, *measured, "--output", tmp_path / "compared", *common],
        ["report", packed],
    ]
    # What a user has: transformers and the others may ask the hub.
    allowed = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    arguments = json.dumps([[str(word) for word in step] for step in steps])
    paths = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, "-c", _ALONE, arguments], capture_output=True, text=True, env=allowed | {"PYTHONPATH": paths}
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {"status": [0] * 4, "attempts": []}, run.stderr
