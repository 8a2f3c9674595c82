#!/usr/bin/env bash
# Spatio-temporal detection as on AVA, in some minutes on a CPU and from nothing: videos of two actors each, a small detector
# trained on their annotated key frames, its frame mAP beside that of an untrained one, and pictures of some key frames.
# PYTHON chooses the interpreter, OUT the folder; STEPS, TRAIN and VALIDATION (videos) how long it takes. Started again, it
# goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-detection}
STEPS=${STEPS:-400}
DATA=$OUT/data-${TRAIN:-120}-${VALIDATION:-30}

echo "== 1 of 4: videos of two actors, annotated as AVA is =="
"$PYTHON" -m vmae moving-actors "$DATA" --train "${TRAIN:-120}" --validation "${VALIDATION:-30}"

# No mirrored clips: left and right are actions here. From fresh weights, the head starts at full scale, all layers at one rate.
train() {
  "$PYTHON" -m vmae finetune-detection --annotations "$DATA/train.csv" --videos "$DATA/videos" --actions "$DATA/actions.pbtxt" \
    --model vit_tiny --patch-size 8 --image-size 64 --num-frames 8 --stride 3 --no-flip --drop-path 0 --init-scale 1 \
    --layer-decay 1 --lr 0.016 --batch-size 16 --workers "${WORKERS:-1}" --device cpu --no-tensorboard --log-every 20 "$@"
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
