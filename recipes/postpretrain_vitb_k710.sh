#!/usr/bin/env bash
# Post-pre-train ViT-B/16 on Kinetics-710: the middle stage (VideoMAE V2, section 3.3).
# The numbers, and where they come from: recipes/postpretrain_vitb_k710.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vitb.sh"
PUBLISHED="no score"

finetune postpretrain_vitb_k710 "$@"
