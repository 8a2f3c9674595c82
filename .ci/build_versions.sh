#!/usr/bin/env bash
# Builds the kernels (ViT-B and ViT-g in bf16, default configurations, NVIDIA's three targets) with several releases of
# Triton: `.ci/build_versions.sh FOLDER RELEASE...`. A spill fails. Each release lies in a folder of its own beside the
# environment's, and is fetched once. One that cannot be fetched fails when CI is set, and is skipped elsewhere.
# PYTHON chooses the interpreter (it needs torch), PIP_FLAGS are more arguments for pip.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
FOLDER=$1
shift
read -r -a flags <<< "${PIP_FLAGS:-}"
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
export OMP_NUM_THREADS=1

wrong=0
for release in "$@"; do
  place=$FOLDER/$release
  # pip's own mark of a finished installation; what an interrupted one left goes.
  if ! compgen -G "$place/triton-*.dist-info/RECORD" > /dev/null; then
    rm -rf "$place"
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check ${flags[@]+"${flags[@]}"} --no-deps \
      --target "$place" "triton==$release" > "$LOG" 2>&1; then
      rm -rf "$place"
      echo "triton $release: SKIPPED, it cannot be fetched: $(tail -n 1 "$LOG")"
      [ -z "${CI:-}" ] || wrong=1
      continue
    fi
  fi
  if PYTHONPATH=$place:$PWD/kernels "$PYTHON" -m vmae_kernels.build --targets sm_80 sm_90 sm_100 > "$LOG" 2>&1; then
    echo "triton $release: $(tail -n 1 "$LOG")"
  else
    echo "triton $release: FAILED"
    sed '/^|/d' "$LOG"
    wrong=1
  fi
done
exit $wrong
