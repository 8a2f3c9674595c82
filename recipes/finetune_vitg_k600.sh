#!/usr/bin/env bash
# Fine-tune ViT-g/14 on Kinetics-600 after post-pre-training on Kinetics-710.
#
# The released script for K600 was not at hand: the numbers are those of the one for K400. LABEL_MAP=label_710to600.json
# (official, or of merge-labels) turns the head of 710 classes into one of 600; 3 epochs are too few for a new one.
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=finetune_vitg_k600
MODEL=vit_g
BATCH_PER_GPU=3
LAYER_DECAY=0.9
WEIGHT_DECAY=0.1
NUM_CLASSES=600
EFFECTIVE_BATCH=96 # videos
EPOCHS=3
WARMUP_EPOCHS=1
LR=1e-5 # for 256 videos
DROP_PATH=0.25
STARTS_FROM="post-pre-training: recipes/postpretrain_vitg_k710.sh"
PUBLISHED="top-1 88.8, top-5 98.2"

finetune "$@"
