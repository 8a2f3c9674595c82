#!/usr/bin/env bash
# The path of the big recipes in two minutes on a CPU: a model of 1.2 million parameters on the four real clips that come with
# a test dependency. Its loss ends below that of the trivial predictors; vmae/reference_curves/tiny.jsonl is its reference curve.
#
# Variables and arguments: recipes/common.sh. Without DATA the clips are written as small images to $OUTPUT-data.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NAME=pretrain_tiny
MODEL=vit_tiny
GPUS=${GPUS:-1} # processes
DEVICE=${DEVICE:-cpu}
EFFECTIVE_BATCH=4
BATCH_PER_GPU=4
NUM_SAMPLE=2
ENCODER_RATIO=0.75
DECODER_DEPTH=2
NUM_FRAMES=8
STRIDE=2
STEPS=2000
LR=0.064 # for 256 videos
DTYPE=float32
MORE_FLAGS=(--image-size 64 --repeat 100 --device cpu --workers "${WORKERS:-1}" --log-every 50 --save-every 500)

default_data() {
  DATA=$OUTPUT-data/clips.txt
  "$PYTHON" -m vmae samples "$DATA" --frames "$OUTPUT-data/frames"
}

pretrain "$@"
