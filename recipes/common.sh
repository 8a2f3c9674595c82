# Shared by the recipes, which source this file and call `pretrain NAME "$@"`. The numbers are in recipes/NAME.yaml, a
# `key: value` a line; the launcher divides its effective batch by the GPUs.
#
# What a person sets, in the environment:
#   DATA          list file (one video or frame folder a line), or a YAML file that mixes several lists
#   DATA_ROOT     folder that the list's relative paths start from
#   OUTPUT        folder of the run (runs/NAME_OF_THE_RECIPE)
#   GPUS          all GPUs of the run (those of this machine; 1 where there is none); processes, on a CPU
#   NODES         machines that they are in (GPUS / 8, at least 1); on each of them start the recipe with NODE_RANK=0, 1, ...
#                 and MASTER_ADDR (and MASTER_PORT) of the first one, or let recipes/slurm.sh do so
#   BATCH         videos on a GPU at once (as published, or less where the GPUs are many); smaller needs less memory, and the
#                 effective batch stays, by accumulation
#   EFFECTIVE_BATCH  videos of a step (as published); the learning rate follows, as it is for 256 videos
#   WORKERS       processes a GPU that decode video (10, as published)
#   PYTHON        interpreter (.venv/bin/python where it is there, else python)
#   RESTARTS      times that torchrun starts all processes again after one died; each time they resume (3 with several)
#   GPU_MEMORY, DEVICE  of one GPU (80GiB, h100), for the plan of --dry-run
# Arguments go on to `python -m vmae pretrain`; --dry-run prints the plan, the command and the first videos, and starts nothing.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

# value KEY: what the recipe's file says.
value() {
  sed -n "s/^$1: *\([^ #]*\).*/\1/p" "$CONFIG"
}

is_count() {
  [[ $1 =~ ^[1-9][0-9]*$ ]]
}

# use NAME: the recipe's file, and what the launcher needs of it.
use() {
  NAME=$1
  CONFIG=$ROOT/recipes/$NAME.yaml
  EFFECTIVE_BATCH=${EFFECTIVE_BATCH:-$(value effective_batch)}
  is_count "$EFFECTIVE_BATCH" || fail "EFFECTIVE_BATCH=$EFFECTIVE_BATCH is not a number of videos"
  BATCH_PER_GPU=$(value batch_size)
  LR=$(value lr)
  NUM_SAMPLE=$(value num_sample)
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then return; fi
  PYTHON=python
  if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; fi
}

count_gpus() {
  local found
  found=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  echo $((found > 0 ? found : 1))
}

# GPUS, NODES and BATCH, checked; ACCUMULATE such that GPUS x BATCH x ACCUMULATE is the published EFFECTIVE_BATCH.
divide_batch() {
  GPUS=${GPUS:-$(count_gpus)}
  is_count "$GPUS" || fail "GPUS=$GPUS is not a number of GPUs"
  NODES=${NODES:-$((GPUS > 8 ? (GPUS + 7) / 8 : 1))}
  is_count "$NODES" || fail "NODES=$NODES is not a number of machines"
  ((GPUS % NODES == 0)) || fail "GPUS=$GPUS do not fill NODES=$NODES machines; set both"
  ((EFFECTIVE_BATCH % GPUS == 0)) || fail "GPUS=$GPUS do not divide the effective batch of $EFFECTIVE_BATCH videos; use a number that does"
  local share=$((EFFECTIVE_BATCH / GPUS))
  BATCH=${BATCH:-$((share < BATCH_PER_GPU ? share : BATCH_PER_GPU))}
  is_count "$BATCH" || fail "BATCH=$BATCH is not a number of videos"
  ((share % BATCH == 0)) || fail "BATCH=$BATCH does not divide the $share videos of a GPU in a step ($EFFECTIVE_BATCH / $GPUS GPUs)"
  ACCUMULATE=$((share / BATCH))
}

# The file, and what is said on top of it.
set_flags() {
  FLAGS=(--config "$CONFIG" --batch-size "$BATCH" --accumulate "$ACCUMULATE" ${WORKERS:+--workers "$WORKERS"})
}

announce() {
  awk -v lr="$LR" -v batch="$EFFECTIVE_BATCH" -v clips="$((EFFECTIVE_BATCH * NUM_SAMPLE))" -v gpus="$GPUS" -v each="$BATCH" \
    -v times="$ACCUMULATE" -v name="$NAME" 'BEGIN {
      printf "%s: effective batch %d videos = %d (GPUs) x %d (videos) x %d (accumulated), %d clips a step; ", name, batch, gpus, each, times, clips
      printf "effective learning rate %g x %d / 256 = %g\n", lr, batch, lr * batch / 256 }'
}

set_launcher() {
  LAUNCH=("$PYTHON" -m torch.distributed.run --nproc-per-node $((GPUS / NODES))
    --max-restarts "${RESTARTS:-$((GPUS > 1 ? 3 : 0))}")
  if ((NODES == 1)); then
    LAUNCH+=(--standalone)
  else
    LAUNCH+=(--nnodes "$NODES" --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}"
      --master-port "${MASTER_PORT:-29500}")
  fi
}

dry_run() {
  local list=()
  if [ -n "${DATA:-}" ]; then list=(--data "$DATA" ${DATA_ROOT:+--data-root "$DATA_ROOT"}); fi
  "$PYTHON" -m vmae plan --gpus "$GPUS" --gpus-per-node $((GPUS / NODES)) --memory "${GPU_MEMORY:-80GiB}" \
    "${FLAGS[@]}" "${list[@]}" "$@" --device "${DEVICE:-h100}"
  if [ -z "${DATA:-}" ]; then echo "$NO_DATA"; fi
  printf 'command:'
  printf ' %q' "${COMMAND[@]}"
  printf '\n'
}

# Run COMMAND. SIGTERM and SIGUSR1 go to the training processes, which write a checkpoint and end with 0, and torchrun with them;
# if torchrun itself is signalled, it has to wait for that checkpoint, and says that it was stopped.
launch() {
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
  (trap '' USR1 && exec "${COMMAND[@]}") &
  local torchrun=$! status
  trap 'pkill -TERM -P $torchrun' TERM
  trap 'pkill -USR1 -P $torchrun' USR1
  trap : INT
  while true; do # a signal ends `wait`, not the run
    wait "$torchrun" && status=0 || status=$?
    kill -0 "$torchrun" 2>/dev/null || return "$status"
  done
}

NO_DATA="DATA is not set: set it to the list file (one video or frame folder a line), or to a YAML file that mixes several lists"

# Called where a run is started without DATA; a recipe that has videos of its own defines it anew and sets DATA.
default_data() {
  fail "$NO_DATA"
}

# pretrain NAME [ARGUMENTS]
pretrain() {
  local dry= argument arguments=()
  use "$1"
  shift
  for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry=1; else arguments+=("$argument"); fi
  done
  find_python
  divide_batch
  set_flags
  set_launcher
  announce
  export PYTHONPATH="$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
  OUTPUT=${OUTPUT:-runs/$NAME}
  if [ -z "${DATA:-}$dry" ]; then default_data; fi
  COMMAND=("${LAUNCH[@]}" -m vmae pretrain --data "${DATA:-DATA}" ${DATA_ROOT:+--data-root "$DATA_ROOT"}
    --output "$OUTPUT" "${FLAGS[@]}" "${arguments[@]}")
  if [ -n "$dry" ]; then
    dry_run "${arguments[@]}"
    return
  fi
  launch
}
