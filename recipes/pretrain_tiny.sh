#!/usr/bin/env bash
# The path of the big recipes in two minutes on a CPU: a model of 0.7 million parameters on the middle squares
# of the four real clips that come with a test dependency. It learns their pixels by heart (targets are not
# normalised). Its loss ends below that of the trivial predictors. Reference curve: docs/curves/tiny.jsonl.
#
# Variables and arguments: recipes/common.sh. Without DATA, small images of the clips go to $OUTPUT-data.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NAME=pretrain_tiny
MODEL=vit_demo
GPUS=${GPUS:-1} # processes
DEVICE=${DEVICE:-cpu}
EFFECTIVE_BATCH=4
BATCH_PER_GPU=4
NUM_SAMPLE=1
ENCODER_RATIO=0.75
DECODER_DEPTH=1
NUM_FRAMES=4
STRIDE=4
STEPS=5000
LR=0.128 # for 256 videos
DTYPE=float32
MORE_FLAGS=(--image-size 64 --patch-size 8 --no-normalize-target --repeat 100 --device cpu
  --workers "${WORKERS:-1}" --log-every 100 --save-every 1000)

default_data() {
  DATA=$OUTPUT-data/clips.txt
  "$PYTHON" -m vmae samples "$DATA" --frames "$OUTPUT-data/frames" --square
}

pretrain "$@"
