# Shared by the recipes of supervised training, which set their numbers, source this file and call `finetune` or `distil`.
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

# What the released scripts for fine-tuning share (run_class_finetuning.py's defaults); a recipe sets what differs.
NUM_SAMPLE=2
BETAS="0.9 0.999"
MIN_LR=1e-6
DROP_PATH=0.1
HEAD_DROP=0
LAYER_DECAY=0.75
SAMPLING=dense
SEGMENTS=5
CROPS=3
FLIP=--flip

set_supervised_flags() {
  # shellcheck disable=SC2086  # BETAS are two words
  FLAGS=(--model "$MODEL" --num-classes "$NUM_CLASSES" --batch-size "$BATCH" --accumulate "$ACCUMULATE"
    --num-sample "$NUM_SAMPLE" --num-frames "$NUM_FRAMES" --image-size 224 --sampling "$SAMPLING" --stride "$STRIDE" "$FLIP"
    --epochs "$EPOCHS" --warmup-epochs "$WARMUP_EPOCHS" --lr "$LR" --min-lr "$MIN_LR" --layer-decay "$LAYER_DECAY"
    --betas $BETAS --weight-decay "$WEIGHT_DECAY" --drop-path "$DROP_PATH" --head-drop "$HEAD_DROP" --dtype "$DTYPE"
    "${MORE_FLAGS[@]}")
  if [ -n "${CLIP_GRAD:-}" ]; then FLAGS+=(--clip-grad "$CLIP_GRAD"); fi
  if [ -n "${CLASSES:-}" ]; then FLAGS+=(--classes "$CLASSES"); fi
  if [ -n "${LABEL_MAP:-}" ]; then
    FLAGS+=(--label-map "$LABEL_MAP")
  elif [ "$NEW_HEAD" = yes ]; then
    FLAGS+=(--new-head)
  fi
}

NEW_HEAD=no # yes: INIT has a head of other classes, and is not to be converted

# supervise COMMAND [ARGUMENTS]
supervise() {
  local command=$1 dry= argument arguments=()
  shift
  for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry=1; else arguments+=("$argument"); fi
  done
  find_python
  divide_batch
  set_supervised_flags
  set_launcher
  announce
  echo "published: $PUBLISHED, tested on $SEGMENTS x $CROPS views; not verified here"
  export PYTHONPATH="$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
  OUTPUT=${OUTPUT:-runs/$NAME}
  if [ -z "$dry" ]; then
    [ -n "${DATA:-}" ] || fail "DATA is not set: set it to the labelled list (\`path label\` a line)"
    [ -n "${INIT:-}" ] || fail "INIT is not set: set it to the checkpoint to start from ($STARTS_FROM)"
  fi
  local where=(--data "${DATA:-DATA}" ${DATA_ROOT:+--data-root "$DATA_ROOT"} --init "${INIT:-INIT}" --output "$OUTPUT")
  COMMAND=("${LAUNCH[@]}" -m vmae "$command" "${where[@]}" "${FLAGS[@]}" "${arguments[@]}")
  local test=("${LAUNCH[@]}" -m vmae evaluate "${TEST_DATA:-TEST_DATA}" ${DATA_ROOT:+--data-root "$DATA_ROOT"}
    --checkpoint "$OUTPUT" --output "$OUTPUT/test" --segments "$SEGMENTS" --crops "$CROPS" --dtype "$DTYPE")
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
  MORE_FLAGS+=(--teacher "${TEACHER:-TEACHER}" ${TEACHER_MODEL:+--teacher-model "$TEACHER_MODEL"})
  supervise distil "$@"
}
