#!/usr/bin/env bash
# Stage two: a ViT-B/16 student predicts the latents of a frozen ViT-B teacher (SALT): docs/targets.md.
# The numbers, and where they come from: recipes/stage2_vitb.yaml. Variables and arguments: recipes/common.sh; and
#   TEACHER       encoder to learn from: a run's folder of stage one, a file, hub:OpenGVLab/VideoMAE2/mae-b/pytorch_model.bin
#   INIT          checkpoint that the student starts from; without it, from nothing, as in the paper
# Without running cells on the predictor: recipes/stage2_vitb.sh --decoder-mask none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -z "${TEACHER:-}" ] && [[ " $* " != *" --dry-run "* ]]; then
  fail "TEACHER is not set: set it to the encoder to learn from (a run's folder of stage one, or a file of weights)"
fi

pretrain stage2_vitb --teacher "${TEACHER:-TEACHER}" ${INIT:+--init "$INIT"} "$@"
