#!/usr/bin/env bash
# Fine-tune ViT-B/16 on Something-Something V2.
# The numbers, and where they come from: recipes/finetune_vitb_ssv2.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vitb.sh"
PUBLISHED="top-1 71.2 (paper)"

finetune finetune_vitb_ssv2 "$@"
