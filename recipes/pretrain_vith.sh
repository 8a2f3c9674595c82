#!/usr/bin/env bash
# Pre-train ViT-H/16 as published, on UnlabeledHybrid. GPUS=1, 8 and 64 give the same effective batch.
# The numbers, and where they come from: recipes/pretrain_vith.yaml. Variables and arguments: recipes/common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain pretrain_vith "$@"
