#!/usr/bin/env bash
# Fine-tune ViT-H/16 on Kinetics-400.
#
# VideoMAE V2's script for ViT-H was not at hand: the numbers are VideoMAE's (64 GPUs x 8 videos, 2 samples of each).
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vith_k400
MODEL=vit_h
NUM_CLASSES=400
BATCH_PER_GPU=8
EFFECTIVE_BATCH=512 # videos
EPOCHS=50
WARMUP_EPOCHS=5
LR=1e-3 # for 256 videos
MIN_LR=1e-5
DROP_PATH=0.2
HEAD_DROP=0.5
STARTS_FROM="pre-training: recipes/pretrain_vith.sh"
PUBLISHED="top-1 86.9 (paper)"

finetune "$@"
