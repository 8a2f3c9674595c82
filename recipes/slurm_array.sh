#!/usr/bin/env bash
# Run a command on many machines as a Slurm array, and join its parts when all have ended:
#
#   PARTS=64 recipes/slurm_array.sh check-data k710.csv --output checked
#   PARTS=16 GPUS=1 recipes/slurm_array.sh features k710.csv --checkpoint runs/g --output features
#
# The command is check-data, pack, features, evaluate or detect. Each task of the array does `--part i/PARTS`; a job that waits
# for them does `--merge`, which says which parts are missing where some did not come to their end. The same line goes on from
# there: each part does what it has left.
#
# What a person sets, in the environment:
#   PARTS         tasks of the array
#   AT_ONCE       tasks that run at the same time (all)
#   GPUS          of each task (1; check-data and pack: none); with several, a torchrun in each task shares its part among them
#   CPUS          cores of each task (12 a GPU; 16 without)
#   SBATCH_ARGS   more arguments of sbatch, such as "--partition=video --time=12:00:00"; --array=3,7 submits these tasks alone
#   MERGE_ARGS    those of the job that joins (SBATCH_ARGS without --array)
#   PYTHON        interpreter (.venv/bin/python where it is there, else python)
# Slurm ends a task with SIGTERM, at which it gives its part free; a task whose node failed is put back into the queue.
# Written from Slurm's documentation, not run on a cluster yet.
set -euo pipefail

COMMANDS="check-data pack features evaluate detect"

# Slurm runs a copy of this file, away from the others.
export VMAE_ROOT=${VMAE_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
source "$VMAE_ROOT/recipes/common.sh"

# check_words COMMAND [ARGUMENTS]
check_words() {
  local word
  [[ " $COMMANDS " == *" ${1:-} "* && -n "${1:-}" ]] ||
    fail "PARTS=64 recipes/slurm_array.sh COMMAND [ARGUMENTS], with a COMMAND of ${COMMANDS// /, }"
  for word in "$@"; do
    case $word in
      --part | --part=* | --merge) fail "leave out ${word%%=*}: each task of the array has a part, and a job after them joins" ;;
    esac
  done
  is_count "${PARTS:-}" || fail "PARTS=${PARTS:-} is not a number of parts; set it to the tasks of the array"
  [[ -z "${AT_ONCE:-}" ]] || is_count "$AT_ONCE" || fail "AT_ONCE=$AT_ONCE is not a number of tasks"
}

# set_resources COMMAND: GPUS and CPUS of a task.
set_resources() {
  case $1 in
    check-data | pack) GPUS=${GPUS:-0} ;;
    *) GPUS=${GPUS:-1} ;;
  esac
  [[ $GPUS == 0 ]] || is_count "$GPUS" || fail "GPUS=$GPUS is not a number of GPUs"
  [[ $GPUS -lt 2 || $1 != pack ]] || fail "GPUS=$GPUS: pack shares nothing among ranks; set more PARTS"
  CPUS=${CPUS:-$((GPUS > 0 ? 12 * GPUS : 16))}
  is_count "$CPUS" || fail "CPUS=$CPUS is not a number of cores"
  export GPUS CPUS PARTS
}

submit() {
  local array=1-$PARTS${AT_ONCE:+%$AT_ONCE} common job script=$VMAE_ROOT/recipes/slurm_array.sh gpus=() word
  common=(--parsable --nodes 1 --ntasks 1 --export ALL --open-mode append)
  if ((GPUS > 0)); then gpus=(--gpus-per-node "$GPUS"); fi
  # shellcheck disable=SC2206  # SBATCH_ARGS are arguments
  local more=(${SBATCH_ARGS:-}) rest=()
  for word in "${more[@]}"; do
    if [[ $word != --array=* ]]; then rest+=("$word"); fi
  done
  # shellcheck disable=SC2206
  if [ -n "${MERGE_ARGS+set}" ]; then rest=($MERGE_ARGS); fi
  job=$(VMAE_TASK=part sbatch "${common[@]}" --job-name "$1" --array "$array" "${gpus[@]}" --cpus-per-task "$CPUS" --requeue "${more[@]}" \
    "$script" "$@")
  job=${job%%;*} # ID;CLUSTER
  # Not afterok: a part with a bad video ends with 1, as one job does; the merge itself sees what is missing.
  VMAE_TASK=merge sbatch "${common[@]}" --job-name "$1-merge" --dependency "afterany:$job" --cpus-per-task 4 "${rest[@]}" \
    "$script" "$@" >/dev/null
  echo "submitted: array $job of $PARTS parts, and a job that joins them"
}

run_task() {
  local command=$1 launch workers=()
  shift
  find_python
  launch=("$PYTHON")
  export PYTHONPATH="$VMAE_ROOT:$VMAE_ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
  # srun does not take --cpus-per-task over from sbatch: without this all processes of a task would share one core.
  export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-$CPUS}}
  if [ "$VMAE_TASK" = merge ]; then
    exec srun "$PYTHON" -m vmae "$command" "$@" --merge
  fi
  case $command in # else they take one for each core of the machine, not of the task
    check-data | pack) workers=(--workers "$SRUN_CPUS_PER_TASK") ;;
  esac
  if ((GPUS > 1)); then launch+=(-m torch.distributed.run --standalone --nproc-per-node "$GPUS"); fi
  exec srun --kill-on-bad-exit=1 "${launch[@]}" -m vmae "$command" "${workers[@]}" "$@" --part "$SLURM_ARRAY_TASK_ID/$PARTS"
}

check_words "$@"
set_resources "$1"
if [ -n "${VMAE_TASK:-}" ]; then run_task "$@"; else submit "$@"; fi
