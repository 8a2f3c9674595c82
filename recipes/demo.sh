#!/usr/bin/env bash
# The whole story in a few minutes on a laptop: benchmark, pre-train on four real clips, look at a reconstruction.
# PYTHON chooses the interpreter, OUT the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-demo}
mkdir -p "$OUT"

echo "== 1 of 3: what dual masking saves, and what this code saves over the published way (about 2 minutes) =="
"$PYTHON" bench/dual_vs_encoder.py --json "$OUT/dual_vs_encoder.json" --plot "$OUT/dual_vs_encoder.png"

echo
echo "== 2 of 3: pre-training a small model on four real clips (about 2 minutes) =="
rm -rf "$OUT/run"
PYTHON=$PYTHON OUTPUT=$OUT/run recipes/pretrain_tiny.sh

echo
echo "== 3 of 3: what it reconstructs =="
VIDEO=$("$PYTHON" -c "from vmae.synthetic.samples import sample_videos; print(sample_videos()[2])")
"$PYTHON" -m vmae reconstruct "$VIDEO" --checkpoint "$OUT/run" --output "$OUT/reconstruction.png"

echo
echo "Where everything is:"
echo "  $OUT/dual_vs_encoder.png   the benchmark's plot; $OUT/dual_vs_encoder.json its numbers"
echo "  $OUT/run/                  the run: log.jsonl, TensorBoard, checkpoints, run.json"
echo "  $OUT/reconstruction.png    input, encoder view, decoder selection, reconstruction, error"
