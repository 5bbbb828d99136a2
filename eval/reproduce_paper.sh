#!/usr/bin/env bash
# The paper's four models in its protocol, and its ablations: quantize, evaluate, collect. Needs a GPU and a network, or
# caches (HF_HOME) filled where there is one.
#
#   eval/reproduce_paper.sh WORK                     # everything; what is finished in WORK is not done again
#   eval/reproduce_paper.sh WORK --dry-run           # what would run, with sizes and times, and nothing else
#   MODELS="Qwen/Qwen1.5-MoE-A2.7B" eval/reproduce_paper.sh WORK
#
# Calibration: 256 windows of 4096 tokens of RedPajama, seed 42; perplexity on WikiText2 in windows of 4096, seven zero-shot
# tasks. Variables for a trial on a small model: MODELS, CALIBRATION, SAMPLES, LENGTH, EVALUATE (arguments of kbvq eval).
#
# Expected on one 80 GB GPU, estimated and not yet measured: 16-bit sizes 29 GB (Qwen1.5-MoE), 31 GB (DeepSeek-V2-Lite),
# 61 GB (Qwen3-30B-A3B), 93 GB (Mixtral-8x7B); about a quarter of that written for each rate; one to six hours a model
# and rate, and as long again for the tasks.
set -euo pipefail
work=${1:?usage: eval/reproduce_paper.sh WORK [--dry-run]}
dry=${2:-}
[ -z "$dry" ] || [ "$dry" = --dry-run ] || { echo "unknown option $dry" >&2; exit 2; }
models=${MODELS:-Qwen/Qwen1.5-MoE-A2.7B Qwen/Qwen3-30B-A3B mistralai/Mixtral-8x7B-v0.1 deepseek-ai/DeepSeek-V2-Lite}
calibration=${CALIBRATION:-togethercomputer/RedPajama-Data-1T-Sample}
samples=${SAMPLES:-256}
length=${LENGTH:-4096}
evaluate=${EVALUATE:---suite paper --window 4096}
kbvq=${KBVQ:-kbvq}
mkdir -p "$work"

run() {
    echo "+ $*"
    [ -n "$dry" ] || "$@"
}

# NAME BITS MODEL [options of kbvq quantize]
row() {
    local name=$1 bits=$2 model=$3
    shift 3
    local folder
    folder=$work/$(basename "$model")-$name-$bits
    if [ ! -e "$folder/kbvq_manifest.json" ]; then
        run $kbvq quantize --model "$model" --output "$folder" --recipe paper --bits "$bits" --calibration "$calibration" \
            --samples "$samples" --sequence-length "$length" --seed 42 "$@"
    fi
    if [ ! -e "$folder.json" ]; then
        # shellcheck disable=SC2086
        run $kbvq eval "$folder" --baseline "$model" $evaluate --json "$folder.json"
    fi
}

for model in $models; do
    for bits in 2 3; do
        row kbvq "$bits" "$model"
        row vq "$bits" "$model" --no-idre --no-bcos
        row idre "$bits" "$model" --no-bcos
        row bcos "$bits" "$model" --no-idre
    done
    row svd 2 "$model" --no-klt
done
