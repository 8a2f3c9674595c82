#!/usr/bin/env bash
# Fine-tune ViT-H/16 on Something-Something V2.
#
# The numbers are those of a user's copy of the released script (32 GPUs x 4 videos, 2 samples of each).
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vith_ssv2
MODEL=vit_h
NUM_CLASSES=174
SAMPLING=sparse
FLIP=--no-flip
SEGMENTS=2
BATCH_PER_GPU=4
EFFECTIVE_BATCH=128 # videos
EPOCHS=20
WARMUP_EPOCHS=5
LR=5e-4 # for 256 videos
LAYER_DECAY=0.8
DROP_PATH=0.2
STARTS_FROM="pre-training: recipes/pretrain_vith.sh"
PUBLISHED="top-1 76.8 (paper)"

finetune "$@"
