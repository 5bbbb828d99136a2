#!/usr/bin/env bash
# Verify the kernels on this machine's GPU, then measure them: about 8 minutes, no network.
# Writes kernels/bench/results/<device>-<commit>.{json,md}, or to $1 when given. A failing check stops before any timing.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${1:-kernels/bench/results}
export PYTHONPATH=.:kernels:eval:kernels/bench:tests/kernels PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
start=$SECONDS
# Warnings of whatever versions this machine has are shown, not raised.
timeout 240 "$PYTHON" -m pytest -q -m gpu -o filterwarnings=default -p no:cacheprovider tests/kernels/test_gpu.py
exec "$PYTHON" kernels/bench/gpu.py --results "$results" --seconds $((520 - (SECONDS - start)))
