#!/usr/bin/env bash
# Distil ViT-g/14 into ViT-B/16 on Kinetics-710.
# The numbers, and where they come from: recipes/distill_vitg_to_vitb.yaml. Variables and arguments: recipes/supervised.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

TEACHER_MODEL=${TEACHER_MODEL:-} # vit_g for an official file, which does not say what it is
STARTS_FROM="the student's own post-pre-training on K710"
PUBLISHED="top-1 81.5 on K710, 86.6 on K400, 85.9 on K600 (fine-tuned further, 7 x 3 views: 87.1 on K400, 87.4 on K600)"

distil distill_vitg_to_vitb "$@"
