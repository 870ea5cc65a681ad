#!/usr/bin/env bash
# Compares the CUDA trainer and, if .venv has torch, the PyTorch twin with the CPU trainer. Each of them runs one forward
# and backward pass in float32 on the same checkpoint and batch (`dump`), and dev/compare.py prints the differences of
# every tensor. `make compare` builds the programs and calls this.
#
#   dev/compare.sh CUDA_PROGRAM
#
# MODEL and DATA are a checkpoint (or a run) and a dataset. Without them, two small models are trained for a few steps on
# random words: one with softmax, and one with polynomial attention and all options. BATCH and SEQ are the sizes of the
# batch, default 2 x 48.
# Exit status: 0 all agree (relative difference of the loss up to 1e-6, of every gradient up to 1e-4), 1 something
# differs, 2 bad usage.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: dev/compare.sh CUDA_PROGRAM (see make compare)" >&2; exit 2; }
[ -n "${MODEL:-}" ] && [ -z "${DATA:-}" ] && { echo "compare: MODEL=$MODEL needs a dataset: add DATA=DIR" >&2; exit 2; }
cuda=$1 out=out/compare batch=${BATCH:-2} seq=${SEQ:-48}
mkdir -p $out

data=${DATA:-$out/data}
if [ -z "${DATA:-}" ] && [ ! -f $data/meta.json ]; then
    mkdir -p $out/words
    .venv/bin/python -c '
import random, sys
random.seed(1)
words = "king queen night sword crown love blood heaven speak away never again".split()
for i in range(20):
    with open(f"{sys.argv[1]}/{i}.txt", "w") as file:
        file.write(" ".join(random.choices(words, k=500)))' $out/words
    .venv/bin/python data/prepare.py text $out/words --tokenizer byte --out $data
fi

status=0
compare() { # name, checkpoint
    local name=$1 model=$2 programs=(./train_gpt "$cuda") files=() program file
    [ -f "$model/config.json" ] || model=$(ls -d "$model"/step_* | tail -n 1) # the newest checkpoint of a run
    for program in "${programs[@]}"; do
        file=$out/$name.$(basename "$program").safetensors
        "$program" dump --model "$model" --data "$data" --batch "$batch" --seq "$seq" --dtype fp32 --file "$file"
        files+=("$file")
    done
    if .venv/bin/python -c 'import torch' 2>/dev/null; then
        file=$out/$name.pytorch.safetensors
        .venv/bin/python dev/reference/gpt.py dump --model "$model" --data "$data" --batch "$batch" --seq "$seq" \
            --file "$file"
        files+=("$file")
    else
        echo "skipped: the PyTorch twin, because .venv has no torch (dev/setup.sh torch)"
    fi
    for file in "${files[@]:1}"; do
        echo "== $name: $file compared with ${files[0]}"
        .venv/bin/python dev/compare.py "$file" "${files[0]}" --loss-rtol 1e-6 --rtol 1e-4 || status=1
    done
}

if [ -n "${MODEL:-}" ]; then
    compare model "$MODEL"
else
    train() { # name, flags
        rm -rf "$out/$1"
        ./train_gpt train --data "$data" --out "$out/$1" --layers 2 --heads 2 --channels 64 --context 64 --batch 4 --steps 20 \
            --lr 3e-3 --sample-every 0 --val-every 0 "${@:2}" >"$out/$1.log" || { cat "$out/$1.log"; exit 1; }
        compare "$1" "$out/$1"
    }
    train softmax
    train poly3 --attention poly3 --decay learned --short-conv 3 --output-gate true
fi
exit $status
