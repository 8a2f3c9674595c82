#!/usr/bin/env bash
# Go on pre-training ViT-B/16 on videos of one's own domain: docs/own_domain.md.
# The numbers, and where they come from: recipes/continue_vitb.yaml. Variables and arguments: recipes/common.sh; and
#   INIT          checkpoint to go on from, with its decoder: hub:OpenGVLab/VideoMAE2/mae-b/pytorch_model.bin, a file, a run's folder
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -z "${INIT:-}" ] && [[ " $* " != *" --dry-run "* ]]; then
  fail "INIT is not set: set it to the checkpoint to go on from, with its decoder (hub:OpenGVLab/VideoMAE2/mae-b/pytorch_model.bin, a file, or a run's folder)"
fi

pretrain continue_vitb ${INIT:+--init "$INIT"} "$@"
