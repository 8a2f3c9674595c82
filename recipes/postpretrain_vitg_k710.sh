#!/usr/bin/env bash
# Post-pre-train ViT-g/14 on Kinetics-710: the middle stage (VideoMAE V2, section 3.3).
# The numbers, and where they come from: recipes/postpretrain_vitg_k710.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vitg.sh"
PUBLISHED="top-1 83.8, top-5 96.4"

finetune postpretrain_vitg_k710 "$@"
