#!/usr/bin/env bash
# Cool down a ViT-B/16 of 16 frames on clips of 64: docs/training.md. `--image-size 384` makes them larger, too.
# The numbers, and where they come from: recipes/cooldown_vitb_64f.yaml. Variables and arguments: recipes/common.sh; and
#   INIT          run on 16 frames of 224 x 224 to cool down (its folder), or a checkpoint or file, with its decoder
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -z "${INIT:-}" ] && [[ " $* " != *" --dry-run "* ]]; then
  fail "INIT is not set: set it to the 16-frame run to cool down (its folder), or a checkpoint or file, with its decoder"
fi

pretrain cooldown_vitb_64f ${INIT:+--init "$INIT"} "$@"
