#!/usr/bin/env bash
# Post-pre-train ViT-g/14 on Kinetics-710: the middle stage (VideoMAE V2, section 3.3).
#
# Source of all numbers: the released script for K710 (32 GPUs x 3 videos, 2 samples of each). The merged list: `python -m
# vmae merge-labels` from Kinetics-400, 600 and 700. ViT-g was not post-pre-trained for SSv2: it hurt there.
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=postpretrain_vitg_k710
MODEL=vit_g
BATCH_PER_GPU=3
LAYER_DECAY=0.9
WEIGHT_DECAY=0.1
NUM_CLASSES=710
EFFECTIVE_BATCH=96 # videos
EPOCHS=35
WARMUP_EPOCHS=5
LR=1e-3 # for 256 videos
DROP_PATH=0.3
CLIP_GRAD=5.0
STARTS_FROM="pre-training: recipes/pretrain_vitg.sh"
PUBLISHED="top-1 83.8, top-5 96.4"

finetune "$@"
