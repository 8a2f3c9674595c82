#!/usr/bin/env bash
# The whole story in some minutes on a laptop: benchmark, pre-training on four real clips, their reconstruction.
# PYTHON chooses the interpreter, OUT the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-demo}
mkdir -p "$OUT"

echo "== 1 of 3: what dual masking saves, and this code over the published way (about 2 minutes) =="
"$PYTHON" bench/dual_vs_encoder.py --json "$OUT/dual_vs_encoder.json" --plot "$OUT/dual_vs_encoder.png"

echo
echo "== 2 of 3: pre-training a small model on four real clips (about 2 minutes) =="
rm -rf "$OUT/run"
PYTHON=$PYTHON OUTPUT=$OUT/run recipes/pretrain_tiny.sh

echo
echo "== 3 of 3: what it reconstructs =="
FIND="from vmae.synthetic.samples import sample_videos; print(*sample_videos(), sep='\n')"
mapfile -t VIDEOS < <("$PYTHON" -c "$FIND")
"$PYTHON" -m vmae reconstruct "${VIDEOS[@]}" --checkpoint "$OUT/run" --output "$OUT/reconstruction.png" \
  --title "These clips are the training data: the model has memorised them"

echo
echo "Where everything is:"
echo "  $OUT/dual_vs_encoder.png   the benchmark's plot; $OUT/dual_vs_encoder.json its numbers"
echo "  $OUT/run/                  the run: log.jsonl, TensorBoard, checkpoints, run.json"
echo "  $OUT/reconstruction.png    of the four clips: input, what the encoder sees, reconstruction"
