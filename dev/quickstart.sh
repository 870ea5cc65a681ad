#!/usr/bin/env bash
# Sets everything up and trains a GPT with polynomial attention. This takes a few minutes on two cores. Run it again to
# continue a run that was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
dev/setup.sh
make --no-print-directory train_gpt
[ -f data/shakespeare/meta.json ] ||
    .venv/bin/python data/prepare.py shakespeare --tokenizer bpe:1024 --out data/shakespeare
run=out/quickstart
./train_gpt train --data data/shakespeare --out $run --resume --preset nano-poly3 \
    --batch 8 --context 128 --steps 2000 --lr 6e-3 --val-every 250 --sample-every 1000 --checkpoint-every 500
.venv/bin/python dev/plot_loss.py $run --out $run/loss.png
echo
echo "A sample of what it has learned:"
./train_gpt generate --model $run --prompt "ROMEO" --tokens 200 --temperature 0.8 --seed 1
cat <<TEXT

The dataset is in data/shakespeare. The run is in $run: checkpoints step_*, metrics.jsonl, and its loss curve, loss.png.
Try next:
  ./train_gpt generate --model $run --prompt "To be, or" --tokens 300
  ./train_gpt eval --model $run --data data/shakespeare
  ./train_gpt train --data data/shakespeare --out out/softmax --preset nano --batch 8 --context 128 --steps 2000 --lr 2e-3
  .venv/bin/python dev/plot_loss.py $run out/softmax --out out/loss.png
TEXT
