#!/usr/bin/env bash
# Pre-train ViT-L/16 as published: UnlabeledHybrid, 300 epochs of 4 clips a video (1200 in the paper's count).
#
# Source: the released script for ViT-L (48 GPUs x 32 videos, base learning rate 1e-3, warm-up 30, 300 epochs).
# Not verified: 4 samples a video. That script does not set them; the name of its output, 1200e, says so, as 4 x 300.
# Variables and arguments: recipes/common.sh. GPUS=1, 8 and 64 give the same effective batch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NAME=pretrain_vitl
MODEL=vit_l
EFFECTIVE_BATCH=1536
EPOCHS=300
WARMUP_EPOCHS=30
LR=1e-3 # for 256 videos

pretrain "$@"
