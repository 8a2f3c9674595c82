#!/usr/bin/env bash
# The path of the big recipes in two minutes on a CPU, on four real clips: recipes/pretrain_tiny.yaml has the numbers.
# Variables and arguments: recipes/common.sh. Without DATA, small images of the clips go to $OUTPUT-data.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS=${GPUS:-1} # processes
DEVICE=${DEVICE:-cpu}

default_data() {
  DATA=$OUTPUT-data/clips.txt
  "$PYTHON" -m vmae samples "$DATA" --frames "$OUTPUT-data/frames" --square
}

pretrain pretrain_tiny "$@"
