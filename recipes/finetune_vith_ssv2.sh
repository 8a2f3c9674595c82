#!/usr/bin/env bash
# Fine-tune ViT-H/16 on Something-Something V2.
# The numbers, and where they come from: recipes/finetune_vith_ssv2.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vith.sh"
PUBLISHED="top-1 76.8 (paper)"

finetune finetune_vith_ssv2 "$@"
