#!/usr/bin/env bash
# Fine-tune ViT-g/14 on Kinetics-400, straight from pre-training (without Kinetics-710).
# The numbers, and where they come from: recipes/finetune_vitg_k400.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vitg.sh"
PUBLISHED="top-1 87.2, top-5 97.4"

if [ -n "${LABEL_MAP:-}" ]; then
  fail "LABEL_MAP is set, but this recipe starts from pre-training; after Kinetics-710: recipes/finetune_vitg_k400_after_k710.sh"
fi

finetune finetune_vitg_k400 "$@"
