#!/usr/bin/env bash
# Trains on one machine, with RANKS processes (default: 2). The arguments are those of `train`.
#     RANKS=4 dev/launch/one_node.sh --data data/plays --out out/run --attention poly3
# PROGRAM is the trainer (default: ./train_gpt). DRY_RUN=1 prints the command instead.
set -euo pipefail
ranks=${RANKS:-2} program=${PROGRAM:-./train_gpt}
threads=()
# Otherwise every rank would take a thread for each core. --bind-to none, because mpirun would bind a rank to one core.
[[ " $* " == *" --threads"* ]] || threads=(--threads $((($(nproc) + ranks - 1) / ranks)))
${DRY_RUN:+echo} exec mpirun -n "$ranks" --bind-to none "$program" train "${threads[@]}" "$@"
