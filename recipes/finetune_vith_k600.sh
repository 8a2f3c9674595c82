#!/usr/bin/env bash
# Fine-tune ViT-H/16 on Kinetics-600.
# The numbers, and where they come from: recipes/finetune_vith_k600.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vith.sh"
PUBLISHED="no score"

finetune finetune_vith_k600 "$@"
