#!/usr/bin/env bash
# Fine-tune ViT-L/16 on Kinetics-400.
#
# VideoMAE V2's script for ViT-L was not at hand: the numbers are VideoMAE's (64 GPUs x 2 videos, 2 samples of each).
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vitl_k400
MODEL=vit_l
NUM_CLASSES=400
BATCH_PER_GPU=2
EFFECTIVE_BATCH=128 # videos
EPOCHS=35
WARMUP_EPOCHS=5
LR=2e-3 # for 256 videos
STARTS_FROM="pre-training: recipes/pretrain_vitl.sh"
PUBLISHED="top-1 85.4 (paper)"

finetune "$@"
