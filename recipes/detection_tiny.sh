#!/usr/bin/env bash
# Spatio-temporal detection as on AVA, in some minutes on a CPU and from nothing: videos of two actors each, a small detector
# trained on their annotated key frames, its frame mAP beside that of an untrained one, and pictures of some key frames.
# recipes/detection_tiny.yaml has the numbers. PYTHON chooses the interpreter, OUT the folder; STEPS, TRAIN and VALIDATION
# (videos) how long it takes. Started again, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-detection}
STEPS=${STEPS:-400}
DATA=$OUT/data-${TRAIN:-120}-${VALIDATION:-30}

echo "== 1 of 4: videos of two actors, annotated as AVA is =="
"$PYTHON" -m vmae moving-actors "$DATA" --train "${TRAIN:-120}" --validation "${VALIDATION:-30}"

train() {
  "$PYTHON" -m vmae finetune-detection --config recipes/detection_tiny.yaml --annotations "$DATA/train.csv" \
    --videos "$DATA/videos" --actions "$DATA/actions.pbtxt" ${WORKERS:+--workers "$WORKERS"} "$@"
}
detect() {
  "$PYTHON" -m vmae detect --checkpoint "$1" --annotations "$DATA/val.csv" --persons "$DATA/val_persons.csv" \
    --excluded "$DATA/val_excluded.csv" --videos "$DATA/videos" --output "$1/test" --workers "${WORKERS:-1}" --device cpu \
    --pictures "$2"
}

echo
echo "== 2 of 4: chance: an untrained detector (one step at a learning rate of 0) =="
train --output "$OUT/untrained" --steps 1 --warmup-steps 1
detect "$OUT/untrained" 0

echo
echo "== 3 of 4: training for $STEPS steps =="
train --output "$OUT/run" --steps "$STEPS"

echo
echo "== 4 of 4: frame mAP on validation videos, person boxes as a detector of persons might give them =="
detect "$OUT/run" 6

echo
"$PYTHON" - "$OUT" <<'END'
import json, sys
chance, trained = (json.load(open(f"{sys.argv[1]}/{name}/test/results.json"))["frame_map"] for name in ("untrained", "run"))
print(f"frame mAP: {trained:.1f} % trained, {chance:.1f} % untrained")
END
echo "  $OUT/run/test/   detections.csv (AVA's format), results.json, actions.csv, key_frame_*.png"
