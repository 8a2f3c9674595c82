#!/usr/bin/env bash
# Fine-tune ViT-g/14 on Something-Something V2, straight from pre-training (post-pre-training hurts there).
#
# The numbers are those of a user's copy of the released script, whose own total batch is not known: that is K710's (32 GPUs x
# 3 videos).
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vitg_ssv2
MODEL=vit_g
BATCH_PER_GPU=3
LAYER_DECAY=0.9
WEIGHT_DECAY=0.05
NUM_CLASSES=174
SAMPLING=sparse
FLIP=--no-flip
SEGMENTS=2
EFFECTIVE_BATCH=96 # videos
EPOCHS=20
WARMUP_EPOCHS=5
LR=3e-4 # for 256 videos
DROP_PATH=0.25
STARTS_FROM="pre-training: recipes/pretrain_vitg.sh"
PUBLISHED="top-1 77.0, top-5 95.9"

finetune "$@"
