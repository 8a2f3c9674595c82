#!/usr/bin/env bash
# Fine-tune ViT-L/16 on Kinetics-400.
# The numbers, and where they come from: recipes/finetune_vitl_k400.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vitl.sh"
PUBLISHED="top-1 85.4 (paper)"

finetune finetune_vitl_k400 "$@"
