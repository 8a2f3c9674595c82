# Shared by the recipes of supervised training, which source this file and call `finetune NAME "$@"` or `distil NAME "$@"`.
#
# What a person sets, in the environment, beside what recipes/common.sh says (DATA, DATA_ROOT, OUTPUT, GPUS, NODES, BATCH, ...):
#   DATA          labelled list (`path label` or `folder frames label` a line)
#   CLASSES       class names, one a line (optional)
#   INIT          checkpoint to start from: a run's folder, or a file (official ones too)
#   LABEL_MAP     where INIT has a head of more classes: which of them these are (label_710to400.json); else the head is new
#   TEST_DATA     labelled list to test on when the training is over (optional)
#   TEACHER       distil: the teacher's checkpoint
# Arguments go on to `python -m vmae finetune` or `distil`; --dry-run prints the command and starts nothing.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TEACHER_FLAGS=()

set_supervised_flags() {
  set_flags
  FLAGS+=(${CLASSES:+--classes "$CLASSES"} ${LABEL_MAP:+--label-map "$LABEL_MAP"})
}

# supervise COMMAND NAME [ARGUMENTS]
supervise() {
  local command=$1 dry= argument arguments=() segments=5
  use "$2"
  shift 2
  if [ "$(value sampling)" = sparse ]; then segments=2; fi
  for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry=1; else arguments+=("$argument"); fi
  done
  find_python
  divide_batch
  set_supervised_flags
  set_launcher
  announce
  echo "published: $PUBLISHED, tested on $segments x 3 views; not verified here"
  export PYTHONPATH="$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
  OUTPUT=${OUTPUT:-runs/$NAME}
  if [ -z "$dry" ]; then
    [ -n "${DATA:-}" ] || fail "DATA is not set: set it to the labelled list (\`path label\` a line)"
    [ -n "${INIT:-}" ] || fail "INIT is not set: set it to the checkpoint to start from ($STARTS_FROM)"
  fi
  local where=(--data "${DATA:-DATA}" ${DATA_ROOT:+--data-root "$DATA_ROOT"} --init "${INIT:-INIT}" --output "$OUTPUT")
  COMMAND=("${LAUNCH[@]}" -m vmae "$command" "${where[@]}" "${FLAGS[@]}" "${TEACHER_FLAGS[@]}" "${arguments[@]}")
  local test=("${LAUNCH[@]}" -m vmae evaluate "${TEST_DATA:-TEST_DATA}" ${DATA_ROOT:+--data-root "$DATA_ROOT"}
    --checkpoint "$OUTPUT" --output "$OUTPUT/test" --segments "$segments" --crops 3 --dtype "$(value dtype)")
  if [ -n "$dry" ]; then
    printf 'command:' && printf ' %q' "${COMMAND[@]}" && printf '\n'
    printf 'test:' && printf ' %q' "${test[@]}" && printf '\n'
    return
  fi
  "${COMMAND[@]}"
  if [ -n "${TEST_DATA:-}" ]; then "${test[@]}"; fi
}

finetune() {
  supervise finetune "$@"
}

distil() {
  if [ -z "${TEACHER:-}" ] && [[ " $* " != *" --dry-run "* ]]; then
    fail "TEACHER is not set: set it to the fine-tuned teacher's checkpoint"
  fi
  TEACHER_FLAGS=(--teacher "${TEACHER:-TEACHER}" ${TEACHER_MODEL:+--teacher-model "$TEACHER_MODEL"})
  supervise distil "$@"
}
