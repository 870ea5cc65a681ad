#!/usr/bin/env bash
# Trains on several machines that ssh reaches without a password. This folder and the data must have the same path on all.
#     HOSTS="node01 node02" RANKS_PER_HOST=8 dev/launch/ssh.sh --data data/plays --out out/run --attention poly3
# PROGRAM is the trainer (default: ./train_gpt), PORT where rank 0 listens (default: 29500). DRY_RUN=1 prints the command
# instead.
set -euo pipefail
read -ra hosts <<<"${HOSTS:?expected names of machines, such as HOSTS=\"node01 node02\"}"
per_host=${RANKS_PER_HOST:-1} program=${PROGRAM:-./train_gpt}
list=$(printf ",%s:$per_host" "${hosts[@]}")
# mpirun starts the ranks by ssh, in this folder. It sorts them by host, so rank 0 is on the first one.
${DRY_RUN:+echo} exec mpirun --host "${list:1}" -n $((${#hosts[@]} * per_host)) --map-by slot --bind-to none \
    --wdir "$PWD" -x MASTER_ADDR="${hosts[0]}" -x MASTER_PORT="${PORT:-29500}" "$program" train "$@"
