#!/usr/bin/env bash
# Fine-tune ViT-g/14 on HMDB51 after post-pre-training on Kinetics-710.
# The numbers, and where they come from: recipes/finetune_vitg_hmdb51.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

STARTS_FROM="post-pre-training: recipes/postpretrain_vitg_k710.sh"
PUBLISHED="top-1 88.1, top-5 98.5"

finetune finetune_vitg_hmdb51 "$@"
