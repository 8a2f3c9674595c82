#!/usr/bin/env bash
# Fine-tune ViT-g/14 on Kinetics-400 after post-pre-training on Kinetics-710.
#
# Source of all numbers: the released script for K400 after K710 (32 GPUs x 3 videos, 2 samples of each).
# LABEL_MAP=label_710to400.json (official, or of merge-labels) turns the head of 710 classes into one of 400; 3 epochs are too
# few for a new one.
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vitg_k400
MODEL=vit_g
BATCH_PER_GPU=3
LAYER_DECAY=0.9
WEIGHT_DECAY=0.1
NUM_CLASSES=400
EFFECTIVE_BATCH=96 # videos
EPOCHS=3
WARMUP_EPOCHS=1
LR=1e-5 # for 256 videos
DROP_PATH=0.25
STARTS_FROM="post-pre-training: recipes/postpretrain_vitg_k710.sh"
PUBLISHED="top-1 88.4, top-5 98.0"

finetune "$@"
