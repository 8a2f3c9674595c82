#!/usr/bin/env bash
# Fine-tune ViT-B/16 on Kinetics-400.
#
# Source of all numbers: the released script (32 GPUs x 16 videos, 2 samples of each).
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vitb_k400
MODEL=vit_b
NUM_CLASSES=400
BATCH_PER_GPU=16
EFFECTIVE_BATCH=512 # videos
EPOCHS=90
WARMUP_EPOCHS=5
LR=7e-4 # for 256 videos
STARTS_FROM="pre-training: recipes/pretrain_vitb.sh"
PUBLISHED="top-1 81.5 (paper)"

finetune "$@"
