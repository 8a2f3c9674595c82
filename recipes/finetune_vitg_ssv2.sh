#!/usr/bin/env bash
# Fine-tune ViT-g/14 on Something-Something V2, straight from pre-training (post-pre-training hurts there).
# The numbers, and where they come from: recipes/finetune_vitg_ssv2.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vitg.sh"
PUBLISHED="top-1 77.0, top-5 95.9"

finetune finetune_vitg_ssv2 "$@"
