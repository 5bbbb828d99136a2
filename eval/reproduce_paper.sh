#!/usr/bin/env bash
# The paper's four models in its protocol, and its ablations: quantize, evaluate, collect. Needs a GPU and a network, or
# caches (HF_HOME) filled where there is one.
#
#   eval/reproduce_paper.sh WORK                     # everything; what is finished in WORK is not done again
#   eval/reproduce_paper.sh WORK --dry-run           # the commands, and nothing else
#   eval/reproduce_paper.sh WORK --plan              # and what each model and rate needs: size, memory, disk, time
#   MODELS="Qwen/Qwen1.5-MoE-A2.7B" eval/reproduce_paper.sh WORK
#
# Calibration: 256 windows of 4096 tokens of RedPajama, seed 42; perplexity on WikiText2 in windows of 4096, seven zero-shot
# tasks. The ablations (rank, codebook size, windows of calibration, either half of BCOS, and both parts over second-order
# error feedback as in GPTVQ) are run on ABLATE. At the end eval/paper_table.py writes published and own numbers side by
# side to RESULTS (docs/results/paper.json and .md).
#
# Variables for a trial on a small model, or for a part: MODELS, BITS, ROWS, ABLATE, CALIBRATION, SAMPLES, LENGTH, QUANTIZE and
# EVALUATE (arguments of kbvq quantize and kbvq eval), RESULTS, KBVQ and PYTHON.
#
# Expected on one 80 GB GPU. By the plan, GB: Qwen1.5-MoE 28.6 before, 5.6 at 2 bits and 7.4 at 3; DeepSeek-V2-Lite 31.4, 5.7,
# 7.7; Qwen3-30B-A3B 61.1, 10.9, 14.9; Mixtral-8x7B 93.4, 15.3, 21.0; 15, 16, 19 and 40 GB of memory; for one row 23, 23, 28
# and 50 GB of disk, for all of them with the ablations some 450. Estimated and not yet measured: one to six hours a model
# and rate, and as long again for the tasks.
set -euo pipefail
work=${1:?usage: eval/reproduce_paper.sh WORK [--dry-run | --plan]}
dry=${2:-}
case $dry in "" | --dry-run | --plan) ;; *) echo "unknown option $dry" >&2 && exit 2 ;; esac
models=${MODELS:-Qwen/Qwen1.5-MoE-A2.7B Qwen/Qwen3-30B-A3B mistralai/Mixtral-8x7B-v0.1 deepseek-ai/DeepSeek-V2-Lite}
calibration=${CALIBRATION:-togethercomputer/RedPajama-Data-1T-Sample}
samples=${SAMPLES:-256}
length=${LENGTH:-4096}
evaluate=${EVALUATE:---suite paper --window 4096}
ablate=${ABLATE-Qwen/Qwen1.5-MoE-A2.7B}
rows=${ROWS:-} # all of them
quantize=${QUANTIZE:-}
results=${RESULTS:-docs/results/paper.json}
kbvq=${KBVQ:-kbvq}
here=$(dirname "$0")
mkdir -p "$work"

run() {
    echo "+ $*"
    [ -n "$dry" ] || "$@"
}

# NAME BITS MODEL [options of kbvq quantize]
# shellcheck disable=SC2086  # lists are meant to be split
row() {
    local name=$1 bits=$2 model=$3
    shift 3
    [ -z "$rows" ] || [[ " $rows " == *" $name "* ]] || return 0
    local folder
    folder=$work/$(basename "$model")-$name-$bits
    if [ ! -e "$folder/kbvq_manifest.json" ]; then
        set -- quantize --model "$model" --output "$folder" --recipe paper --bits "$bits" --calibration "$calibration" \
            --samples "$samples" --sequence-length "$length" --seed 42 $quantize "$@"
        run $kbvq "$@"
        # The other rows of a model differ little from this one. Reads its config and headers alone.
        [ "$dry" != --plan ] || [ "$name" != kbvq ] || $kbvq "$@" --dry-run
    fi
    if [ ! -e "$folder.json" ]; then
        run $kbvq eval "$folder" --baseline "$model" $evaluate --json "$folder.json"
    fi
}

for model in $models; do
    for bits in ${BITS:-2 3}; do
        row kbvq "$bits" "$model"
        row vq "$bits" "$model" --no-idre --no-bcos
        row idre "$bits" "$model" --no-bcos
        row bcos "$bits" "$model" --no-idre
    done
    row svd 2 "$model" --no-klt
done

for model in $ablate; do
    for divisor in 32 64 256; do # the paper's is 128: ranks of 4, 2 and half of its width over it
        row "rank$divisor" 2 "$model" --set rank_divisor=$divisor
    done
    row kbvq 1 "$model" # 16 codewords; 2 bits have 256 and 3 bits 4096
    for windows in 16 64 128; do
        row "samples$windows" 2 "$model" --samples $windows
    done
    for part in mean variance; do
        row "bcos-$part" 2 "$model" --no-idre --set bcos_part=$part
    done
    row feedback 2 "$model" --no-idre --no-bcos --set error_feedback=true
    row feedback-kbvq 2 "$model" --set error_feedback=true
done

run "${PYTHON:-python}" "$here/paper_table.py" "$work" --results "$results"
