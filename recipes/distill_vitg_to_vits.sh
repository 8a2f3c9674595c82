#!/usr/bin/env bash
# Distil ViT-g/14 into ViT-S/16 on Kinetics-710.
#
# Published: the teacher (ViT-g post-pre-trained on K710), that the student starts from post-pre-training, and the scores.
# Neither code nor settings of the distillation are published: they are our choice, after ViT-B's fine-tuning.
# Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

NAME=distill_vitg_to_vits
MODEL=vit_s
TEACHER_MODEL=${TEACHER_MODEL:-} # vit_g for an official file, which does not say what it is
NUM_CLASSES=710
BATCH_PER_GPU=16
EFFECTIVE_BATCH=512 # videos
EPOCHS=90
WARMUP_EPOCHS=5
LR=7e-4 # for 256 videos
STARTS_FROM="the student's own post-pre-training on K710"
PUBLISHED="top-1 77.6 on K710, 83.7 on K400, 83.1 on K600"

distil "$@"
