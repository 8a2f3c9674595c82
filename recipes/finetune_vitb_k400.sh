#!/usr/bin/env bash
# Fine-tune ViT-B/16 on Kinetics-400.
# The numbers, and where they come from: recipes/finetune_vitb_k400.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="pre-training: recipes/pretrain_vitb.sh"
PUBLISHED="top-1 81.5 (paper)"

finetune finetune_vitb_k400 "$@"
