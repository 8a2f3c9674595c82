#!/usr/bin/env bash
# Pre-train ViT-B/16 as published: UnlabeledHybrid, 200 epochs of 4 clips a video (800 in the paper's count).
#
# Source of all numbers: the released script for ViT-B (32 GPUs x 32 videos, base learning rate 1e-3, warm-up 20, 4 samples).
# Variables and arguments: recipes/common.sh. GPUS=1, 8 and 64 give the same effective batch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NAME=pretrain_vitb
MODEL=vit_b
EFFECTIVE_BATCH=1024
EPOCHS=200
WARMUP_EPOCHS=20
LR=1e-3 # for 256 videos

pretrain "$@"
