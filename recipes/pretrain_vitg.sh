#!/usr/bin/env bash
# Pre-train ViT-g/14 as published: UnlabeledHybrid, 300 epochs of 4 clips a video (1200 in the paper's count).
#
# Source of all numbers: the released script for ViT-g (64 GPUs x 32 videos, base learning rate 6e-4, clipping at 0.02, warm-up
# 30, 4 samples). It checkpoints activations; `--dry-run` shows whether that is needed here (--checkpointing, --parallel).
# Variables and arguments: recipes/common.sh. GPUS=1, 8 and 64 give the same effective batch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NAME=pretrain_vitg
MODEL=vit_g
EFFECTIVE_BATCH=2048
EPOCHS=300
WARMUP_EPOCHS=30
LR=6e-4 # for 256 videos
CLIP_GRAD=0.02

pretrain "$@"
