#!/usr/bin/env bash
# Pre-train ViT-H/16: UnlabeledHybrid, 300 epochs of 4 clips a video (1200 in the paper's count).
#
# Not verified: no script for ViT-H was found. Length and warm-up are those of ViT-L and ViT-g, the batch (64 GPUs x 32 videos)
# and the learning rate those of ViT-g: the paper's 1.5e-4 times 4 samples, as its authors explain in issue 21 of their
# repository. No clipping: only ViT-g's script has it.
# Variables and arguments: recipes/common.sh. GPUS=1, 8 and 64 give the same effective batch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NAME=pretrain_vith
MODEL=vit_h
EFFECTIVE_BATCH=2048
EPOCHS=300
WARMUP_EPOCHS=30
LR=6e-4 # for 256 videos

pretrain "$@"
