"""Every Triton kernel, interpreted on the CPU, against float64; interpreter_cases.py says why in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Relative error in the Frobenius norm. float32: rounding of sums of tens of terms. float16: h, y and, on the dot
# path, nothing else are rounded to 2^-11 each. bfloat16: codewords, h and y to 2^-8 (the interpreter truncates).
TOLERANCE = {
    "pairs-d4": 1e-3,
    "pairs-d4-12bit-int8": 1e-3,
    "pairs-d8-rq2-bf16": 1.5e-2,
    "pairs-signed": 1e-3,
    "pairs-signed-exact-bf16": 1.5e-2,
    "pairs-d2": 1.5e-2,
    "blocks-signed-16": 1e-3,
    "blocks-rq-moe": 1e-3,
    "blocks-rq-moe-12bit": 1.5e-2,
    "pairs-trellis": 1.5e-2,
    "blocks-trellis": 1e-3,
    "pairs-trellis-3": 1e-3,
    "grouped-d4": 1e-3,
    "grouped-d8-rq2-12bit-bf16": 1.5e-2,
    "grouped-d2": 1e-6,
    "grouped-signed": 1e-6,
    "grouped-rq-moe": 1e-3,
    "grouped-trellis": 1e-3,
    "scratch-d4": 1.5e-2,
    "scratch-signed": 1.5e-2,
    "pairs-full-card": 1e-3,
    "blocks-full-card": 1e-3,
    "shared-pairs": 1e-3,
    "shared-grouped": 1e-3,
    "dequantize-d4": 1e-6,
    "dequantize-d8-rq3-12bit": 5e-4,
    "dequantize-signed": 1e-6,
    "dequantize-rq2-int8": 5e-4,
    "dequantize-trellis-1": 1e-6,
    "dequantize-trellis-2": 1e-6,
    "dequantize-trellis-3": 1e-6,
    "dequantize-trellis-4": 1e-6,
    "align-blocks": 0,
    "align-sort": 0,
    "baseline-gemv": 1e-6,
    "baseline-int4": 1e-6,
}


@pytest.fixture(scope="module")
def results() -> dict[str, float | str]:
    """Error of every case, or its traceback."""
    kernels = HERE.parents[1] / "kernels"
    paths = [str(kernels), str(kernels / "bench"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "interpreter_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_case_has_a_tolerance(results):
    assert results.keys() == TOLERANCE.keys()


@pytest.mark.parametrize("name", TOLERANCE)
def test_kernel_equals_reference(results, name):
    error = results[name]
    assert not isinstance(error, str), error
    assert error <= TOLERANCE[name]
