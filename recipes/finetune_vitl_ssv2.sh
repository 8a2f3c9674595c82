#!/usr/bin/env bash
# Fine-tune ViT-L/16 on Something-Something V2.
#
# No script for ViT-L on SSv2 was at hand: the numbers are those of ViT-H's.
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vitl_ssv2
MODEL=vit_l
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
STARTS_FROM="pre-training: recipes/pretrain_vitl.sh"
PUBLISHED="top-1 75.7 (paper)"

finetune "$@"
