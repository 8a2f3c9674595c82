#!/usr/bin/env bash
# Fine-tune ViT-g/14 on UCF101 after post-pre-training on Kinetics-710.
#
# The released script for UCF101 was not at hand. Drop path, layer decay and weight decay are those of K710's; learning rate
# and epochs are our choice, for a new head on a small set.
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vitg_ucf101
MODEL=vit_g
BATCH_PER_GPU=3
LAYER_DECAY=0.9
WEIGHT_DECAY=0.1
NUM_CLASSES=101
NEW_HEAD=yes
EFFECTIVE_BATCH=96 # videos
EPOCHS=50
WARMUP_EPOCHS=5
LR=5e-4 # for 256 videos
DROP_PATH=0.3
CLIP_GRAD=5.0
STARTS_FROM="post-pre-training: recipes/postpretrain_vitg_k710.sh"
PUBLISHED="top-1 99.6, top-5 100.0"

finetune "$@"
