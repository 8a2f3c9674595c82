#!/usr/bin/env bash
# Fine-tune ViT-B/16 on Something-Something V2.
#
# Source of all numbers: the released script (16 GPUs x 16 videos, 2 samples of each).
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vitb_ssv2
MODEL=vit_b
NUM_CLASSES=174
SAMPLING=sparse
FLIP=--no-flip
SEGMENTS=2
BATCH_PER_GPU=16
EFFECTIVE_BATCH=256 # videos
EPOCHS=25
WARMUP_EPOCHS=5
LR=2e-3 # for 256 videos
LAYER_DECAY=0.65
STARTS_FROM="pre-training: recipes/pretrain_vitb.sh"
PUBLISHED="top-1 71.2 (paper)"

finetune "$@"
