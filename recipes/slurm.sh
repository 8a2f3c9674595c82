#!/usr/bin/env bash
# Run a recipe under Slurm, one torchrun on each node:
#
#   DATA=hybrid.yaml OUTPUT=runs/g GPUS=64 recipes/slurm.sh recipes/pretrain_vitg.sh --checkpointing selective
#
# GPUS (8) and NODES (GPUS / 8) as in recipes/common.sh; CPUS_PER_GPU (12); SBATCH_ARGS: more arguments of sbatch, such as
# "--partition=video --time=48:00:00". Five minutes before the end of its time a job gets SIGUSR1, on which the run writes a
# checkpoint and ends; the same line goes on from there. Written from Slurm's documentation, not run on a cluster yet.
set -euo pipefail

if [ $# -eq 0 ] || [ ! -f "$1" ]; then
  echo "error: recipes/slurm.sh RECIPE [ARGUMENTS]; for example recipes/slurm.sh recipes/pretrain_vitg.sh" >&2
  exit 2
fi

if [ -z "${SLURM_JOB_ID:-}" ]; then
  export GPUS=${GPUS:-8}
  export NODES=${NODES:-$(((GPUS + 7) / 8))}
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  # shellcheck disable=SC2086  # SBATCH_ARGS are arguments
  exec sbatch --job-name "$(basename "$1" .sh)" --nodes "$NODES" --ntasks-per-node 1 --gpus-per-node $((GPUS / NODES)) \
    --cpus-per-task $((GPUS / NODES * ${CPUS_PER_GPU:-12})) --signal USR1@300 --requeue --open-mode append --export ALL \
    ${SBATCH_ARGS:-} "$here/slurm.sh" "$@"
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # whole: `| head` may end it by SIGPIPE, and pipefail the job
export MASTER_ADDR=${hosts%%$'\n'*}
# srun does not take --cpus-per-task over from sbatch: without this all decoders of a node would share one core.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-$((GPUS / NODES * ${CPUS_PER_GPU:-12}))}}
# shellcheck disable=SC2016  # SLURM_NODEID is known on each node only
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' recipe "$@"
