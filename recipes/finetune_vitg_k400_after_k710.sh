#!/usr/bin/env bash
# Fine-tune ViT-g/14 on Kinetics-400 after post-pre-training on Kinetics-710.
# The numbers, and where they come from: recipes/finetune_vitg_k400_after_k710.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="post-pre-training: recipes/postpretrain_vitg_k710.sh"
PUBLISHED="top-1 88.4, top-5 98.0"

finetune finetune_vitg_k400_after_k710 "$@"
